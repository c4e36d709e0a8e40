"""Evaluation against plain pycocotools on the files that it writes, and against numpy for masks and boxes."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from coloured_coco import CATEGORIES, SIZES, ColourNetwork, coloured_cfg, write_coloured
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from sim_m2f.data.catalog import data_sources
from sim_m2f.data.loader import eval_loader as loader_of
from sim_m2f.engine import coco_metrics
from sim_m2f.engine.evaluator import RESULTS_FILE, encode, evaluate
from sim_m2f.errors import UserError
from sim_m2f.weights.folder import METRICS_FILE

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def run(cfg, output: Path, model=None, rank=0, world_size=1) -> dict[str, float]:
    loader = loader_of(cfg, data_sources(cfg, "TEST")[0], rank, world_size)
    return evaluate(model or ColourNetwork(), loader, output, Accelerator(cpu=True), cfg)


def found(scores, labels, masks) -> dict[str, torch.Tensor]:
    return {"scores": torch.tensor(scores), "labels": torch.tensor(labels), "masks": masks}


def plain(annotations: Path, results: Path, iou_type: str, kind: str, most: int = 100) -> dict[str, float]:
    """What pycocotools alone says of a results file; with ``most`` other than 100 its AP is -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(results)), iou_type)
        evaluation.params.maxDets[2] = most
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = {f"{kind}/{name}": evaluation.stats[place] for place, name in enumerate(NAMES)}
    for place, category in enumerate(truth.loadCats(sorted(truth.getCatIds()))):
        values = evaluation.eval["precision"][:, :, place, 0, 2]
        metrics[f"{kind}/AP-{category['name']}"] = values[values >= 0].mean() if (values >= 0).any() else -1
    return {name: math.nan if value == -1 else 100 * value for name, value in metrics.items()}


def with_filled_boxes(results: Path) -> Path:
    """The results with every mask replaced by the box around it, drawn by numpy."""
    entries = json.loads(results.read_text())
    for entry in entries:
        rows, columns = np.nonzero(mask_utils.decode(entry["segmentation"]))
        filled = np.zeros(entry["segmentation"]["size"], np.uint8, order="F")
        if len(rows):
            filled[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
        rle = mask_utils.encode(filled)
        entry["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
    path = results.with_name("filled.json")
    path.write_text(json.dumps(entries))
    return path


def expected(annotations: Path, results: Path) -> dict[str, float]:
    return {
        **plain(annotations, results, "segm", "segm"),
        **plain(annotations, results, "bbox", "bbox"),
        **plain(annotations, with_filled_boxes(results), "segm", "boxfill"),
    }


@pytest.fixture
def coloured(tmp_path) -> Path:
    write_coloured(tmp_path / "set")
    return tmp_path / "set"


def test_results_file_holds_the_masks_of_the_network(coloured, tmp_path):
    run(coloured_cfg(coloured), tmp_path)
    entries = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert len(entries) == 3 * len(SIZES)
    assert [entry["image_id"] for entry in entries[::3]] == list(SIZES)
    assert {entry["category_id"] for entry in entries} == set(CATEGORIES)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coloured / "set.json"))
    for entry in entries:
        assert set(entry) == {"image_id", "category_id", "score", "segmentation", "bbox"}
        assert entry["segmentation"]["size"] == list(SIZES[entry["image_id"]])
        mask = mask_utils.decode(entry["segmentation"]).astype(bool)
        ids = truth.getAnnIds(imgIds=entry["image_id"], catIds=entry["category_id"])
        true = np.logical_or.reduce([truth.annToMask(truth.anns[number]) for number in ids] or [0 * mask])
        assert (mask ^ true).sum() <= 0.3 * true.sum()  # the network sees blocks of 4 x 4 pixels
        rows, columns = np.nonzero(mask)
        if not len(rows):
            assert entry["bbox"] == [0, 0, 0, 0]
            continue
        corner = [columns.min(), rows.min()]
        assert entry["bbox"] == [*corner, columns.max() + 1 - corner[0], rows.max() + 1 - corner[1]]


def test_numbers_are_those_of_plain_pycocotools(coloured, tmp_path, capsys):
    metrics = run(coloured_cfg(coloured), tmp_path)
    assert metrics == pytest.approx(
        expected(coloured / "set.json", tmp_path / RESULTS_FILE), abs=1e-9, nan_ok=True
    )
    assert metrics["segm/AP"] > 2 * metrics["boxfill/AP"] > 0
    assert math.isnan(metrics["segm/APl"])
    written = json.loads((tmp_path / METRICS_FILE).read_text())
    assert written == {name: None if math.isnan(value) else value for name, value in metrics.items()}
    shown = {name: "-" if math.isnan(value) else f"{value:.1f}" for name, value in metrics.items()}
    printed = {line.split("  ")[0]: line.split()[-6:] for line in capsys.readouterr().out.splitlines()}
    assert printed["masks"] == [shown[f"segm/{name}"] for name in NAMES]
    assert printed["boxes"] == [shown[f"bbox/{name}"] for name in NAMES]
    assert printed["box fill"] == [shown[f"boxfill/{name}"] for name in NAMES]
    assert printed["disc"][1:] == [shown[f"{kind}/AP-disc"] for kind in ("segm", "bbox", "boxfill")]


@pytest.mark.slow
def test_numbers_on_real_images(coco_root, tmp_path):
    annotations = coco_root / "coco/annotations/instances_val2017.json"
    truth = coco_metrics.load_truth(annotations)
    rng = np.random.default_rng(0)
    entries = []
    for image_id, image in truth.imgs.items():
        masks, labels = [], []
        for item in truth.imgToAnns[image_id]:
            moved = ndimage.shift(truth.annToMask(item), rng.integers(-3, 4, 2), order=0)
            masks.append(ndimage.binary_dilation(moved, iterations=int(rng.integers(1, 4))))
            labels.append(item["category_id"] if rng.random() < 0.9 else 1)
        found = {
            "scores": torch.from_numpy(rng.random(len(masks))),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(
                np.array(masks, bool).reshape(len(masks), image["height"], image["width"])
            ),
        }
        entries += encode(image_id, found, list(range(91)))
    results = tmp_path / "results.json"
    results.write_text(json.dumps(entries))
    metrics = coco_metrics.score(truth, entries)
    assert metrics == pytest.approx(expected(annotations, results), abs=1e-9, nan_ok=True)
    assert 5 < metrics["boxfill/AP"] < metrics["segm/AP"] < 95


def many_squares(folder: Path, number: int) -> tuple[Path, Path, list[dict]]:
    """An image with so many objects of class 3; twice as many detections, half of them of class 7.

    Returns:
        the annotations, the results, and the detections of the results.
    """
    rng, annotations, entries = np.random.default_rng(number), [], []
    for place in range(number):
        x, y, side = 16.0 * (place % 20), 16.0 * (place // 20), float(rng.integers(6, 13))
        square = [[x, y, x + side, y, x + side, y + side, x, y + side]]
        of_both = {"image_id": 1, "category_id": 3, "area": side**2, "iscrowd": 0}
        annotations.append({**of_both, "id": place + 1, "bbox": [x, y, side, side], "segmentation": square})
        for category in (3, 7):
            box = [x + float(rng.integers(-2, 3)), y, side, side]
            mask = np.zeros((240, 320), np.uint8, order="F")
            mask[int(y) : int(y + side), max(int(box[0]), 0) : int(box[0] + side)] = 1
            rle = mask_utils.encode(mask)
            rle = {"size": list(rle["size"]), "counts": rle["counts"].decode()}
            score = float(rng.random())
            entry = {"image_id": 1, "category_id": category, "score": score, "segmentation": rle}
            entries.append({**entry, "bbox": box})
    categories = [{"id": 3, "name": "square"}, {"id": 7, "name": "none"}]
    images = [{"id": 1, "height": 240, "width": 320, "file_name": "1.png"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    paths = folder / "set.json", folder / "results.json"
    for path, written in zip(paths, (content, entries), strict=True):
        path.write_text(json.dumps(written))
    return *paths, entries


@pytest.mark.slow
@pytest.mark.parametrize("number", [100, 200])
def test_numbers_of_many_objects_are_pycocotools_to_the_last_digit(tmp_path, number):
    annotations, results, entries = many_squares(tmp_path, number)
    metrics = coco_metrics.score(coco_metrics.load_truth(annotations), entries)
    for kind in ("segm", "bbox"):
        for name, value in plain(annotations, results, kind, kind, most=number).items():
            if number == 100 or name != f"{kind}/AP":
                assert metrics[name] == value or (math.isnan(metrics[name]) and math.isnan(value)), name
        assert metrics[f"{kind}/AP"] == pytest.approx(metrics[f"{kind}/AP-square"])


@pytest.mark.slow
def test_more_than_100_detections_of_an_image_count(tmp_path):
    annotations, _, _ = many_squares(tmp_path, 200)
    truth = coco_metrics.load_truth(annotations)
    perfect = [
        {key: annotation[key] for key in ("image_id", "category_id", "segmentation", "bbox")} | {"score": 0.5}
        for annotation in truth.dataset["annotations"]
    ]
    metrics = coco_metrics.score(truth, perfect)
    assert metrics["segm/AP"] == pytest.approx(100)
    assert metrics["segm/AP-square"] == metrics["bbox/APs"] == pytest.approx(100)


TWO_RANKS = """
import sys
from pathlib import Path
from accelerate import Accelerator
from coloured_coco import ColourNetwork, coloured_cfg
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.loader import eval_loader
from sim_m2f.distributed import leave_group
from sim_m2f.engine.evaluator import evaluate
accelerator = Accelerator(cpu=True)
cfg = coloured_cfg(Path(sys.argv[1]))
loader = eval_loader(cfg, data_sources(cfg, "TEST")[0], accelerator.process_index, accelerator.num_processes)
metrics = evaluate(ColourNetwork(), loader, Path(sys.argv[2]), accelerator, cfg)
Path(sys.argv[2], f"rank{accelerator.process_index}of{accelerator.num_processes}").write_text(repr(metrics))
leave_group()
"""


@pytest.mark.slow
def test_two_ranks_count_every_image_once(coloured, tmp_path):
    one = run(coloured_cfg(coloured), tmp_path / "one")
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [*command, str(script), str(coloured), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "two" / RESULTS_FILE).read_text() == (tmp_path / "one" / RESULTS_FILE).read_text()
    assert (tmp_path / "two/rank0of2").read_text() == (tmp_path / "two/rank1of2").read_text() == repr(one)


def test_images_that_were_left_out_are_noticed(coloured, tmp_path):
    with pytest.raises(ValueError, match="saw 3 images"):
        run(coloured_cfg(coloured), tmp_path, rank=0, world_size=2)


class Wrapped(torch.nn.Sequential):
    def forward(self, images, auxiliary=True):
        return self[0](images, auxiliary)


def test_modes_of_the_model_are_restored(coloured, tmp_path):
    model = Wrapped(ColourNetwork())
    model.train()
    model[0].eval()  # as a frozen part is
    model[0].head.train()
    run(coloured_cfg(coloured), tmp_path, model)
    assert [module.training for module in model.modules()] == [True, False, True]


def test_no_detection_at_all_scores_zero(coloured):
    nothing = encode(5, found([], [], torch.zeros(0, 64, 96, dtype=torch.bool)), list(CATEGORIES))
    metrics = coco_metrics.score(coco_metrics.load_truth(coloured / "set.json"), nothing)
    assert metrics["segm/AP"] == metrics["bbox/AP"] == metrics["boxfill/AP"] == metrics["segm/AP-disc"] == 0


def test_without_annotations_only_the_results_are_written(coloured, tmp_path, capsys):
    run(coloured_cfg(coloured), tmp_path)
    content = json.loads((coloured / "set.json").read_text())
    del content["annotations"]
    (coloured / "unlabelled.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert run(coloured_cfg(coloured, "unlabelled.json"), tmp_path) == {}
    assert len(json.loads((tmp_path / RESULTS_FILE).read_text())) == 3 * len(SIZES)
    assert not (tmp_path / METRICS_FILE).exists()  # those of the former evaluation do not stay
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("unlabelled has no annotations")


@pytest.mark.parametrize("segmentation", ["absent", None, []])
def test_without_segmentations_only_boxes_are_scored(coloured, tmp_path, capsys, segmentation):
    content = json.loads((coloured / "set.json").read_text())
    for annotation in content["annotations"]:
        annotation["segmentation"] = segmentation
        if segmentation == "absent":
            del annotation["segmentation"]
    (coloured / "boxes.json").write_text(json.dumps(content))
    metrics = run(coloured_cfg(coloured, "boxes.json"), tmp_path)
    assert metrics == pytest.approx(
        plain(coloured / "set.json", tmp_path / RESULTS_FILE, "bbox", "bbox"), nan_ok=True
    )
    assert "only boxes are scored" in capsys.readouterr().out


def test_missing_areas_and_crowd_flags_are_filled_in(coloured, tmp_path):
    complete = run(coloured_cfg(coloured), tmp_path)
    content = json.loads((coloured / "set.json").read_text())
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    (coloured / "set.json").write_text(json.dumps(content))
    assert run(coloured_cfg(coloured), tmp_path) == pytest.approx(complete, nan_ok=True)


@pytest.mark.parametrize("area", [None, "768", float("nan"), True])
def test_an_area_that_is_no_number_counts_as_missing(coloured, area):
    content = json.loads((coloured / "set.json").read_text())
    expected = [
        annotation["area"]
        for annotation in coco_metrics.load_truth(coloured / "set.json").dataset["annotations"]
    ]
    for annotation in content["annotations"]:
        annotation["area"] = area
    (coloured / "set.json").write_text(json.dumps(content))
    truth = coco_metrics.load_truth(coloured / "set.json")
    assert [annotation["area"] for annotation in truth.dataset["annotations"]] == expected


def test_annotation_with_the_id_zero_counts(coloured):
    content = json.loads((coloured / "set.json").read_text())
    content["annotations"] = content["annotations"][:1]
    content["annotations"][0]["id"] = 0
    (coloured / "set.json").write_text(json.dumps(content))
    annotation = content["annotations"][0]
    perfect = {key: annotation[key] for key in ("image_id", "category_id", "segmentation", "bbox")}
    metrics = coco_metrics.score(coco_metrics.load_truth(coloured / "set.json"), [{**perfect, "score": 1.0}])
    assert metrics["segm/AP"] == metrics["bbox/AP"] == pytest.approx(100)


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [1, 1], "counts": "1"},
        {"size": [64, 96], "counts": "x"},
        "text",
        [[1, 2, 3]],
        [[float("nan")] * 6],
        [[1e12, 0, 5, 5, 0, 9]],
    ],
)
def test_a_broken_segmentation_is_named(coloured, tmp_path, segmentation):
    content = json.loads((coloured / "set.json").read_text())
    content["annotations"][0]["segmentation"] = segmentation
    (coloured / "set.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="annotation id 1: segmentation") as raised:
        run(coloured_cfg(coloured), tmp_path)
    assert str(raised.value).startswith(str(coloured / "set.json"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    with pytest.raises(UserError, match="image 7"):
        encode(7, found([0.5, value], [0, 0], torch.zeros(2, 4, 5, dtype=torch.bool)), [1])


def test_diverged_weights_stop_the_evaluation(coloured, tmp_path):
    with pytest.raises(UserError, match="not a finite number"):
        run(coloured_cfg(coloured), tmp_path, ColourNetwork((math.nan, 0.5, 0.5)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.floats(0.02, 1.0))
def test_encoding_keeps_masks_and_fills_boxes(height, width, seed, share):
    masks = np.random.default_rng(seed).random((3, height, width)) < share
    entries = encode(1, found([0.1] * 3, [0, 1, 1], torch.from_numpy(masks)), [4, 8])
    assert [entry["category_id"] for entry in entries] == [4, 8, 8]
    truth = COCO()
    truth.imgs = {1: {"height": height, "width": width}}
    for mask, entry, filled in zip(masks, entries, coco_metrics.fill_boxes(truth, entries), strict=True):
        np.testing.assert_array_equal(mask_utils.decode(entry["segmentation"]), mask)
        box = mask.any(1)[:, None] & mask.any(0)
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(mask_utils.decode(filled["segmentation"]), box)
        assert entry["bbox"][2] * entry["bbox"][3] == box.sum()


def test_many_classes_are_printed_in_three_blocks():
    names = [f"class{number}" for number in range(25)]
    kinds = ("segm", "bbox", "boxfill")
    metrics = {f"{kind}/{name}": 1.0 for kind in kinds for name in NAMES}
    metrics |= {f"{kind}/AP-{name}": float(place) for kind in kinds for place, name in enumerate(names)}
    table = coco_metrics.format_tables(metrics, names).split("\n\n")[1].splitlines()
    assert len(table) == 2 + 9
    cells = [cell for line in table[2:] for cell in line.split()]
    assert {cells[place]: cells[place + 1 : place + 4] for place in range(0, len(cells), 4)} == {
        name: [f"{place:.1f}"] * 3 for place, name in enumerate(names)
    }
