"""From boxes to masks in one command: what it leaves, what it chooses, what it says of a fault."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from coloured_coco import write_coloured
from conftest import SMALL
from PIL import Image
from pycocotools import mask as coco_mask

from sim_m2f import from_pretrained
from sim_m2f.cli import main
from sim_m2f.commands import fit
from sim_m2f.config import get_cfg
from sim_m2f.data.image import read_image
from sim_m2f.data.notes import notes

QUICK = [*SMALL, "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_NORMS", "False", "SOLVER.MAX_ITER", "2"]


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
    assert "Masks of the annotated boxes" in (out / "index.html").read_text()
    assert json.loads((out / "quality.json").read_text())["measured"]["objects"] == 12
    assert (out / "yolo/data.yaml").exists()
    assert (out / "cvat.xml").exists()
    assert (out / "report/first_look.png").exists()
    model = from_pretrained(out)
    assert model.class_names == ["disc", "ring", "star & bar"]
    assert model.predict(data / "5.png").masks.shape[1:] == (64, 96)


def chosen(folder: Path, *more: str):
    """The configuration for a set of a folder."""
    parser = argparse.ArgumentParser()
    fit.add_arguments(parser)
    args = parser.parse_args(arguments(folder, folder / "out", *more)[1:])
    sets = fit.find_sets(args)
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


def test_a_fault_of_validation_comes_first(data, tmp_path, capsys):
    content = json.loads((data / "set.json").read_text())
    content["annotations"][0]["segmentation"] = {"size": [1, 2], "counts": "x"}
    (data / "val.json").write_text(json.dumps(content))
    assert main(arguments(data, tmp_path / "out", "--val", str(data / "val.json"))) == 2
    assert "annotation id 1: segmentation has size [1, 2]" in capsys.readouterr().err


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


def test_dark_16_bit_images_are_seen(tmp_path, capsys):
    dark = np.linspace(0, 4095, 600).round().astype(np.uint16).reshape(20, 30)
    Image.fromarray(dark).save(tmp_path / "a.png")
    expected = np.rint(dark / 4095 * 255)
    for _ in range(2):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 1], expected)
    assert capsys.readouterr().err.count("scaled by its own range") <= 1
