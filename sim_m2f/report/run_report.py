"""The page of a run, with its contact sheet and loss curves, from the files that the run left."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from torchvision.ops import box_convert, box_iou

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, ImageRecord, read_coco
from sim_m2f.data.segmentation import decode_segmentation, segmentation_problem
from sim_m2f.engine import coco_metrics
from sim_m2f.engine.evaluator import RESULTS_FILE
from sim_m2f.engine.logging import read_series
from sim_m2f.errors import UserError, first_line
from sim_m2f.files import read_json, read_text, write_file
from sim_m2f.report.curves import draw_curves
from sim_m2f.report.drawing import Shape, colours, contact_sheet, draw, write_png
from sim_m2f.report.labelled import MASKS, PANEL_SIDE, labelled_examples
from sim_m2f.report.method_figures import FOLDER as METHOD_FOLDER
from sim_m2f.report.method_figures import read_method
from sim_m2f.report.page import Example, Page, render
from sim_m2f.weights.folder import METRICS_FILE, read_metrics

RELIABILITY = "reliability.png"
MATCHED_IOU = 0.5  # of boxes, from which a prediction wears the colour of an annotated object
SUPERVISION = {
    "box": "Trained from bounding boxes alone. ",
    "mixed": "Trained from bounding boxes, and from masks where there are any. ",
    "mask": "Trained from masks (the upper bound). ",
}

Entry = dict[str, Any]  # of COCO's results
ENTRY = {"image_id", "category_id", "bbox", "segmentation", "score"}
LARGEST = 1e9  # pixels of a box, and more than any score or percentage


def write_report(
    output_dir: str | Path,
    data: CocoData,
    *,
    min_score: float = 0.5,
    num_images: int = 16,
    labelled: DatasetSource | None = None,
) -> Path:
    """Show what a run learned, from the files that training and evaluation left behind.

    Reads ``output_dir``/inference/ (results and metrics), metrics.jsonl, method/ and config.yaml (only
    the results must be there), the annotation file and the images of ``data``. Writes
    report/contact_sheet.png, report/loss_curves.png and index.html, a page that needs no other file.

    Args:
        output_dir: folder of the run.
        data: the test set that was evaluated.
        min_score: predictions below it are not drawn.
        num_images: number of images on the contact sheet.
        labelled: masks.json of the annotated boxes and their images, to be shown too; and the plot of their
            scores, reliability.png, where there is one.

    Returns:
        the path of index.html.

    Raises:
        UserError: there are no results, they belong to another test set, a file of the run is damaged, an
            image cannot be read, or a file cannot be written.
    """
    output_dir = Path(output_dir)
    detections = _read_results(output_dir / RESULTS_FILE, data)
    truth = coco_metrics.load_truth(data.annotations_file) if data.has_annotations else None
    images = choose_images(data.images, num_images)
    examples = [_example(image, detections[image.id], truth, data, min_score) for image in images]
    metrics_file, config_file = output_dir / METRICS_FILE, output_dir / "config.yaml"
    config = read_text(config_file) if config_file.exists() else ""
    supervision = _supervision(config_file, config)
    metrics = read_metrics(metrics_file) if metrics_file.exists() else {}
    series_file = output_dir / "metrics.jsonl"
    curves = draw_curves(read_series(series_file)) if series_file.exists() else None
    plot = output_dir / RELIABILITY
    if examples:
        sheet = contact_sheet([(example.caption, example.panels) for example in examples])
        write_png(output_dir / "report" / "contact_sheet.png", sheet)
    if curves:
        write_png(output_dir / "report" / "loss_curves.png", curves)
    page = Page(
        title=f"Instance masks on {data.name}",
        subtitle=_subtitle(data, sum(map(len, detections.values())), supervision),
        metrics=metrics,
        class_names=data.class_names,
        labelled=labelled_examples(labelled, num_images) if labelled else (),
        reliability=Image.open(plot) if labelled and plot.exists() else None,
        examples=examples,
        curves=curves,
        evolutions=read_method(output_dir / METHOD_FOLDER),
        config=config,
    )
    write_file(output_dir / "index.html", render(page))
    return output_dir / "index.html"


def labelled_boxes(output_dir: Path, cfg: CfgNode) -> DatasetSource | None:
    """The masks that ``fit`` made of a run's boxes; None where there are none, or an image is missing."""
    path, images = output_dir / MASKS, Path(cfg.DATASETS.TRAIN_IMAGES)
    if not cfg.DATASETS.TRAIN_IMAGES or not path.is_file():
        return None
    source = DatasetSource("masks", path, images, cfg.INPUT.LIMITS)
    there = (images / image.file_name for image in read_coco(source, read_masks=False).images)
    return source if all(file.is_file() for file in there) else None


def choose_images(images: list[ImageRecord], count: int) -> list[ImageRecord]:
    """Evenly spaced ones among those with annotated objects; the others only where these are too few."""
    annotated = [image for image in images if len(image.labels)]
    empty = [image for image in images if not len(image.labels)]
    return _evenly_spaced(annotated, count) + _evenly_spaced(empty, count - len(annotated))


def _evenly_spaced(images: list[ImageRecord], count: int) -> list[ImageRecord]:
    count = min(count, len(images))
    return [images[(2 * index + 1) * len(images) // (2 * count)] for index in range(count)]


def _read_results(path: Path, data: CocoData) -> dict[int, list[Entry]]:
    """The detections of each image, best first."""
    if not path.exists():
        raise UserError(f"{path}: no such file; evaluate first (train_net.py --eval-only)")
    images = {image.id: image for image in data.images}
    categories = set(data.category_ids)
    entries = read_json(path, list)
    for number, entry in enumerate(entries):
        if fault := _problem(entry):
            raise UserError(f"{path}: entry {number} {fault}; evaluate again")
        if entry["image_id"] not in images or entry["category_id"] not in categories:
            fault = f"was not made from {data.annotations_file}"
            raise UserError(f"{path}: {fault}; give the test set that was evaluated")
        image = images[entry["image_id"]]
        if problem := segmentation_problem(entry["segmentation"], image.height, image.width):
            fault = f"segmentation {problem.partition(';')[0]}"
            raise UserError(f"{path}: entry {number}: {fault}; evaluate again")
    detections: dict[int, list[Entry]] = {image.id: [] for image in data.images}
    for entry in sorted(entries, key=lambda entry: -entry["score"]):
        detections[entry["image_id"]].append(entry)
    return detections


def _problem(entry: Any) -> str | None:
    """Why something is no detection, if it is none; its mask aside."""
    if not isinstance(entry, dict) or not entry.keys() >= ENTRY:
        return f"is no detection ({', '.join(sorted(ENTRY))})"
    if not all(type(entry[key]) is int for key in ("image_id", "category_id")):
        return "has an image_id or a category_id that is no whole number"
    if not _is_number(entry["score"]):
        return "has a score that is no finite number"
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return "has a bbox that is not four finite numbers"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _mask(entry: Entry, image: ImageRecord) -> np.ndarray:
    """The mask (H, W) bool of a detection.

    Raises:
        UserError: its segmentation cannot be decoded.
    """
    try:
        return decode_segmentation(entry["segmentation"], image.height, image.width).astype(bool)
    except ValueError as error:
        where = f"{RESULTS_FILE}: a detection on {image.file_name}"
        raise UserError(f"{where}: segmentation cannot be decoded ({error}); evaluate again") from error


def _supervision(path: Path, config: str) -> str | None:
    """What a run was trained from, as its configuration says; None where it does not.

    Raises:
        UserError: the configuration is no YAML mapping of groups.
    """
    try:
        group = yaml.safe_load(config) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a YAML file ({first_line(error)}); correct it or remove it") from error
    for key in ("MODEL", "SIM", "SUPERVISION"):
        if not isinstance(group, dict):
            fault = f"is no configuration, {key} is not in a group of keys"
            raise UserError(f"{path}: {fault}; correct it or remove it")
        group = group.get(key, {})
    return group if isinstance(group, str) else None


def _subtitle(data: CocoData, detections: int, supervision: str | None) -> str:
    kind = SUPERVISION.get(supervision or "", "")
    unscored = "" if data.has_annotations else " No annotations, so no scores."
    return f"{kind}{len(data.images)} images, {detections} detections.{unscored}"


def _example(
    image: ImageRecord, detections: list[Entry], truth: COCO | None, data: CocoData, min_score: float
) -> Example:
    """One row of the contact sheet: annotated boxes, predicted masks, true masks, as far as there are any."""
    pixels = Image.fromarray(data.read_image(image))
    names = dict(zip(data.category_ids, data.class_names, strict=True)) if len(data.class_names) > 1 else {}
    objects = [item for item in truth.imgToAnns[image.id] if not item["iscrowd"]] if truth else []
    predictions = [entry for entry in detections if entry["score"] >= min_score]
    matches = match_boxes([entry["bbox"] for entry in predictions], [item["bbox"] for item in objects])
    own, worn = colours(range(len(objects))), colours(matches)
    texts = [f"{names.get(entry['category_id'], '')} {entry['score']:.2f}".strip() for entry in predictions]
    shapes = {}
    if truth is not None:
        boxes = _xyxy([item["bbox"] for item in objects]).tolist()
        labels = [names.get(item["category_id"], "") for item in objects]
        shapes["annotated boxes"] = list(map(Shape, own, labels, boxes))
    masks = [_mask(entry, image) for entry in predictions]
    shapes[f"predicted masks (score ≥ {min_score:g})"] = [
        Shape(colour, text, mask=mask) for colour, text, mask in zip(worn, texts, masks, strict=True)
    ]
    if truth is not None and coco_metrics.has_masks(truth):
        masks = [truth.annToMask(item).astype(bool) for item in objects]
        shapes["true masks"] = [Shape(colour, mask=mask) for colour, mask in zip(own, masks, strict=True)]
    panels = {title: draw(pixels, drawn, PANEL_SIDE) for title, drawn in shapes.items()}
    return Example(image.file_name, panels, list(zip(worn, texts, strict=True)))


def match_boxes(predicted: list[list[float]], annotated: list[list[float]]) -> list[int]:
    """For each predicted box, in turn, the free annotated box with the largest IoU of at least 0.5.

    Boxes are x, y, width, height. A prediction without one gets a number of its own, ``len(annotated)`` or
    more.
    """
    iou = box_iou(_xyxy(predicted), _xyxy(annotated))
    places: list[int] = []
    for row in iou:
        best = int(row.argmax()) if row.numel() and row.max() >= MATCHED_IOU else len(annotated) + len(places)
        places.append(best)
        if best < len(annotated):
            iou[:, best] = 0
    return places


def _xyxy(boxes: list[list[float]]) -> torch.Tensor:
    return box_convert(torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4), "xywh", "xyxy")
