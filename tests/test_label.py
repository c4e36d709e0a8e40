"""Every annotated box gets a mask: ids and order stay, none is empty, a stopped run goes on, scores sort."""

import contextlib
import gc
import json
import os
import resource
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from coloured_coco import write_coloured
from conftest import ROOT, SMALL_FILE, half_written, held
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.stats import spearmanr

from sim_m2f.cli import main
from sim_m2f.config import get_cfg
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, ImageRecord
from sim_m2f.errors import UserError
from sim_m2f.labelling import masks, run
from sim_m2f.labelling.journal import Journal
from sim_m2f.labelling.masks import ellipse, without_overlaps
from sim_m2f.labelling.quality import Quality, fitted, held_back_scores, read_quality, summary, write_quality
from sim_m2f.labelling.run import Compared, calibrated
from sim_m2f.modeling import build_model
from sim_m2f.segmenter import Segmenter, from_pretrained

CROWD = {"id": 90, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1, "area": 9}
LINE = {
    "id": 91,
    "image_id": 5,
    "category_id": 7,
    "bbox": [20, 30, 0, 9],
    "iscrowd": 0,
    "area": 0,
    "note": "kept",
}
SPECK = {
    "id": 92,
    "image_id": 9,
    "category_id": 7,
    "bbox": [20.2, 30.2, 0.2, 0.2],
    "iscrowd": 0,
    "area": 0.04,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, dict]:
    """A set with a crowd, a line and a speck, its images mixed; and an untrained network."""
    folder = tmp_path_factory.mktemp("set")
    content = write_coloured(folder)
    content["annotations"] = [
        *content["annotations"][::2][::-1],
        CROWD,
        LINE,
        *content["annotations"][1::2],
        SPECK,
    ]
    (folder / "set.json").write_text(json.dumps(content))
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list(["MODEL.SIM.PROMPTS.ENABLED", "True", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "64"])
    Segmenter(build_model(cfg), cfg, ["star & bar", "ring", "disc"]).save_pretrained(folder / "network")
    return folder, content


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    given = ["--annotations", str(folder / "set.json"), "--images", str(folder), "--output", str(output)]
    return ["label", "--model", str(folder / "network"), *given, *more]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["resolve", "keep"])
def test_every_box_has_a_mask(data, tmp_path, choice):
    folder, content = data
    half_written(*(tmp_path / name for name in ("masks.json", "masks.boxes.json", "cvat.xml")))
    assert main(arguments(folder, tmp_path, "--overlaps", choice)) == 0
    found = json.loads((tmp_path / "masks.json").read_text())
    assert found["images"] == content["images"]
    assert found["categories"] == content["categories"]
    for one, other in zip(content["annotations"], found["annotations"], strict=True):
        changed = ("segmentation", "area", "score", "signs")
        assert {**one, **{key: other.get(key) for key in changed if key in other}} == other
        if one["iscrowd"]:
            assert other == one
            continue
        left, top, width, height = coco_mask.toBbox(other["segmentation"])
        assert other["area"] == coco_mask.area(other["segmentation"]) > 0
        x, y, w, h = one["bbox"]
        assert left > x - 1
        assert top > y - 1
        assert left + width <= x + w + 1
        assert top + height <= y + h + 1
        assert 0 <= other["score"] <= 1
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "masks.json"}


@pytest.mark.slow
def test_a_stopped_run_goes_on(data, tmp_path, monkeypatch):
    folder, _ = data
    assert main(arguments(folder, tmp_path / "whole")) == 0
    images = []
    original = run.label

    def stops(model, pixels, *rest):
        if len(images) == 2:
            raise KeyboardInterrupt
        images.append(pixels.shape)
        return original(model, pixels, *rest)

    monkeypatch.setattr(run, "label", stops)
    assert main(arguments(folder, tmp_path / "cut")) == 130
    with (tmp_path / "cut/masks.progress.jsonl").open("a") as file:
        file.write('{"image": 9, "labe')  # killed while it wrote
    assert not (tmp_path / "cut/masks.json").exists()
    seen = []
    monkeypatch.setattr(run, "label", lambda *given: seen.append(1) or original(*given))
    assert main(arguments(folder, tmp_path / "cut")) == 0
    assert len(seen) == 2  # of four images with objects
    assert (tmp_path / "cut/masks.json").read_bytes() == (tmp_path / "whole/masks.json").read_bytes()


@pytest.mark.slow
def test_two_processes_do_not_label_into_one_folder(data, tmp_path, capsys):
    folder, _ = data
    with held(tmp_path / ".lock"):
        assert main(arguments(folder, tmp_path)) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}: another process is at work here" in line
        assert "--output" in line
    assert main(arguments(folder, tmp_path)) == 0  # a killed process leaves no lock behind


def test_what_is_done_stays_where_other_images_change(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    source = write_many(tmp_path / "set", tmp_path / "0.png", 6)
    with pytest.raises(KeyboardInterrupt):
        run.label_set(LargeMasks(4), source, tmp_path / "masks.json")
    content = json.loads(source.annotations.read_text())
    content["images"] = content["images"][1:]  # one is left out, as the message for a broken one says
    content["annotations"] = content["annotations"][1:]
    content["annotations"][0]["bbox"] = [1, 1, 6, 6]
    content["annotations"][1]["category_id"] = 2
    content["categories"].append({"id": 2, "name": "dust"})
    source.annotations.write_text(json.dumps(content))
    masker = LargeMasks(9)
    run.label_set(masker, source, tmp_path / "masks.json")
    assert 9 - masker.images == 4  # two with another box or class, and two that were not done
    found = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    assert [len(each["segmentation"]) for each in found] == [LargeMasks.size] * 5


def test_a_journal_of_something_else_is_not_used(tmp_path, capsys):
    path = tmp_path / "new" / "progress.jsonl"
    journal = Journal(path, "one")
    journal.add(3, {1: "mask"})
    assert 3 in Journal(path, "one")
    assert Journal(path, "one").labels(3) == {"1": "mask"}
    assert capsys.readouterr().err == ""
    assert len(Journal(path, "other")) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert f"note: {path}: what it holds was made by another network" in line
    assert len(Journal(path, "one")) == 0


def test_any_number_is_the_id_of_an_image(tmp_path):
    journal = Journal(tmp_path / "progress.jsonl", "one")
    for image in (-1, 0):
        journal.add(image, {1: f"mask {image}"})
    assert [journal.labels(image) for image in (-1, 0)] == [{"1": "mask -1"}, {"1": "mask 0"}]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files get no more bytes than that, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10, 20_000])
def test_a_record_for_which_there_is_no_space_costs_no_other(tmp_path, size):
    path = tmp_path / "progress.jsonl"
    journal = Journal(path, "one")
    journal.add(1, {1: "mask"})
    whole = path.read_bytes()
    with largest_file(len(whole) + 5), pytest.raises(UserError, match=r"progress\.jsonl: cannot be written"):
        journal.add(2, {2: "x" * size})
    assert path.read_bytes() == whole
    assert 2 not in journal
    journal.add(3, {3: "x" * size})
    again = Journal(path, "one")
    assert list(again.places) == [1, 3]
    assert [again.labels(image) for image in (1, 3)] == [{"1": "mask"}, {"3": "x" * size}]


class LargeMasks:
    """Gives objects labels that take far more memory than their annotations, until it has seen enough."""

    size = 20_000

    def __init__(self, images: int) -> None:
        self.images = images

    def identity(self, source: DatasetSource) -> str:
        return "large"

    def scored(self, label: dict) -> dict:
        return label

    def labelling(self, data: CocoData) -> Callable[[ImageRecord], dict[int, dict]]:
        return self.labels

    def labels(self, image: ImageRecord) -> dict[int, dict]:
        if not self.images:
            raise KeyboardInterrupt
        self.images -= 1
        return {number: {"segmentation": "x" * self.size} for number in image.annotation_ids}


def test_an_image_that_memory_does_not_hold_costs_no_other(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    source, masker = write_many(tmp_path / "set", tmp_path / "0.png", 4), LargeMasks(9)
    labels = masker.labels

    def without_memory(image: ImageRecord) -> dict[int, dict]:
        if image.id == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return labels(image)

    monkeypatch.setattr(masker, "labels", without_memory)
    with pytest.raises(UserError) as caught:
        run.label_set(masker, source, tmp_path / "masks.json")
    first, last = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path / 'set/1.png'}: out of memory (CUDA out of memory); take a smaller")
    assert "the same command goes on" in last
    assert masker.images == 6


def test_a_full_disk_ends_the_command_and_loses_nothing(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    source, masker = write_many(tmp_path / "set", tmp_path / "0.png", 6), LargeMasks(9)
    with largest_file(int(2.5 * LargeMasks.size)), pytest.raises(UserError) as caught:
        run.label_set(masker, source, tmp_path / "masks.json")
    (line,) = str(caught.value).splitlines()
    assert "masks.progress.jsonl: cannot be written" in line
    assert masker.images == 6  # the third was the last to be labelled
    run.label_set(masker, source, tmp_path / "masks.json")
    assert masker.images == 2
    found = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    assert [len(each["segmentation"]) for each in found] == [LargeMasks.size] * 6


def test_two_images_that_would_share_a_file_are_told_before_any_is_labelled(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    source = write_many(tmp_path / "set", tmp_path / "0.png", 2)
    (tmp_path / "set/1.png").rename(tmp_path / "set/0.jpg")
    source.annotations.write_text(source.annotations.read_text().replace("1.png", "0.jpg"))
    with pytest.raises(UserError, match=r"images '0.png' and '0.jpg' would share .* yolo,png out of"):
        run.label_set(LargeMasks(0), source, tmp_path / "masks.json", ["yolo", "polygons", "png"])
    assert {file.name for file in tmp_path.iterdir()} == {"0.png", "set"}


@pytest.mark.slow
def test_memory_holds_no_masks(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    used = {}
    for count in (200, 2000):
        folder = tmp_path / str(count)
        source = write_many(folder, tmp_path / "0.png", count)
        with without_garbage_of_others():
            tracemalloc.start()
            with pytest.raises(KeyboardInterrupt):
                run.label_set(LargeMasks(count // 2), source, folder / "masks.json")
            gc.collect()
            run.label_set(LargeMasks(count // 2), source, folder / "masks.json")
            used[count] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert (folder / "masks.json").stat().st_size > count * LargeMasks.size
    assert used[2000] - used[200] < 1800 * 4000  # bytes: of the annotations, not of the labels


@contextlib.contextmanager
def without_garbage_of_others() -> Iterator[None]:
    """Within the block garbage is collected as in a process that has done nothing before, and no other is."""
    gc.collect()
    gc.freeze()
    gc.collect()  # which counts what there is: whole collections wait until a quarter as much is new
    try:
        yield
    finally:
        gc.unfreeze()


def write_many(folder: Path, image: Path, count: int) -> DatasetSource:
    """A set of as many images, all of them one, with a box each."""
    folder.mkdir()
    images, annotations = [], []
    for number in range(count):
        os.link(image, folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 8, "width": 8})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 5, 5]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (folder / "many.json").write_text(json.dumps(content))
    return DatasetSource("many", folder / "many.json", folder)


@pytest.mark.slow
def test_limits_of_the_network_hold(data, tmp_path, capsys):
    folder, _ = data
    model = from_pretrained(folder / "network")
    model.cfg.defrost()
    model.cfg.INPUT.LIMITS.PIXELS = 10
    model.save_pretrained(tmp_path / "network")
    given = arguments(folder, tmp_path / "out", "--model", str(tmp_path / "network"))
    assert main(given) == 2
    assert "more than INPUT.LIMITS.PIXELS (10)" in capsys.readouterr().err
    assert main([*given, "--set", "INPUT.LIMITS.PIXELS", "100000"]) == 0


@pytest.mark.slow
def test_a_broken_image_does_not_cost_the_others(data, tmp_path, capsys):
    folder, _ = data
    broken = folder / "2.png"
    whole = broken.read_bytes()
    try:
        broken.write_bytes(whole[:100])
        assert main(arguments(folder, tmp_path)) == 2
    finally:
        broken.write_bytes(whole)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "2.png: cannot be decoded" in errors[0]
    assert "goes on" in errors[1]
    assert not (tmp_path / "masks.json").exists()
    assert main(arguments(folder, tmp_path)) == 0


FAULTS = {
    "no network": (["--model", "nowhere"], None, ["nowhere"]),
    "no file": (["--annotations", "none.json"], None, ["none.json", "no such file"]),
    "cut": (["--annotations", "cut.json"], None, ["cut.json", "not JSON"]),
    "box outside": ([], {"bbox": [90, 5, 30, 5]}, ["annotation id", "out of its image"]),
    "no number": ([], {"bbox": [1, 2, "3", 4]}, ["annotation id", "not four numbers"]),
    "class of nobody": ([], {"category_id": 4}, ["annotation id", "category_id 4"]),
    "image of nobody": ([], {"image_id": 77}, ["annotation id", "image_id 77"]),
    "format": (["--format", "yolo,yaml"], None, ["'yaml'", "yolo"]),
    "another format": (["--from", "cvat"], None, ["boxes.json", "CVAT"]),
    "images of validation alone": (["--val-images", "."], None, ["--val"]),
    "validation without masks": (["--val", "boxes.json"], None, ["segmentation is missing"]),
    "device": (["--device", "tpu:0"], None, ["device tpu:0"]),
    "the boxes themselves": (["--annotations", "labelled/masks.json"], None, ["masks.json: would replace"]),
    "validation masks": (["--val", "labelled/masks.json"], None, ["masks.json: would replace"]),
    "the folder of a format": (
        ["--annotations", "labelled/yolo", "--from", "yolo", "--format", "yolo"],
        None,
        ["labelled/yolo: would replace"],
    ),
    "a file in the way": (["--output", "cut.json/labelled"], None, ["cannot be written"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line_and_loses_nothing(data, tmp_path, capsys, monkeypatch, name):
    folder, content = data
    monkeypatch.chdir(tmp_path)
    flags, change, said = FAULTS[name]
    annotations = [each for each in content["annotations"] if each.get("segmentation")]
    boxes = [{key: value for key, value in each.items() if key != "segmentation"} for each in annotations[:1]]
    boxes[0].update(change or {})
    (tmp_path / "boxes.json").write_text(json.dumps({**content, "annotations": boxes}))
    (tmp_path / "cut.json").write_text('{"images": [')
    (tmp_path / "labelled").mkdir()
    (tmp_path / "labelled/masks.json").write_text("labelled before")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.json")}
    paths = ["--annotations", "boxes.json", "--images", str(folder), "--output", "labelled"]
    assert main(["label", "--model", str(folder / "network"), *paths, *flags]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert all(text in errors[0] for text in said), errors
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.json")} == before


def test_the_worst_of_two_classes_is_told_by_name(data, tmp_path, capsys):
    folder, content = data
    other = json.loads(json.dumps(content))
    other["categories"][0]["name"] = "square"
    (tmp_path / "other.json").write_text(json.dumps(other))
    given = arguments(folder, tmp_path / "out")
    given[given.index("--annotations") + 1] = str(tmp_path / "other.json")
    assert main(given) == 2
    assert "no class 'square'" in capsys.readouterr().err


@pytest.mark.slow
def test_classes_without_objects_are_not_asked_of_the_network(data, tmp_path):
    folder, content = data
    more = {**content, "categories": [{"id": 1, "name": "square"}, *content["categories"]]}
    (tmp_path / "more.json").write_text(json.dumps(more))
    assert main(arguments(folder, tmp_path / "a")) == 0
    assert main(arguments(folder, tmp_path / "b", "--annotations", str(tmp_path / "more.json"))) == 0
    found = [json.loads((tmp_path / name / "masks.json").read_text()) for name in ("a", "b")]
    assert found[0]["annotations"] == found[1]["annotations"]


def test_boxes_are_no_validation_masks(data, tmp_path, capsys):
    folder, content = data
    annotations = [dict(each) for each in content["annotations"] if "segmentation" in each]
    for each in annotations:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (tmp_path / "val.json").write_text(json.dumps({**content, "annotations": annotations}))
    assert main(arguments(folder, tmp_path / "out", "--val", str(tmp_path / "val.json"))) == 2
    assert "val.json: most of its masks are the four corners of their boxes" in capsys.readouterr().err


@pytest.mark.slow
def test_validation_masks_choose_colours(data, tmp_path):
    folder, content = data
    content = {**content, "annotations": [each for each in content["annotations"] if "segmentation" in each]}
    (tmp_path / "val.json").write_text(json.dumps(content))
    val = "--val", str(tmp_path / "val.json"), "--val-images", str(folder)
    assert main(arguments(folder, tmp_path / "out", *val)) == 0
    quality = read_quality(tmp_path / "out", True)
    means = [quality.measured[f"mIoU {word} colours"] for word in ("without", "with")]
    assert quality.colors == (means[1] >= means[0])
    assert quality.measured["objects"] == len(content["annotations"])
    assert (tmp_path / "out/reliability.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "same"), [(0, "on"), (64, "off")])
def test_without_validation_masks_colours_are_for_networks_without_tiles(data, tmp_path, tile, same):
    folder, _ = data
    model = from_pretrained(folder / "network")
    model.cfg.defrost()
    model.cfg.TEST.TILE = tile
    model.save_pretrained(tmp_path / "network")
    found = {}
    for colors in ("auto", "on", "off"):
        given = arguments(folder, tmp_path / colors, "--model", str(tmp_path / "network"), "--colors", colors)
        assert main(given) == 0
        found[colors] = (tmp_path / colors / "masks.json").read_bytes()
    assert [name for name in ("on", "off") if found[name] == found["auto"]] == [same]


def test_scores_are_fitted_to_the_masks_that_are_asked_for(monkeypatch):
    signs = np.random.default_rng(0).uniform(0, 1, (40, 4))
    places = np.arange(40)
    found = {True: Compared(signs, signs[:, 0], places), False: Compared(signs, 0.5 * signs[:, 1], places)}
    monkeypatch.setattr(run, "compared", lambda model, source: found)
    for asked, colors in ((None, True), (True, True), (False, False)):
        quality, best = calibrated(None, None, asked)
        assert (quality.colors, best) == (colors, found[colors])
        np.testing.assert_allclose(quality.score(signs), found[colors].ious, atol=1e-6)


def test_another_calibration_scores_anew_what_is_labelled(data):
    folder, _ = data
    model, source = from_pretrained(folder / "network"), DatasetSource("set", folder / "set.json", folder)
    signs = dict(zip(masks.SIGNS, (0.1, 0.2, 0.3, 0.4), strict=True))
    found = []
    for weights in ([1, 0, 0, 0, 0.5], [1, 0, 0, 0, 0.5 + 1e-12], [0, 0, 1, 0, 0]):
        labeller = run.Labeller(model, Quality(weights, measured={"mIoU": weights[-1]}), True, True)
        found.append((labeller.identity(source), labeller.scored({"signs": signs})["score"]))
    assert len({identity for identity, _ in found}) == 1
    assert [score for _, score in found] == [0.6, 0.6, 0.3]


def test_faults_of_the_boxes_are_told_before_a_calibration(data, tmp_path, capsys):
    folder, _ = data
    val = "--val", str(folder / "set.json")
    assert main(arguments(folder, tmp_path / "out", *val, "--annotations", "typo.json")) == 2
    said = capsys.readouterr()
    assert "typo.json: no such file" in said.err
    assert "calibrate" not in said.err
    assert {file.name for file in (tmp_path / "out").iterdir()} == {".lock"}


def test_an_empty_mask_becomes_an_ellipse(data, monkeypatch):
    folder, _ = data
    model = from_pretrained(folder / "network")
    predict_both = model.predict_both

    def empty(*given):
        found, free = predict_both(*given)
        found.masks[:1] = False
        return found, free

    monkeypatch.setattr(model, "predict_both", empty)
    boxes = np.array([[10.0, 20, 40, 60], [50, 5, 70, 30]])
    found = masks.label(model, np.zeros((80, 90, 3), np.uint8), boxes, np.array([0, 1]), False)
    np.testing.assert_array_equal(found.masks[0], ellipse(boxes[0], 80, 90))
    assert found.masks[0].sum() == pytest.approx(np.pi * 15 * 20, rel=0.02)
    assert not found.signs[0].any()
    assert Quality(weights=[1, 1, 1, 1, 0.5]).score(found.signs)[0] == 0


def test_an_image_of_one_pixel(data):
    """Which NumPy calls contiguous even where it is mirrored, and PyTorch does not."""
    model = from_pretrained(data[0] / "network")
    found = masks.label(
        model, np.zeros((1, 1, 3), np.uint8), np.array([[0.0, 0, 1, 1]]), np.array([0]), False
    )
    assert found.masks.shape == (1, 1, 1)
    assert found.masks.all()


@pytest.mark.parametrize("box", [[-1, 4, -1, 9], [4, -1, 9, -1], [-1, -1, -1, -1], [21, 11, 21, 11]])
def test_an_ellipse_outside_of_the_image_is_the_nearest_pixel(box):
    x, y = np.clip(np.mean(np.reshape(box, (2, 2)), axis=0).astype(int), 0, (19, 9))
    np.testing.assert_array_equal(np.argwhere(ellipse(np.array(box, float), 10, 20)), [[y, x]])


def test_shared_pixels_go_to_the_nearer_object():
    shared = np.zeros((3, 10, 20), bool)
    shared[0, :, :12] = shared[1, :, 8:] = shared[2] = True
    boxes = np.array([[0, 0, 12, 10], [8, 0, 20, 10], [0, 0, 20, 10.0]])
    kept = without_overlaps(shared, boxes, np.array([4, 4, 2]))
    np.testing.assert_array_equal(kept[2], shared[2])  # of another class
    assert not (kept[0] & kept[1]).any()
    np.testing.assert_array_equal(kept[0] | kept[1], shared[0] | shared[1])
    assert kept[0][5, 8]
    assert kept[1][5, 11]
    same = without_overlaps(shared[[2, 2]], boxes[[2, 2]], np.array([1, 1]))
    assert same.any((1, 2)).all()


def test_scores_follow_what_tells_good_masks(tmp_path):
    generator = np.random.default_rng(0)
    signs = generator.uniform(0, 1, (300, 4))
    ious = np.clip(0.3 + 0.4 * signs[:, 1] + 0.3 * signs[:, 3] + generator.normal(0, 0.02, 300), 0, 1)
    np.testing.assert_allclose(fitted(signs, ious), [0, 0.4, 0, 0.3, 0.3], atol=0.02)
    images = np.repeat(np.arange(60), 5)
    scores = held_back_scores(signs, ious, images)
    assert spearmanr(scores, ious).statistic > 0.95
    changed = ious.copy()
    changed[images == 0] = 1 - changed[images == 0]  # an image does not tell of itself
    np.testing.assert_array_equal(held_back_scores(signs, changed, images)[images == 0], scores[images == 0])
    told = summary(scores, ious)
    assert told["errors of the worst tenth"] > 3 * told["errors of the rest"]
    assert told["mIoU"] == pytest.approx(100 * ious.mean())
    quality = Quality(fitted(signs, ious), False, told)
    write_quality(tmp_path, quality)
    assert read_quality(tmp_path, True) == quality
    (tmp_path / "quality.json").write_text('{"weights": [1]}')
    with pytest.raises(UserError, match=r"quality\.json"):
        read_quality(tmp_path, True)
