"""COCO segmentations (polygons, uncompressed and compressed RLE) as masks, through pycocotools."""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with the form of a segmentation on a picture of this size, if anything."""
    if segmentation is None:
        return "is missing; add it, or train from boxes (MODEL.SIM.SUPERVISION box)"
    if isinstance(segmentation, list):
        if not segmentation or not all(_is_polygon(polygon) for polygon in segmentation):
            return "is not a list of polygons [x1, y1, x2, y2, x3, y3, ...]; correct it"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither a list of polygons nor an RLE with size and counts; correct it"
    if segmentation["size"] != [height, width]:
        return f"has size {segmentation['size']}, its picture [{height}, {width}]; correct it"
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            return f"has counts that do not add up to {height} x {width} pixels; correct it"
    elif not isinstance(counts, str):
        return "has counts that are neither a list nor a string; correct it"
    return None


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(type(value) in (int, float) and math.isfinite(value) for value in points)
    )


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask (height, width) uint8 of 0 and 1 of a well-formed segmentation.

    Raises:
        ValueError: the run lengths do not describe a mask of this size.
    """
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
    return coco_mask.decode(rle)
