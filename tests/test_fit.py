"""From boxes to masks in one command: what it leaves, what it chooses, what it says of a fault."""

import argparse
import json
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coloured_coco import write_coloured
from conftest import SMALL
from PIL import Image
from pycocotools import mask as coco_mask

from sim_m2f import from_pretrained
from sim_m2f.cli import main
from sim_m2f.commands import fit
from sim_m2f.config import get_cfg
from sim_m2f.data.coco import CocoData
from sim_m2f.data.image import read_image
from sim_m2f.data.notes import notes
from sim_m2f.engine.hooks import Metrics
from sim_m2f.engine.logging import forget_peak
from sim_m2f.engine.trainer import Trainer
from sim_m2f.engine.trial import trial
from sim_m2f.errors import UserError

QUICK = [*SMALL, "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_NORMS", "False", "SOLVER.MAX_ITER", "2"]

TITLES = "Masks of the annotated boxes", "Scores and true masks"  # on the page


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with five images and the boxes in boxes.json."""
    folder = tmp_path / "set"
    content = write_coloured(folder)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (folder / "boxes.json").write_text(json.dumps(content))
    return folder


def arguments(folder: Path, output: Path, *more: str, annotations: str = "boxes.json") -> list[str]:
    paths = ["--annotations", str(folder / annotations), "--images", str(folder), "--output", str(output)]
    return ["fit", *paths, *more]


@pytest.mark.slow
def test_boxes_become_masks_a_network_and_a_page(data, tmp_path, capsys):
    out = tmp_path / "out"
    val = "--val", str(data / "set.json")
    assert main(arguments(data, out, *val, "--format", "yolo,cvat", "INPUT.IMAGE_SIZE", "64", *QUICK)) == 0
    told = capsys.readouterr().out
    for text in (
        "5 images, 12 objects",
        "disc (4), ring (4), star & bar (4)",
        "2 steps of 2 images",
        "estimate",
    ):
        assert text in told
    assert told.splitlines()[-1].endswith(str(out / "index.html"))
    boxes = json.loads((data / "boxes.json").read_text())["annotations"]
    masks = json.loads((out / "masks.json").read_text())["annotations"]
    assert [each["id"] for each in masks] == [each["id"] for each in boxes]
    assert all(coco_mask.area(each["segmentation"]) > 0 for each in masks)
    assert all(title in (out / "index.html").read_text() for title in TITLES)
    assert json.loads((out / "quality.json").read_text())["measured"]["objects"] == 12
    assert (out / "yolo/data.yaml").exists()
    assert (out / "cvat.xml").exists()
    assert (out / "report/first_look.png").exists()
    model = from_pretrained(out)
    assert model.class_names == ["disc", "ring", "star & bar"]
    assert model.predict(data / "5.png").masks.shape[1:] == (64, 96)
    assert main(["report", str(out)]) == 0  # which writes the page anew
    assert all(title in (out / "index.html").read_text() for title in TITLES)
    again = "--resume", "--val", str(data / "boxes.json"), "INPUT.IMAGE_SIZE", "64", *QUICK
    assert main(arguments(data, out, *again)) == 0
    assert not (out / "quality.json").exists()
    assert [title in (out / "index.html").read_text() for title in TITLES] == [True, False]


def parsed(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    return parser.parse_args(arguments(folder, folder / "out", *more)[1:])


def chosen(folder: Path, *more: str):
    """The configuration for a set of a folder."""
    args = parsed(folder, *more)
    assert fit.stopped_run(args) is None
    sets = fit.find_sets(args, None)
    return fit.settings(args, sets), sets


def test_settings_follow_from_the_data(data):
    cfg, sets = chosen(data, "SOLVER.BASE_LR", "0.5")
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert cfg.MODEL.SIM.PROMPTS.ENABLED
    assert cfg.SOLVER.BASE_LR == 0.5
    assert cfg.TEST.TILE == 0
    assert not sets.masks
    train, val = (json.loads(source.annotations.read_text()) for source in (sets.train, sets.val))
    assert len(train["images"]) + len(val["images"]) == 5
    assert len(val["images"]) in (1, 2)


@pytest.mark.parametrize("none", [["MODEL.WEIGHTS", ""], ["--weights", ""]])
def test_without_weights_the_whole_backbone_learns(data, none):
    cfg, _ = chosen(data, *none)
    assert cfg.MODEL.WEIGHTS == ""
    assert (cfg.MODEL.BACKBONE.FREEZE_NORMS, cfg.SOLVER.BACKBONE_MULTIPLIER) == (False, 1.0)
    cfg, _ = chosen(data, *none, "SOLVER.BACKBONE_MULTIPLIER", "0.3")
    assert cfg.SOLVER.BACKBONE_MULTIPLIER == 0.3
    cfg, _ = chosen(data)
    assert (cfg.MODEL.BACKBONE.FREEZE_NORMS, cfg.SOLVER.BACKBONE_MULTIPLIER) == (True, 0.2)


def test_files_of_the_user_in_its_folder_stay(data):
    names = "boxes.json", "train.json", "val.json"
    (data / "out").mkdir()
    for name in names:
        (data / "out" / name).write_text("the user's")
    (data / "table.csv").write_text(
        "image,label,xmin,ymin,xmax,ymax\n"
        + "".join(f"{number}.png,cell,{x},5,{x + 20},30\n" for number in (2, 4, 5, 8, 9) for x in (5, 40))
    )
    _, sets = chosen(data, "--annotations", str(data / "table.csv"), "--from", "csv")
    assert len(json.loads(sets.boxes.annotations.read_text())["annotations"]) == 10
    assert sets.train != sets.val
    assert {(data / "out" / name).read_text() for name in names} == {"the user's"}


def test_many_small_objects_are_seen_as_tiles(tmp_path):
    boxes = [[x, y, 8, 8] for x in range(0, 200, 20) for y in range(0, 200, 20)]
    images = [{"id": n, "file_name": f"{n}.png", "width": 200, "height": 200} for n in range(2)]
    for image in images:
        Image.new("RGB", (200, 200)).save(tmp_path / image["file_name"])
    annotations = [
        {"id": 100 * n + k, "image_id": n, "category_id": 1, "bbox": box}
        for n in range(2)
        for k, box in enumerate(boxes)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "dot"}]}
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    cfg, sets = chosen(tmp_path)
    assert cfg.TEST.TILE == 256
    assert cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES >= 100 / 1.7**2
    assert cfg.TEST.DETECTIONS_PER_IMAGE >= 100
    assert sets.train == sets.val == sets.boxes  # two images are not split


def test_images_that_cannot_be_split_are_learned_from_and_validated_with(data):
    """Five images, each the only one with its class."""
    content = json.loads((data / "boxes.json").read_text())
    content["categories"] = [
        {"id": image["id"], "name": f"kind {image['id']}"} for image in content["images"]
    ]
    for annotation in content["annotations"]:
        annotation["category_id"] = annotation["image_id"]
    kept = {annotation["image_id"] for annotation in content["annotations"]}
    content["images"] = [image for image in content["images"] if image["id"] in kept]
    for number in range(5 - len(content["images"])):
        extra = {**content["images"][0], "id": 100 + number, "file_name": f"extra{number}.png"}
        Image.new("RGB", (extra["width"], extra["height"])).save(data / extra["file_name"])
        content["images"].append(extra)
        content["categories"].append({"id": extra["id"], "name": f"kind {extra['id']}"})
        more = {**content["annotations"][0], "id": 100 + number, "image_id": extra["id"]}
        content["annotations"].append({**more, "category_id": extra["id"]})
    (data / "boxes.json").write_text(json.dumps(content))
    _, sets = chosen(data)
    assert sets.train == sets.val == sets.boxes


@pytest.mark.slow
def test_a_batch_that_memory_does_not_hold_is_taken_in_parts(data, monkeypatch):
    """Nothing but the failure is made up: a step of more than two images at once has no memory."""
    steps, step = [], Trainer._losses

    def limited(self, images, *more):
        steps.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("no memory")
        return step(self, images, *more)

    monkeypatch.setattr(Trainer, "_losses", limited)
    cfg, _ = chosen(data, *QUICK, "SOLVER.IMS_PER_BATCH", "8", "INPUT.IMAGE_SIZE", "64")
    fit.affordable_trial(cfg, fixed=False)
    assert cfg.SOLVER.IMAGES_AT_ONCE == 2
    assert steps[:2] == [8, 4]
    assert set(steps[2:]) == {2}
    cfg.SOLVER.IMAGES_AT_ONCE = 0
    with pytest.raises(UserError, match=r"out of memory.*SOLVER\.IMS_PER_BATCH"):
        fit.affordable_trial(cfg, fixed=True)


@pytest.mark.parametrize("minutes", ["15", "1e308"])
def test_steps_follow_from_the_time_and_keys_of_the_command_line_hold(data, monkeypatch, minutes):
    device = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"))
    tried = SimpleNamespace(seconds_per_step=1.0, memory_gib=1.0, trainer=device)
    monkeypatch.setattr(fit, "affordable_trial", lambda cfg, fixed: tried)
    monkeypatch.setattr(fit, "labelling_seconds", lambda *given: 0.0)
    keys = "SOLVER.CHECKPOINT_PERIOD", "20", "SOLVER.WARMUP_ITERS", "400"
    for own, expected in (((), (150, 50)), (keys, (20, 400))):
        given = "--minutes", minutes, *own, "MODEL.WEIGHTS", ""
        cfg, sets = chosen(data, *given)
        fit.plan(cfg, sets, parsed(data, *given))
        assert cfg.SOLVER.MAX_ITER == 600
        found = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.WARMUP_ITERS
        assert found == expected


@pytest.fixture
def begin(data, monkeypatch):
    """A function that runs ``fit`` up to its training, and returns the configuration of that."""
    begun = []

    def stop(cfg, *more):
        (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
        begun.append(cfg)
        raise UserError("training would begin")

    def configuration(output: Path, *more: str):
        begun.clear()
        assert main(arguments(data, output, *more)) == 2
        (cfg,) = begun
        return cfg

    monkeypatch.setattr(fit, "build_trainer", stop)
    monkeypatch.setattr(fit, "plan", lambda cfg, sets, args: None)
    return configuration


@pytest.mark.slow
def test_a_folder_that_was_moved_is_the_one_that_goes_on(tmp_path, begin):
    begin(tmp_path / "out")
    parts = (tmp_path / "out/fit.train.json").read_text()
    (tmp_path / "out").rename(tmp_path / "moved")
    cfg = begin(tmp_path / "moved", "--resume", "SOLVER.BASE_LR", "0.5")
    assert Path(cfg.OUTPUT_DIR) == tmp_path / "moved"
    assert Path(cfg.DATASETS.TRAIN_ANNOTATIONS) == tmp_path / "moved/fit.train.json"
    assert Path(cfg.DATASETS.TEST_ANNOTATIONS) == tmp_path / "moved/fit.val.json"
    assert cfg.SOLVER.BASE_LR == 0.5
    assert (tmp_path / "moved/fit.train.json").read_text() == parts
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_replaced_keeps_its_split(data, tmp_path, begin, capsys):
    """Whatever fails before its checkpoints are gone: here the training itself."""
    out = tmp_path / "out"
    begin(out)
    own = {file: file.read_bytes() for file in out.glob("fit.*.json")}
    assert len(own) == 2
    for seed in ("1", "2", "3"):
        begin(out, "--overwrite", "--seed", seed)
        assert {file: file.read_bytes() for file in out.glob("fit.*.json")} == own


@pytest.mark.slow
def test_a_run_that_is_replaced_has_a_split_of_its_own(data, tmp_path):
    out, quick = tmp_path / "out", ["INPUT.IMAGE_SIZE", "64", *QUICK]
    assert main(arguments(data, out, *quick)) == 0
    held = (out / "fit.val.json").read_bytes()
    for seed in range(1, 9):
        chosen(data, "--seed", str(seed))
        if (data / "out/fit.val.json").read_bytes() != held:
            break
    assert main(arguments(data, out, "--overwrite", "--seed", str(seed), *quick)) == 0
    assert (out / "fit.val.json").read_bytes() == (data / "out/fit.val.json").read_bytes() != held


def test_a_relative_folder_goes_on_from_elsewhere(tmp_path, begin, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begin(Path("out"))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    cfg = begin(Path("../out"), "--resume")
    assert cfg.OUTPUT_DIR == "../out"
    assert cfg.DATASETS.TRAIN_ANNOTATIONS == "../out/fit.train.json"


def test_a_run_with_a_validation_set_does_not_go_on_without(data, tmp_path, begin, capsys):
    val = "--val", str(data / "set.json")
    begin(tmp_path / "out", *val)
    assert main(arguments(data, tmp_path / "out", "--resume")) == 2
    assert "give its --annotations and --val again" in capsys.readouterr().err
    begin(tmp_path / "out", "--resume", *val)


@pytest.mark.slow
def test_a_run_does_not_go_on_with_its_classes_in_another_order(data, tmp_path, begin, capsys):
    begin(tmp_path / "out")
    names = [each["name"] for each in json.loads((data / "boxes.json").read_text())["categories"]]
    (tmp_path / "out/classes.json").write_text(json.dumps({"class_names": names}))
    begin(tmp_path / "out", "--resume")
    content = json.loads((data / "boxes.json").read_text())
    first, second = content["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    (data / "boxes.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(arguments(data, tmp_path / "out", "--resume")) == 2
    assert f"boxes.json: class 0 is {names[1]!r}, and {names[0]!r} in" in capsys.readouterr().err
    content["categories"] = content["categories"][2:]
    content["annotations"] = [
        each for each in content["annotations"] if each["category_id"] == content["categories"][0]["id"]
    ]
    (data / "boxes.json").write_text(json.dumps(content))
    assert main(arguments(data, tmp_path / "out", "--resume")) == 2
    assert f"class 0 is {names[2]!r}, and {names[0]!r} in" in capsys.readouterr().err


def test_a_run_goes_on_without_the_images_that_it_held_back(data, tmp_path, begin, capsys):
    begin(tmp_path / "out")
    before = json.loads((tmp_path / "out/fit.val.json").read_text())["images"]
    content = json.loads((data / "boxes.json").read_text())
    for number in range(20):
        image = {**content["images"][0], "id": 100 + number, "file_name": f"new{number}.png"}
        shutil.copy(data / content["images"][0]["file_name"], data / image["file_name"])
        content["images"].insert(0, image)
    (data / "boxes.json").write_text(json.dumps(content))
    begin(tmp_path / "out", "--resume")
    train, val = (json.loads((tmp_path / f"out/fit.{name}.json").read_text()) for name in ("train", "val"))
    assert val["images"] == before
    assert len(train["images"]) == 25 - len(before)
    assert len(train["annotations"]) + len(val["annotations"]) == len(content["annotations"])
    held = {image["id"] for image in before}
    content["images"] = [image for image in content["images"] if image["id"] not in held]
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] not in held]
    (data / "boxes.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(arguments(data, tmp_path / "out", "--resume")) == 2
    assert "none of the annotated images are those that the run held back" in capsys.readouterr().err


def test_limits_of_a_run_hold_when_it_goes_on(data, tmp_path, begin):
    content = json.loads((data / "boxes.json").read_text())
    for image in content["images"]:
        (data / image["file_name"]).rename(tmp_path / image["file_name"])
        image["file_name"] = f"../{image['file_name']}"
    (data / "boxes.json").write_text(json.dumps(content))
    begin(tmp_path / "out", "INPUT.LIMITS.OUTSIDE", "True")
    assert begin(tmp_path / "out", "--resume").INPUT.LIMITS.OUTSIDE


@pytest.mark.parametrize("more", [[], ["--resume"]])
@pytest.mark.parametrize("key", fit.FLAGS)
def test_keys_that_follow_from_flags_are_refused(data, tmp_path, begin, capsys, key, more):
    if more:
        begin(tmp_path / "out")
    assert main(arguments(data, tmp_path / "out", *more, "SOLVER.BASE_LR", "0.5", key, "5")) == 2
    flag = fit.FLAGS[key]
    assert f"error: command line: {key}: follows from {flag}" in capsys.readouterr().err
    assert more or not (tmp_path / "out/fit.train.json").exists()


def test_a_run_that_goes_on_is_not_removed(data, tmp_path, begin, capsys):
    begin(tmp_path / "out")
    with pytest.raises(SystemExit, match="2"):
        main(arguments(data, tmp_path / "out", "--resume", "--overwrite"))
    assert "--overwrite: not allowed with argument --resume" in capsys.readouterr().err


def test_masks_are_made_on_the_device_of_the_run(data, tmp_path, monkeypatch):
    devices = []

    def load(folder, config="", device="auto"):
        devices.append(device)
        raise UserError("masks would be made")

    monkeypatch.setattr(fit, "plan", lambda cfg, sets, args: None)
    monkeypatch.setattr(fit, "build_trainer", lambda *_: SimpleNamespace(train=lambda: None))
    monkeypatch.setattr(fit, "from_pretrained", load)
    assert main(arguments(data, tmp_path / "out", "MODEL.DEVICE", "cpu")) == 2
    assert devices == ["cpu"]


@pytest.mark.slow
def test_each_trial_and_run_has_its_own_peak_of_memory(data, monkeypatch):
    """Without a GPU, by the calls alone: before a trial's first step, and before a run's."""
    device, calls, step = torch.device("cuda", 0), [], Trainer.step
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    forget_peak(device)
    forget_peak(torch.device("cpu"))
    assert calls == [device]

    def forgotten(self, batch):
        calls.append("step")
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", forgotten)
    for module in ("trial", "hooks"):
        monkeypatch.setattr(f"sim_m2f.engine.{module}.forget_peak", calls.append)
    cfg, _ = chosen(data, *QUICK, "INPUT.IMAGE_SIZE", "64", "MODEL.DEVICE", "cpu")
    trial(cfg)
    assert calls[1:3] == [torch.device("cpu"), "step"]
    Metrics().before_train(SimpleNamespace(accelerator=SimpleNamespace(device=device, is_main_process=False)))
    assert calls[-1] == device


def test_tests_see_images_of_the_size_of_training(data):
    cfg, _ = chosen(data, "INPUT.IMAGE_SIZE", "128")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (128, 128)
    cfg, _ = chosen(data, "INPUT.IMAGE_SIZE", "128", "INPUT.MAX_SIZE_TEST", "192")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (128, 192)


@pytest.mark.slow
def test_a_run_that_goes_on_heeds_keys_of_the_command_line(data, tmp_path, capsys):
    out, quick = tmp_path / "out", ["INPUT.IMAGE_SIZE", "64", *QUICK]
    assert main(arguments(data, out, *quick)) == 0
    parts = [(out / f"fit.{name}.json").read_text() for name in ("train", "val")]
    longer = *quick[:-1], "3"
    assert main(arguments(data, out, "--resume", "--minutes", "2", "--seed", "7", *longer)) == 0
    said = capsys.readouterr().err
    assert all(f"note: {flag}: without effect" in said for flag in ("--minutes", "--seed"))
    assert [(out / f"fit.{name}.json").read_text() for name in ("train", "val")] == parts
    steps = [json.loads(line)["iteration"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    assert main(arguments(data, out, "--resume", *longer, "MODEL.MASK_FORMER.HIDDEN_DIM", "64")) == 2
    assert "belongs to another network" in capsys.readouterr().err


BROKEN = {
    "no file": ([], {}, "none.json", ["none.json", "no such file"]),
    "minutes": (["--minutes", "-3"], {}, "boxes.json", ["--minutes is -3"]),
    "format": (["--format", "yolo,yaml"], {}, "boxes.json", ["'yaml'", "yolo"]),
    "images of validation alone": (["--val-images", "."], {}, "boxes.json", ["--val"]),
    "key": (["SOLVER.LR", "3"], {}, "boxes.json", ["SOLVER.LR"]),
    "weights": (["--weights", "no.pth"], {}, "boxes.json", ["no.pth"]),
    "box outside": ([], {"bbox": [90, 5, 30, 5]}, "boxes.json", ["annotation id 1", "out of its image"]),
    "class": ([], {"category_id": 4}, "boxes.json", ["annotation id 1", "category_id 4"]),
    "no object": ([], None, "boxes.json", ["no object to learn from"]),
    "the boxes themselves": (["--output", "."], {}, "masks.json", ["masks.json: would replace"]),
    "validation boxes": (
        ["--val", "fit.val.json", "--output", "."],
        {},
        "boxes.json",
        ["fit.val.json: would"],
    ),
    "another format": (["--from", "cvat"], {}, "boxes.json", ["boxes.json", "CVAT"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_fault_is_one_line_before_anything_is_loaded(data, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(data)
    flags, change, file, said = BROKEN[name]
    content = json.loads((data / "boxes.json").read_text())
    if change is None:
        content["annotations"] = []
    else:
        content["annotations"][0].update(change)
    (data / "boxes.json").write_text(json.dumps(content))
    assert main(arguments(data, tmp_path / "out", *flags, annotations=file)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(text in errors[0] for text in said), errors
    assert not (tmp_path / "out/config.yaml").exists()


def test_images_that_would_share_a_file_are_told_before_anything_is_loaded(data, tmp_path, capsys):
    content = json.loads((data / "boxes.json").read_text())
    first, second = content["images"][:2]
    old, second["file_name"] = second["file_name"], str(Path(first["file_name"]).with_suffix(".webp"))
    (data / old).rename(data / second["file_name"])
    (data / "boxes.json").write_text(json.dumps(content))
    assert main(arguments(data, tmp_path / "out", "--format", "yolo")) == 2
    assert f"{second['file_name']!r} would share a file in the format yolo" in capsys.readouterr().err
    assert not (tmp_path / "out/config.yaml").exists()


def test_validation_needs_an_object(data, tmp_path, capsys):
    content = json.loads((data / "boxes.json").read_text())
    (data / "empty.json").write_text(json.dumps({**content, "annotations": []}))
    assert main(arguments(data, tmp_path / "out", "--val", str(data / "empty.json"))) == 2
    assert "empty.json: no object to validate with" in capsys.readouterr().err


def test_a_fault_of_validation_comes_first(data, tmp_path, capsys):
    content = json.loads((data / "set.json").read_text())
    content["annotations"][0]["segmentation"] = {"size": [1, 2], "counts": "x"}
    (data / "val.json").write_text(json.dumps(content))
    assert main(arguments(data, tmp_path / "out", "--val", str(data / "val.json"))) == 2
    assert "annotation id 1: segmentation has size [1, 2]" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0, 1, 2])
def test_boxes_are_no_validation_masks(data, capsys, share):
    """Of every ``share``-th object; of none where it is 0."""
    content = json.loads((data / "set.json").read_text())
    for each in content["annotations"][::share] if share else []:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h, x, y]]
    (data / "val.json").write_text(json.dumps(content))
    _, sets = chosen(data, "--val", str(data / "val.json"))
    assert sets.masks == (share != 1)
    assert ("the four corners of their boxes" in capsys.readouterr().err) == (share == 1)


def test_validation_classes_are_matched_by_name(data):
    content = json.loads((data / "set.json").read_text())
    new = {3: 1, 7: 2, 90: 3}
    content["categories"] = [{**each, "id": new[each["id"]]} for each in content["categories"]][::-1]
    for annotation in content["annotations"]:
        annotation["category_id"] = new[annotation["category_id"]]
    (data / "val.json").write_text(json.dumps(content))
    _, sets = chosen(data, "--val", str(data / "val.json"))
    own, found = (json.loads(path.read_text()) for path in (data / "set.json", sets.val.annotations))
    assert found["categories"] == own["categories"]
    assert [each["category_id"] for each in found["annotations"]] == [
        each["category_id"] for each in own["annotations"]
    ]


def test_notes(data, tmp_path):
    content = json.loads((data / "boxes.json").read_text())
    content["annotations"][0]["bbox"][2] = 2
    (data / "train.json").write_text(json.dumps(content))
    train, val = (
        fit.checked(fit.DatasetSource(name, data / f"{name}.json", data)) for name in ("train", "boxes")
    )
    cfg = get_cfg()
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, cfg.MODEL.BACKBONE.FREEZE_NORMS = 2, True
    cfg.INPUT.MIN_SIZE_TEST = cfg.INPUT.MAX_SIZE_TEST = 96
    found = "\n".join(notes(cfg, [train], [val]))
    for text in (
        "5 of 5 images are also trained on",
        "norms are frozen at random weights",
        "4 images hold more objects than the network's 2 queries",
        "1 of 12 boxes are narrower than 4 pixels",
    ):
        assert text in found
    assert len(found.splitlines()) == 4
    assert notes(get_cfg(), [val]) == []


def test_copies_of_images_are_the_same_images(data, tmp_path):
    copies = tmp_path / "copies"
    shutil.copytree(data, copies)
    other = next(copies.glob("*.png"))
    Image.fromarray(255 - np.asarray(Image.open(other))).save(other)
    train, val = (
        fit.checked(fit.DatasetSource("set", folder / "set.json", folder)) for folder in (data, copies)
    )
    (found,) = notes(get_cfg(), [train], [val])
    assert "4 of 5 images are also trained on" in found


def two_copies(data: Path, copy: Path, *contents: Callable[[int], bytes]) -> list[CocoData]:
    """A data set and its copy, with files of other contents by the numbers of their images."""
    shutil.copytree(data, copy)
    sets = [fit.checked(fit.DatasetSource("set", folder / "set.json", folder)) for folder in (data, copy)]
    for one, content in zip(sets, contents, strict=True):
        for number, image in enumerate(one.images):
            (one.image_root / image.file_name).write_bytes(content(number))
    return sets


def test_images_that_only_begin_alike_are_not_the_same(data, tmp_path):
    """As files of BMP do, whose last rows are stored first."""
    train, val = two_copies(
        data,
        tmp_path / "val",
        lambda number: bytes(100_000) + bytes([number]),
        lambda number: bytes(100_000) + bytes([100 * (number > 0) + number]),
    )
    (found,) = notes(get_cfg(), [train], [val])
    assert "1 of 5 images are also trained on" in found


def test_files_of_one_size_are_read_once(data, tmp_path, monkeypatch):
    """And those of other sizes not at all."""
    train, val = two_copies(
        data,
        tmp_path / "val",
        lambda number: bytes([number]) * 9,
        lambda number: bytes([100 + number]) * (9 if number else 10),
    )
    opened, whole = [], Path.open
    monkeypatch.setattr(Path, "open", lambda path, *given: opened.append(path) or whole(path, *given))
    assert notes(get_cfg(), [train], [val]) == []
    assert len(opened) == len(set(opened)) == 5 + 4


def test_a_pipe_among_the_images_is_not_waited_for(data):
    train = val = fit.checked(fit.DatasetSource("set", data / "set.json", data))
    (data / val.images[0].file_name).unlink()
    os.mkfifo(data / val.images[0].file_name)
    found = []
    looking = threading.Thread(target=lambda: found.extend(notes(get_cfg(), [train], [val])), daemon=True)
    looking.start()
    looking.join(20)
    assert ["4 of 5 images are also" in line for line in found] == [True]


def test_check_compares_validation_with_training(data, tmp_path, capsys):
    small = tmp_path / "small.yaml"
    small.write_text("MODEL: {MASK_FORMER: {NUM_OBJECT_QUERIES: 2}}")
    command = "check", "--annotations", str(data / "boxes.json"), "--images", str(data)
    assert main([*command, "--val", str(data / "set.json"), "--config-file", str(small)]) == 0
    told = capsys.readouterr().out
    assert "note: set: 5 of 5 images are also trained on" in told
    assert "the network's 2 queries" in told
    assert [line.split(":")[0] for line in told.splitlines()[-2:]] == ["boxes", "set"]
    content = json.loads((data / "set.json").read_text())
    content["categories"][1]["name"] = "hoop"
    (data / "other.json").write_text(json.dumps(content))
    assert main([*command, "--val", str(data / "other.json")]) == 2
    assert "id 7 'hoop', not id 7 'ring'" in capsys.readouterr().err
    assert main([*command, "--val-images", str(data)]) == 2
    assert "give --val" in capsys.readouterr().err


def png_of_16_bits(values: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) RGB, by its specification: Pillow writes none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("brightest", [4095, 65535])
def test_colours_of_16_bits_are_scaled(tmp_path, brightest):
    values = np.linspace(0, brightest, 20 * 30 * 3).round().astype(np.uint16).reshape(20, 30, 3)
    (tmp_path / "a.png").write_bytes(png_of_16_bits(values))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rint(values / brightest * 255))


def test_dark_16_bit_images_are_seen(tmp_path, capsys):
    dark = np.linspace(0, 4095, 600).round().astype(np.uint16).reshape(20, 30)
    Image.fromarray(dark).save(tmp_path / "a.png")
    expected = np.rint(dark / 4095 * 255)
    for _ in range(2):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 1], expected)
    assert capsys.readouterr().err.count("scaled by its own range") <= 1
