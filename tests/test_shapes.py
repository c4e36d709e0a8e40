"""The embedded data set: its files, its annotations, its hard cases, and that it is never half there."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from scipy.ndimage import binary_dilation, binary_erosion
from skimage.color import rgb2lab
from skimage.draw import polygon2mask

from sim_m2f.data import shapes, shapes_paint
from sim_m2f.data.catalog import find_source
from sim_m2f.data.coco import read_coco
from sim_m2f.errors import UserError

COUNTS = {"train": 240, "val": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", COUNTS)
        yield shapes.write_shapes(tmp_path_factory.mktemp("shapes") / "set")


@pytest.fixture(scope="module")
def train(folder):
    return COCO(folder / "annotations/train.json")


def image_of(folder, image):
    return np.asarray(Image.open(folder / "train" / image["file_name"]))


def objects_of(coco, image):
    return [(item, coco.annToMask(item).astype(bool)) for item in coco.imgToAnns[image["id"]]]


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_files(folder):
    for split, count in COUNTS.items():
        assert len(list((folder / split).iterdir())) == count
        assert len(json.loads((folder / f"annotations/{split}.json").read_text())["images"]) == count
    assert shapes.SPLITS == COUNTS


def test_annotations_fit_the_visible_masks(train, folder):
    assert {category["name"] for category in train.cats.values()} >= {
        "disc",
        "triangle",
        "star",
        "ring",
        "crescent",
        "L",
    }
    for image in train.imgs.values():
        assert image_of(folder, image).shape == (128, 128, 3)
        objects = objects_of(train, image)
        assert 1 <= len(objects) <= 3
        assert sum(mask.astype(int) for _, mask in objects).max() == 1, "a pixel belongs to one object"
        for item, mask in objects:
            rows, columns = np.nonzero(mask)
            tight = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert item["bbox"] == tight
            assert item["area"] == mask.sum() >= 60
            assert item["iscrowd"] == 0
            assert max(item["bbox"][2:]) <= 92


def test_boxes_fit_badly_and_all_classes_occur(train):
    shares = [item["area"] / (item["bbox"][2] * item["bbox"][3]) for item in train.anns.values()]
    assert np.mean(shares) < 0.6
    counts = np.bincount([item["category_id"] for item in train.anns.values()], minlength=9)[1:]
    assert (counts > len(shares) / 16).all()


def test_shares_of_the_hard_cases(train):
    tags = [tag for image in train.imgs.values() for tag in image["tags"]]
    assert set(tags) == {"camouflage", "same_class_overlap", "same_colour"}
    assert 0.1 < tags.count("same_class_overlap") / len(train.imgs) < 0.24
    assert 0.05 < tags.count("same_colour") / len(train.imgs) < 0.16
    assert 0.04 < np.mean([item["camouflage"] for item in train.anns.values()]) < 0.12


def test_tags_say_what_is_there(train):
    for image in train.imgs.values():
        objects = objects_of(train, image)
        pairs = list(itertools.combinations(objects, 2))
        assert ("camouflage" in image["tags"]) == any(item["camouflage"] for item, _ in objects)
        if "same_class_overlap" in image["tags"]:
            assert any(
                a["category_id"] == b["category_id"] and (binary_dilation(one, iterations=2) & other).any()
                for (a, one), (b, other) in pairs
            )
        if "same_colour" in image["tags"]:
            assert any(a["category_id"] != b["category_id"] for (a, _), (b, _) in pairs)


@pytest.mark.slow
def test_colour_fails_on_camouflage_only(train, folder):
    """Lab distance of an object from the pixels around it, averaged by 4 x 4 as for the colour affinity."""
    distances = {True: [], False: []}
    for image in train.imgs.values():
        pooled = image_of(folder, image).reshape(32, 4, 32, 4, 3).mean(axis=(1, 3)) / 255
        lab = rgb2lab(pooled)
        objects = objects_of(train, image)
        covered = np.any([mask for _, mask in objects], axis=0).reshape(32, 4, 32, 4)
        for item, mask in objects:
            inside = mask.reshape(32, 4, 32, 4).all(axis=(1, 3))
            around = binary_dilation(inside, iterations=3) & ~covered.any(axis=(1, 3))
            if inside.sum() >= 5 and around.sum() >= 5:
                distance = np.linalg.norm(lab[inside].mean(0) - lab[around].mean(0))
                distances[item["camouflage"]].append(distance)
    assert np.median(distances[True]) < 5
    assert np.quantile(distances[False], 0.05) > 10


def test_camouflaged_objects_can_be_seen(train, folder):
    """Their texture varies more than the grain of what surrounds them."""
    contrasts = []
    for image in train.imgs.values():
        grey = image_of(folder, image).astype(float).mean(axis=2)
        steps = np.abs(np.diff(grey, axis=1))[:, :127]
        for item, mask in objects_of(train, image):
            if item["camouflage"]:
                around = binary_dilation(mask, iterations=6) & ~binary_dilation(mask, iterations=1)
                contrasts.append(steps[mask[:, :127]].mean() / steps[around[:, :127]].mean())
    assert np.median(contrasts) > 1.8


@pytest.mark.slow
def test_every_run_gives_the_same_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 30, "val": 20})
    other = digest(shapes.write_shapes(tmp_path / "again"))
    first = digest(folder)
    images = [name for name in other if name.endswith(".png")]
    assert len(images) == 50
    assert all(other[name] == first[name] for name in images)
    assert other["annotations/val.json"] == first["annotations/val.json"]
    assert len({other[name] for name in images}) == 50, "train and val share no image"


def test_a_finished_set_is_reused_and_other_folders_are_kept(folder, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert shapes.write_shapes(folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    with pytest.raises(UserError, match="is not empty and not the shapes set"):
        shapes.write_shapes(tmp_path / "mine")
    with pytest.raises(UserError, match="is not empty and not the shapes set"):
        shapes.write_shapes(tmp_path / "mine/file")
    with pytest.raises(UserError, match="cannot be written"):
        shapes.write_shapes(tmp_path / "mine/file/set")


def test_the_cache_serves_the_catalog(tmp_path, monkeypatch):
    monkeypatch.setenv("SIM_M2F_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "SPLITS", {"train": 2, "val": 2})
    data = read_coco(find_source("shapes_val"), read_masks=True)
    assert data.annotations_file == tmp_path / "shapes-v1/annotations/val.json"
    assert data.class_names == list(shapes_paint.LOOKS)
    assert len(data.images) == 2


def test_a_kill_leaves_no_half_made_set(tmp_path):
    code = "import sys; from sim_m2f.data.shapes import write_shapes; write_shapes(sys.argv[1])"
    writer = subprocess.Popen([sys.executable, "-c", code, tmp_path / "set"], start_new_session=True)
    while not list(tmp_path.glob(".set.*/set/train/*.png")):
        assert writer.poll() is None
        time.sleep(0.01)
    os.killpg(writer.pid, signal.SIGKILL)
    writer.wait()
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", shapes_paint.LOOKS)
def test_coverage_and_area_agree_with_scikit_image(name):
    rng = np.random.default_rng(0)
    for _ in range(3):
        centre = rng.uniform(50, 78, 2)
        polygons = [polygon * 40 + centre for polygon in shapes_paint.LOOKS[name].outline(rng)]
        # scikit-image has (row, column) of pixel centres at whole numbers
        masks = [polygon2mask((128, 128), polygon[:, ::-1] - 0.5) for polygon in polygons]
        expected = masks[0] & ~masks[-1] if len(masks) > 1 else masks[0]
        coverage = shapes_paint.coverage(polygons)
        edge = binary_dilation(expected) & ~binary_erosion(expected)
        np.testing.assert_array_equal((coverage >= 0.5)[~edge], expected[~edge])
        assert coverage.sum() == pytest.approx(expected.sum(), rel=0.04)
        area = shapes_paint.polygon_area(polygons[0]) - sum(map(shapes_paint.polygon_area, polygons[1:]))
        assert area == pytest.approx(expected.sum(), rel=0.02)
