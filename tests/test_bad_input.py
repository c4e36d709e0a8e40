"""Whatever a user gets wrong is one line and status 2; no file of the user's is changed or half-written."""

import json
import resource
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from damages import field, png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistakes import COMMANDS, OTHERS, Kind, kinds, words
from mutations import FILES
from PIL import Image
from sound_folder import copied, run, server, write_sound

from benchmarks.bad_input import tables
from sim_m2f.data.image import read_image
from sim_m2f.errors import UserError

KINDS = list(kinds())


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "folder"
    write_sound(folder)
    return folder


@pytest.fixture(scope="module")
def address():
    with server() as found:
        yield found


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIM_M2F_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.area}: {kind.what}")
def test_it_is_one_line(sound, tmp_path, address, kind: Kind):
    folder = copied(sound, tmp_path / "folder")
    kind.damage(folder)
    outcome = run([word.replace("SERVER", address) for word in kind.arguments], folder)
    assert outcome.kind == "one line", outcome
    (line,) = outcome.lines
    assert kind.said in line
    assert not (folder / "payload_ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_changed_at_random_it_runs_or_is_one_line(sound, name, random):
    file, mutate, command = FILES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(sound, Path(temporary) / "folder")
        content = mutate((sound / file).read_bytes(), random)
        (folder / file).unlink()
        (folder / file).write_bytes(content)
        outcome = run(words(command), folder)
        assert outcome.kind in ("runs", "one line"), outcome


CHECK = COMMANDS["check"]


@pytest.mark.parametrize("command", ["check", "masks", "convert", "export", *OTHERS])
def test_what_is_sound_runs(sound, tmp_path, command):
    assert run(COMMANDS[command], copied(sound, tmp_path / "folder")).kind == "runs"


def test_images_outside_of_the_folder_are_read_if_a_key_says_so(sound, tmp_path):
    folder = copied(sound, tmp_path / "folder")
    (folder / "images/1.png").rename(folder / "1.png")
    field("file_name", "../1.png", "images", 0)(folder)
    assert run(CHECK, folder).kind == "one line"
    assert run([*CHECK, "--set", "INPUT.LIMITS.OUTSIDE", "True"], folder).kind == "runs"
    field("file_name", str(folder / "1.png"), "images", 0)(folder)
    assert run([*CHECK, "--set", "INPUT.LIMITS.OUTSIDE", "True"], folder).kind == "runs"


@pytest.mark.parametrize("linked", ["images/1.png", "images/below"])
def test_links_out_of_the_folder_are_followed_if_a_key_says_so(sound, tmp_path, linked):
    folder = copied(sound, tmp_path / "folder")
    name = "1.png" if linked.endswith("png") else "below/1.png"
    (folder / "elsewhere").mkdir()
    (folder / "images/1.png").rename(folder / "elsewhere/1.png")
    target = folder / "elsewhere"
    (folder / linked).symlink_to(target / "1.png" if linked.endswith("png") else target)
    field("file_name", name, "images", 0)(folder)
    outcome = run(CHECK, folder)
    assert outcome.kind == "one line"
    assert "INPUT.LIMITS.OUTSIDE" in outcome.lines[0]
    assert run([*CHECK, "--set", "INPUT.LIMITS.OUTSIDE", "True"], folder).kind == "runs"


def test_links_within_the_folder_and_to_it_are_followed(sound, tmp_path):
    folder = copied(sound, tmp_path / "folder")
    (folder / "images").rename(folder / "elsewhere")
    (folder / "images").symlink_to(folder / "elsewhere")
    (folder / "elsewhere/1.png").rename(folder / "elsewhere/one.png")
    (folder / "elsewhere/1.png").symlink_to("one.png")
    assert run(CHECK, folder).kind == "runs"


@pytest.mark.slow
def test_the_limit_of_pixels_is_exact_and_above_pillows(sound, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    folder = copied(sound, tmp_path / "folder")
    assert run([*CHECK, "--set", "INPUT.LIMITS.PIXELS", str(64 * 48)], folder).kind == "runs"
    assert run([*CHECK, "--set", "INPUT.LIMITS.PIXELS", str(64 * 48 - 1)], folder).kind == "one line"


def test_a_small_file_of_many_pixels_takes_no_memory(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png(100_000, 100_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"more pixels than INPUT\.LIMITS\.PIXELS"):
        read_image(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; decoded it has 30 GB


def test_the_table_of_the_documents_is_that_of_the_output_file():
    results = json.loads((ROOT / "benchmarks/results/bad_input.json").read_text())
    assert (ROOT / "docs/bad_input.md").read_text().endswith(tables(results))
    told = [(each["area"], each["what"]) for each in results if not each["area"].startswith("changed")]
    assert told == [(kind.area, kind.what) for kind in KINDS]
    assert {each["outcome"] for each in results} <= {"runs", "one line"}
