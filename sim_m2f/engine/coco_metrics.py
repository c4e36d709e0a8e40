"""COCO's average precision of a list of detections: masks, the boxes around them, and those boxes filled.

The numbers are pycocotools' own, under detectron2's names and in percent. The filled boxes are the baseline:
what the same detections would score if nothing had been learned beyond the box.
"""

import contextlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from sim_m2f.data.segmentation import decode_segmentation, segmentation_problem
from sim_m2f.errors import UserError

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = {"segm": "masks", "bbox": "boxes", "boxfill": "box fill"}
TITLE = "AP in %"
MOST_DETECTIONS = 100  # of a class in an image that count, or all of an image where it has more
FOLD_CLASSES_ABOVE = 24  # more classes are printed in three blocks abreast


def load_truth(annotations_file: str | Path) -> COCO:
    """Annotations for scoring, with what pycocotools needs and users' files may lack.

    Where they are missing, ``iscrowd`` is 0 and ``area`` that of the mask (else of the box); an ``area`` that
    is no number counts as missing. Every segmentation becomes an RLE. Annotations are numbered from 1 in the
    order of the file, because pycocotools takes a detection that matches annotation 0 for unmatched; no other
    score depends on their ids.

    Raises:
        UserError: a segmentation cannot be read, or is not of its image's size; names file and annotation.
    """
    dataset = json.loads(Path(annotations_file).read_bytes())
    truth = index(dataset)
    for number, annotation in enumerate(dataset["annotations"], start=1):
        if annotation.get("segmentation"):
            annotation["segmentation"] = _rle(truth, annotation, annotations_file)
        area = annotation.get("area")
        if type(area) not in (int, float) or not math.isfinite(area):
            segmentation = annotation.get("segmentation")
            width, height = annotation["bbox"][2:]
            annotation["area"] = float(mask_utils.area(segmentation)) if segmentation else width * height
        annotation.setdefault("iscrowd", 0)
        annotation["id"] = number
    return index(dataset)


def has_masks(truth: COCO) -> bool:
    """Whether every annotation has a segmentation, so that masks can be scored."""
    return all(annotation.get("segmentation") for annotation in truth.dataset["annotations"])


def score(truth: COCO, results: list[dict[str, Any]]) -> dict[str, float]:
    """Average precision of detections in COCO's results format.

    Args:
        truth: the annotations, from ``load_truth``.
        results: entries with image_id, category_id, score, segmentation (compressed RLE) and bbox (x, y,
            width, height in pixels of the image). As pycocotools has it, a detection with a ``bbox`` is
            small, medium or large by the area of its box, an annotation by its ``area``. All of an image
            count, even where there are more than pycocotools' 100 of a class.

    Returns:
        "segm/AP", "segm/AP50", "segm/AP75", "segm/APs", "segm/APm", "segm/APl" and "segm/AP-<class>", the
        same for "bbox/" (the boxes) and "boxfill/" (each mask replaced by its own filled box), in percent;
        NaN where the truth has no object of that size or class. Only "bbox/" when ``has_masks`` is False.
    """
    metrics: dict[str, float] = {}
    detections = _detections(truth, results)
    if has_masks(truth):
        metrics |= _average_precision(truth, detections, "segm", "segm")
        filled = _detections(truth, fill_boxes(truth, results))
        metrics |= _average_precision(truth, filled, "segm", "boxfill")
    return metrics | _average_precision(truth, detections, "bbox", "bbox")


def fill_boxes(truth: COCO, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same detections with each mask replaced by its own filled box, as compressed RLE."""
    filled = []
    for entry in results:
        image = truth.imgs[entry["image_id"]]
        box = np.asarray([entry["bbox"]], dtype=np.float64)
        (segmentation,) = mask_utils.frPyObjects(box, image["height"], image["width"])
        filled.append({**entry, "segmentation": segmentation})
    return filled


def format_tables(metrics: dict[str, float], class_names: list[str]) -> str:
    """A table with AP, AP50, AP75 and AP by size, and one with the AP of each class; "-" for NaN."""
    kinds = [kind for kind in KINDS if f"{kind}/AP" in metrics]
    summary = [[KINDS[kind], *(_cell(metrics[f"{kind}/{name}"]) for name in SUMMARY)] for kind in kinds]
    classes = [[name, *(_cell(metrics[f"{kind}/AP-{name}"]) for kind in kinds)] for name in class_names]
    blocks = 3 if len(classes) > FOLD_CLASSES_ABOVE else 1
    length = math.ceil(len(classes) / blocks)
    folded = [list(itertools.chain(*classes[row::length])) for row in range(length)]
    by_class = _table(["class", *(KINDS[kind] for kind in kinds)] * blocks, folded)
    return _table([TITLE, "AP", "AP50", "AP75", "S", "M", "L"], summary) + "\n\n" + by_class


def _table(headers: list[str], rows: list[list[str]]) -> str:
    alignment = ["left" if header in (TITLE, "class") else "right" for header in headers]
    return tabulate(rows, headers, disable_numparse=True, colalign=alignment)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _rle(truth: COCO, annotation: dict[str, Any], annotations_file: str | Path) -> dict[str, Any]:
    segmentation, image = annotation["segmentation"], truth.imgs[annotation["image_id"]]
    size = image["height"], image["width"]
    problem = segmentation_problem(segmentation, *size)
    if problem is None and isinstance(segmentation, dict):
        try:
            decode_segmentation(segmentation, *size)
        except ValueError as error:
            problem = f"cannot be decoded ({error}); correct it"
    if problem:
        raise UserError(f"{annotations_file}: annotation id {annotation['id']}: segmentation {problem}")
    return truth.annToRLE(annotation)


def index(dataset: dict[str, Any]) -> COCO:
    """An index over a data set in memory, without pycocotools' messages."""
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(None):
        coco.createIndex()
    return coco


def _detections(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    """What ``truth.loadRes`` makes of the results; it cannot take an empty list."""
    if not results:
        return index({**truth.dataset, "annotations": []})
    with contextlib.redirect_stdout(None):
        return truth.loadRes(results)


def _average_precision(truth: COCO, detections: COCO, iou_type: str, kind: str) -> dict[str, float]:
    # faster-coco-eval is faster but not equal: it leaves out the epsilon, and so its precision after a
    # class's first detection is 2e-16 higher (benchmarks/coco_eval.py).
    evaluation = COCOeval(truth, detections, iou_type)
    most = max([MOST_DETECTIONS, *map(len, detections.imgToAnns.values())])
    evaluation.params.maxDets = [1, 10, most]
    with contextlib.redirect_stdout(None):
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (IoU, recall, class, size), of all detections
    all_sizes, *by_size = np.moveaxis(precision, -1, 0)
    at_least = (all_sizes[evaluation.params.iouThrs == iou] for iou in (0.5, 0.75))
    parts = [all_sizes, *at_least, *by_size]
    metrics = {f"{kind}/{name}": _mean(part) for name, part in zip(SUMMARY, parts, strict=True)}
    for index, category_id in enumerate(evaluation.params.catIds):
        metrics[f"{kind}/AP-{truth.cats[category_id]['name']}"] = _mean(all_sizes[:, :, index])
    return metrics


def _mean(precision: np.ndarray) -> float:
    """Mean in percent of precisions that are known, which are not -1; NaN where none is."""
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else math.nan
