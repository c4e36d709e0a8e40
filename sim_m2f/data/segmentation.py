"""COCO segmentations (polygons, uncompressed and compressed RLE) as masks, through pycocotools."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

JUST_BOXES = "most of its masks are the four corners of their boxes"


def segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with the form of a segmentation on an image of this size, if anything."""
    if segmentation is None:
        return "is missing; add it, or train from boxes (MODEL.SIM.SUPERVISION box)"
    if isinstance(segmentation, list):
        if not segmentation or not all(_is_polygon(polygon) for polygon in segmentation):
            return "is not a list of polygons [x1, y1, x2, y2, x3, y3, ...]; correct it"
        if any(_is_far_out(xy[0::2], width) or _is_far_out(xy[1::2], height) for xy in segmentation):
            return f"has points far outside of its image, {width} x {height}; correct it"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "is neither a list of polygons nor an RLE with size and counts; correct it"
    if segmentation["size"] != [height, width]:
        return f"has size {segmentation['size']}, its image [{height}, {width}]; correct it"
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != height * width:
            return f"has counts that do not add up to {height} x {width} pixels; correct it"
    elif not isinstance(counts, str):
        return "has counts that are neither a list nor a string; correct it"
    return None


def _is_polygon(points: Any) -> bool:
    """Whether these are x and y of at least three corners, no number of them far too large."""
    are_pairs = isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0
    return are_pairs and all(type(value) in (int, float) and abs(value) < 1e9 for value in points)


def _is_far_out(positions: list[float], extent: int) -> bool:
    """More than one image away, where pycocotools would run out of memory."""
    return min(positions) < -extent or max(positions) > 2 * extent


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """The mask (height, width) uint8 of 0 and 1 of a well-formed segmentation.

    Raises:
        ValueError: the runs do not make up a mask of this size.
    """
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        rle = coco_mask.frPyObjects(segmentation, height, width)
    else:
        rle = segmentation
        runs = run_lengths(rle["counts"])
        if sum(runs) != height * width or min(runs) < 0:  # pycocotools would leave pixels undefined
            raise ValueError(f"its runs do not add up to {height} x {width} pixels")
    return coco_mask.decode(rle)


def encode_masks(masks: np.ndarray) -> list[dict[str, Any]]:
    """Masks (K, H, W) bool as COCO's compressed RLE: {"size": [H, W], "counts": text} each."""
    encoded = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0), dtype=np.uint8))
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in encoded]


def run_lengths(counts: str) -> list[int]:
    """The lengths in a compressed RLE, as COCO defines it (``rleFrString`` of pycocotools).

    A character holds five bits of a number, lowest first, above 48; the sixth bit says that more follow, the
    fifth of the last one is the sign. From the fourth number on, each is the difference to the last but one.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    return lengths


def mostly_boxes(shapes: Iterable[tuple[Any, Sequence[float]]]) -> bool:
    """Whether more than half of the segmentations are polygons of four corners, those of their boxes (xyxy):
    exporters write them for boxes without a mask.
    """
    found = [_is_box(shape, box) for shape, box in shapes]
    return 2 * sum(found) > len(found)


def _is_box(shape: Any, box: Sequence[float]) -> bool:
    """The first corner may stand at the end again; a pixel of rounding is allowed."""
    if not isinstance(shape, list) or len(shape) != 1 or len(shape[0]) not in (8, 10):
        return False
    away = np.abs(np.reshape(shape[0], (-1, 1, 2)) - np.reshape(box, (1, 2, 2)))
    return bool(away.min(1).max() <= 1)
