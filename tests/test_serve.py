"""The review of a labelled set loses no decision; the command and uploads refuse what is broken."""

import asyncio
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL_FILE, held
from PIL import Image
from pycocotools.coco import COCO
from serve_set import CROWD, open_set, write_labelled

from sim_m2f.cli import main
from sim_m2f.commands.serve import open_review
from sim_m2f.config import get_cfg
from sim_m2f.errors import UserError
from sim_m2f.labelling.quality import Quality, write_quality
from sim_m2f.modeling import build_model
from sim_m2f.segmenter import Segmenter, from_pretrained
from sim_m2f.serving.review import ACCEPTED, OPEN, REJECTED
from sim_m2f.serving.uploads import KINDS, MOST_MEGAPIXELS, read_upload
from sim_m2f.serving.window import SIDE, around, whole


def test_the_worst_come_first_and_what_is_decided_is_passed_over(tmp_path):
    write_labelled(tmp_path)
    review = open_set(tmp_path)
    assert review.order == [4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3]
    assert review.next_open() == 4
    review.decide(5, REJECTED)
    assert review.next_open(4) == 6
    assert review.next_open(3) == 4  # behind the last comes the first
    assert review.neighbour(4, -1) == 3
    for number in review.order:
        review.decide(number, ACCEPTED)
    assert review.next_open(7) == 7
    assert review.counts() == {ACCEPTED: 12}


def test_decisions_outlive_the_process_and_a_half_written_line(tmp_path):
    write_labelled(tmp_path)
    first = open_set(tmp_path)
    first.decide(4, ACCEPTED)
    first.decide(5, ACCEPTED)
    first.decide(5, REJECTED)
    first.redraw(6, np.array([20.0, 0, 40, 20]))
    with first.journal.path.open("a") as file:
        file.write('{"image": 2, "labels": {"7": {"deci')  # killed while it wrote
    again = open_set(tmp_path)
    assert [again.decision(number) for number in (4, 5, 6, 7)] == [ACCEPTED, REJECTED, OPEN, OPEN]
    assert again.record(6) == first.record(6)
    again.decide(6, ACCEPTED)
    assert open_set(tmp_path).record(6) == first.record(6) | {"decision": ACCEPTED}


def test_decisions_about_another_file_are_kept_apart(tmp_path):
    content = write_labelled(tmp_path)
    open_set(tmp_path).decide(4, ACCEPTED)
    (tmp_path / "masks.json").write_text(json.dumps(content | {"info": {"year": 2}}))
    assert open_set(tmp_path).decision(4) == OPEN
    (tmp_path / "masks.json").write_text(json.dumps(content))
    assert open_set(tmp_path).decision(4) == ACCEPTED


def test_an_export_holds_every_decision(tmp_path):
    content = write_labelled(tmp_path)
    review = open_set(tmp_path)
    review.decide(4, ACCEPTED)
    review.decide(5, REJECTED)
    red = np.asarray(Image.open(tmp_path / "2.png"))[..., 0] == 255  # the disc of annotation 4
    red[:8] = red[25:] = red[:, :8] = red[:, 30:] = False
    rows, columns = np.nonzero(red)
    x0, y0, x1, y1 = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1  # around a part of it
    review.redraw(4, np.array([x0, y0, x1, y1], float))
    review.decide(4, ACCEPTED)
    coco = COCO(str(review.export()))
    assert [each["id"] for each in coco.dataset["annotations"]] == [*range(1, 13), CROWD["id"]]
    assert coco.dataset["annotations"][-1] == CROWD
    assert {number: coco.anns[number]["decision"] for number in (3, 4, 5)} == {
        **{3: OPEN, 4: ACCEPTED, 5: REJECTED}
    }
    assert "segmentation" not in coco.anns[5]
    assert coco.anns[5]["bbox"] == content["annotations"][4]["bbox"]
    kept = {key: value for key, value in coco.anns[3].items() if key != "decision"}
    assert kept == content["annotations"][2]
    mask = coco.annToMask(coco.anns[4]).astype(bool)
    assert (mask & red).sum() / (mask | red).sum() > 0.85  # the network's masks have a stride of 4
    assert not mask[:y0].any()
    assert not mask[:, x1:].any()
    assert coco.anns[4]["area"] == mask.sum()
    assert coco.anns[4]["bbox"] == [x0, y0, x1 - x0, y1 - y0]


def with_a_broken_mask(folder: Path) -> dict:
    """The annotation with the lowest score, whose compressed runs do not add up."""
    content = write_labelled(folder)
    broken = next(each for each in content["annotations"] if each["id"] == 4)
    broken["segmentation"]["counts"] = "abc"
    (folder / "masks.json").write_text(json.dumps(content))
    return broken


def test_a_mask_that_cannot_be_decoded_is_one_line(tmp_path):
    broken = with_a_broken_mask(tmp_path)
    review = open_set(tmp_path)
    with pytest.raises(
        UserError, match=r"masks\.json: annotation id 4: segmentation cannot be decoded .* add up"
    ):
        review.mask(4)
    assert review.mask(5).any()
    review.redraw(4, review.box(4))
    assert review.mask(4).any()
    review.decide(4, REJECTED)
    assert review.mask(4).any()
    assert review.record(4)["bbox"] == broken["bbox"]


def test_an_object_without_its_mask_or_image_is_shown(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the extra serve is not installed")
    reviewer = pytest.importorskip("sim_m2f.serving.reviewer", reason="the extra serve is not installed")
    with_a_broken_mask(tmp_path)
    shown, warnings = reviewer.Reviewer(open_set(tmp_path)), []
    monkeypatch.setattr(gradio, "Warning", warnings.append)
    number, drawn, picture, _ = shown.shown(4)
    assert number == "4"
    assert len(drawn["boxes"]) == 1
    assert np.asarray(picture).any()
    (warning,) = warnings
    assert "annotation id 4: segmentation cannot be decoded" in warning
    (tmp_path / "2.png").write_bytes(b"")
    shown.shown(4)
    assert "2.png: cannot be decoded" in warnings[1]
    assert warnings[2:] == [warning]


def through_a_browser(value: object) -> object:
    """JSON as JavaScript reads it, whose numbers are all of 64 bits, and writes it again."""
    return json.loads(json.dumps(value), parse_int=lambda digits: int(float(digits)))


@pytest.mark.slow
def test_ids_that_a_browsers_numbers_cannot_hold_are_kept(tmp_path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="the extra serve is not installed")
    reviewer = pytest.importorskip("sim_m2f.serving.reviewer", reason="the extra serve is not installed")
    content, large = json.loads(json.dumps(write_labelled(tmp_path))), 2**53
    for each in content["annotations"]:
        each |= {"id": each["id"] + large, "image_id": each["image_id"] + large}
    for each in content["images"]:
        each["id"] += large
    (tmp_path / "masks.json").write_text(json.dumps(content))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "shown"))
    review = open_set(tmp_path)
    with gradio.Blocks() as page:
        reviewer.Reviewer(review).build(page)
    state = gradio.state_holder.SessionState(page)
    targets = ((f, *target) for f in page.fns.values() for target in f.targets)
    on = {getattr(page.blocks.get(place), "elem_id", None) or event: f for f, place, event in targets}

    def happens(name: str, *given: object) -> list:
        inputs = through_a_browser(list(given))
        return through_a_browser(asyncio.run(page.process_api(on[name], inputs, state=state))["data"])

    shown, *_ = happens("load")
    shown, *_ = happens("Accept", shown)
    shown, drawn, *_ = happens("Reject", shown)
    drawn["boxes"][0] |= {"xmax": drawn["boxes"][0]["xmax"] - 20, "color": "rgb(255, 90, 95)"}
    happens("change", shown, drawn)
    shown, *_ = happens("Next", shown)
    happens("Reject", happens("Previous", shown)[0])
    decided = {4: ACCEPTED, 5: REJECTED, 6: REJECTED}
    for each in (review, open_set(tmp_path)):
        assert {number - large: change["decision"] for number, change in each.changes.items()} == decided
        exported = json.loads(each.export().read_text())
        assert exported["images"] == content["images"]
        for one, other in zip(exported["annotations"], content["annotations"], strict=True):
            assert (one["id"], one["image_id"]) == (other["id"], other["image_id"])
            moved = one["bbox"] != other["bbox"]
            assert moved == (one["id"] == 6 + large)
            if not other["iscrowd"]:
                assert one["decision"] == decided.get(one["id"] - large, OPEN)


def test_an_export_that_fails_leaves_the_last_one(tmp_path, monkeypatch):
    write_labelled(tmp_path)
    review = open_set(tmp_path)
    before = review.export().read_bytes()
    review.decide(4, REJECTED)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"masks\.json: cannot be written \(No space"):
        review.export()
    assert (tmp_path / "reviewed/masks.json").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "reviewed").glob("*.json")) == ["masks.json"]


@pytest.mark.parametrize("box", [[30, 40, 50, 47], [0, 0, 7, 3], [170, 90, 200, 100]])
def test_a_window_shows_the_box_and_gives_it_back(box):
    pixels = np.zeros((100, 200, 3), np.uint8)
    for window in (around(np.array(box, float), 100, 200), whole(pixels)):
        shown = window.shown(pixels)
        assert max(shown.size) == SIDE
        drawn = window.to_canvas(np.array(box, float))
        assert 0 <= drawn["xmin"] < drawn["xmax"] <= shown.width + 1
        assert 0 <= drawn["ymin"] < drawn["ymax"] <= shown.height + 1
        np.testing.assert_allclose(window.to_image([drawn]), [box], atol=1e-9)
    outside = {"xmin": -50, "ymin": -9, "xmax": 9999, "ymax": 9999}
    np.testing.assert_allclose(whole(pixels).to_image([outside]), [[0, 0, 200, 100]])


def test_an_upload_is_turned_upright(tmp_path):
    image = Image.new("RGB", (40, 20), "red")
    exif = image.getexif()
    exif[274] = 6  # lies on its side
    image.save(tmp_path / "phone.jpg", exif=exif)
    assert read_upload(tmp_path / "phone.jpg").shape == (40, 20, 3)


def test_no_other_decoder_sees_an_upload(tmp_path, monkeypatch):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    allowed, original = [], Image.open

    def noted(file, mode="r", formats=None):
        allowed.append(formats)
        return original(file, mode, formats)

    monkeypatch.setattr(Image, "open", noted)
    read_upload(tmp_path / "a.png")
    assert allowed == [KINDS, KINDS]


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of black and white pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


UPLOADS = {
    "text.png": (b"These are no pixels.", "cannot identify image file"),
    "empty.jpg": (b"", "cannot identify image file"),
    "cut.png": (png(64, 64, np.random.default_rng(0).bytes(9 * 64))[:200], "cannot be decoded"),
    "letter.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify image file"),
    "bomb.png": (png(8000, 8000, bytes(1001 * 8000)), f"more than {MOST_MEGAPIXELS} megapixels"),
    "large bomb.png": (png(60000, 60000, bytes(100)), "exceeds limit"),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_a_broken_upload_gives_one_line(tmp_path, name):
    content, fault = UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_upload(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert fault in message
    assert str(tmp_path) not in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A folder with an untrained network."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list(["MODEL.SIM.PROMPTS.ENABLED", "True", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"])
    folder = tmp_path_factory.mktemp("network")
    Segmenter(build_model(cfg), cfg, ["disc", "ring", "star & bar"]).save_pretrained(folder)
    return folder


def changed(folder: Path, change) -> None:
    content = json.loads((folder / "masks.json").read_text())
    change(content)
    (folder / "masks.json").write_text(json.dumps(content))


def nothing(folder: Path) -> None:
    pass


BROKEN = {
    "no network": (nothing, {"model": "none"}, ["none"]),
    "a folder without a network": (nothing, {"model": "{set}"}, ["config.yaml"]),
    "a labelled folder that is not there": (nothing, {"--labelled": "gone"}, ["gone", "no masks.json"]),
    "images that are not given": (nothing, {"--images": None}, ["--images", "not known"]),
    "images that are not there": (nothing, {"--images": "{set}/gone"}, ["--images", "gone is no folder"]),
    "a port in use": (nothing, {"--port": "{used}"}, ["{used}", "in use", "--port"]),
    "a port that cannot be": (nothing, {"--port": "70000"}, ["70000", "--port"]),
    "an address of another machine": (nothing, {"--host": "192.0.2.1"}, ["192.0.2.1"]),
    "half of masks.json": (
        lambda folder: (folder / "masks.json").write_text('{"images": ['),
        *({}, ["masks.json", "not JSON"]),
    ),
    "a mask of another image": (
        lambda folder: changed(
            folder, lambda content: content["annotations"][0]["segmentation"].update(size=[9, 9])
        ),
        *({}, ["annotation id 1", "segmentation has size [9, 9]"]),
    ),
    "masks of other images": (
        lambda folder: changed(folder, lambda content: content["images"][0].update(file_name="x.png")),
        *({}, ["image id 5", "x.png is missing"]),
    ),
    "other classes": (
        lambda folder: changed(folder, lambda content: content["categories"][0].update(name="cat")),
        *({}, ["no class 'cat'"]),
    ),
    "a score that is none": (
        lambda folder: changed(folder, lambda content: content["annotations"][0].update(score="high")),
        *({}, ["annotation id 1", "score is 'high'"]),
    ),
    "nothing to review": (
        lambda folder: changed(folder, lambda content: content.update(annotations=[CROWD])),
        *({}, ["no object to review"]),
    ),
    "no gradio": (nothing, {}, ["pip install 'sim-m2f[serve]'"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_input_gives_one_line_and_loses_nothing(network, tmp_path, monkeypatch, capsys, name):
    damage, options, faults = BROKEN[name]
    folder = tmp_path / "set"
    write_labelled(folder)
    damage(folder)
    for module in [module for module in sys.modules if module.startswith("sim_m2f.serving.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "gradio", None)
    before = {file: file.read_bytes() for file in folder.glob("*.*")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = str(taken.getsockname()[1])
        given = {"model": network, "--labelled": folder, "--images": folder, "--port": "0"} | options
        model, *words = (
            word
            for key, value in given.items()
            if value is not None
            for word in ([key] if key != "model" else []) + [str(value).format(set=folder, used=used)]
        )
        assert main(["serve", model, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for fault in faults:
        assert fault.format(used=used) in line
    assert {file: file.read_bytes() for file in before} == before


def test_limits_of_a_set_can_be_raised(network, tmp_path, monkeypatch, capsys):
    content = write_labelled(tmp_path / "set")
    name = content["images"][0]["file_name"]
    (tmp_path / "set" / name).rename(tmp_path / name)
    content["images"][0]["file_name"] = f"../{name}"
    (tmp_path / "set/masks.json").write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "gradio", None)
    for module in [module for module in sys.modules if module.startswith("sim_m2f.serving.")]:
        monkeypatch.delitem(sys.modules, module)
    folders = "--labelled", str(tmp_path / "set"), "--images", str(tmp_path / "set"), "--port", "0"
    assert main(["serve", str(network), *folders]) == 2
    assert "set INPUT.LIMITS.OUTSIDE True" in capsys.readouterr().err
    assert main(["serve", str(network), *folders, "--set", "INPUT.LIMITS.OUTSIDE", "True"]) == 2
    assert "the page needs more packages" in capsys.readouterr().err  # the set was read


def test_redrawn_boxes_have_the_colours_and_scores_of_the_labelled_set(network, tmp_path, monkeypatch):
    """Those of the network, in its home folder, where the set has none of its own."""
    write_labelled(tmp_path)
    model = from_pretrained(network)
    monkeypatch.setenv("HOME", str(network.parent))
    name = f"~/{network.name}"
    assert open_review(model, name, tmp_path, tmp_path).labeller.colors == model.colors_by_default
    write_quality(tmp_path, Quality([0, 0, 0.5, 0, 0], colors=False))
    labeller = open_review(model, name, tmp_path, tmp_path).labeller
    assert (labeller.colors, labeller.quality.weights) == (False, [0, 0, 0.5, 0, 0])


def test_a_set_that_is_at_work_is_told_by_its_flag(network, tmp_path, capsys):
    write_labelled(tmp_path)
    with held(tmp_path / ".lock"):
        assert main(["serve", str(network), "--labelled", str(tmp_path), "--port", "0"]) == 2
    assert "or choose another --labelled" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_serves_this_machine_alone(network, tmp_path):
    pytest.importorskip("gradio_image_annotation", reason="the extra serve is not installed")
    write_labelled(tmp_path)
    words = ["--labelled", str(tmp_path), "--images", str(tmp_path), "--port", "0"]
    command = [sys.executable, "-m", "sim_m2f.cli", "serve", str(network), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        lines = (re.match(r"page: (http://127\.0\.0\.1:\d+/) ", line) for line in process.stdout)
        address = next(filter(None, lines))[1]
        with urllib.request.urlopen(address) as answer:
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self' ")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}gradio_api/file={tmp_path}/masks.json")
        upload = urllib.request.Request(f"{address}gradio_api/upload", data=too_large(), method="POST")
        upload.add_header("Content-Type", "multipart/form-data; boundary=part")
        with pytest.raises((urllib.error.HTTPError, ConnectionError)):
            urllib.request.urlopen(upload)
        assert main(["serve", str(network), *words]) == 2  # another process is at work here
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 128 + signal.SIGINT
    finally:
        process.kill()


def too_large() -> bytes:
    head = b'--part\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return head + bytes(32_000_000) + b"\r\n--part--\r\n"
