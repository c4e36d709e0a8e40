"""Whatever a user gets wrong is one line and status 2; no file of the user's is changed or half-written."""

import json
import tempfile
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mistakes import COMMANDS, Kind, kinds
from mutations import FILES
from sound_folder import copied, run, server, write_sound

from benchmarks.bad_input import tables

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


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.area}: {kind.what}")
def test_it_is_one_line(sound, tmp_path, address, kind: Kind):
    folder = copied(sound, tmp_path / "folder")
    kind.damage(folder)
    outcome = run([word.replace("SERVER", address) for word in kind.arguments], folder)
    assert outcome.kind == "one line", outcome
    (line,) = outcome.lines
    assert kind.said in line
    assert not (folder / "payload_ran").exists()


@pytest.mark.parametrize("name", FILES)
@settings(max_examples=10, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_changed_at_random_it_runs_or_is_one_line(sound, name, random):
    file, mutate, arguments = FILES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = copied(sound, Path(temporary) / "folder")
        content = mutate((sound / file).read_bytes(), random)
        (folder / file).unlink()
        (folder / file).write_bytes(content)
        outcome = run([*COMMANDS.get(arguments[0], arguments[:1]), *arguments[1:]], folder)
        assert outcome.kind in ("runs", "one line"), outcome


def test_the_table_of_the_documents_is_that_of_the_output_file():
    results = json.loads((ROOT / "benchmarks/results/bad_input.json").read_text())
    assert (ROOT / "docs/bad_input.md").read_text().endswith(tables(results))
    told = [(each["area"], each["what"]) for each in results if not each["area"].startswith("changed")]
    assert told == [(kind.area, kind.what) for kind in KINDS]
    assert {each["outcome"] for each in results} <= {"runs", "one line"}
