"""Annotated boxes beside the masks that they were given."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, ImageRecord, read_coco, read_mask
from sim_m2f.files import read_json
from sim_m2f.report.drawing import Shape, colours, draw
from sim_m2f.report.page import Example

MASKS = "masks.json"  # of ``label`` and ``fit``
PANEL_SIDE = 400  # pixels of a panel's longer side


def labelled_examples(source: DatasetSource, count: int) -> list[Example]:
    """The images whose worst mask has the lowest score, in this order.

    Args:
        source: masks.json of ``label`` and the images.
        count: at most so many images.
    """
    data = read_coco(source, read_masks=True)
    annotations = read_json(source.annotations)["annotations"]
    scores = {annotation["id"]: annotation.get("score", 1.0) for annotation in annotations}
    worst = {
        image.id: min(map(scores.__getitem__, image.annotation_ids), default=2.0) for image in data.images
    }
    images = sorted((image for image in data.images if len(image.labels)), key=lambda image: worst[image.id])
    examples = []
    for image in images[:count]:
        pixels = data.read_image(image)
        masks = np.stack([read_mask(data, image, index) for index in range(len(image.labels))]).astype(bool)
        own = [scores[number] for number in image.annotation_ids]
        examples.append(labelled_example(data, image, pixels, masks, own))
    return examples


def labelled_example(
    data: CocoData, record: ImageRecord, pixels: np.ndarray, masks: np.ndarray, scores: Sequence[float]
) -> Example:
    """One row: the boxes of one of the images (H, W, 3) and their masks (N, H, W) bool, with N scores."""
    names = [data.class_names[label] if len(data.class_names) > 1 else "" for label in record.labels]
    worn, image = colours(range(len(names))), Image.fromarray(pixels)
    texts = [f"{name} {score:.2f}".strip() for name, score in zip(names, scores, strict=True)]
    panels = {
        "annotated boxes": list(map(Shape, worn, names, record.boxes.tolist())),
        "their masks": [Shape(*row[:2], mask=row[2]) for row in zip(worn, texts, masks, strict=True)],
    }
    drawn = {title: draw(image, shapes, PANEL_SIDE) for title, shapes in panels.items()}
    return Example(record.file_name, drawn, list(zip(worn, texts, strict=True)))
