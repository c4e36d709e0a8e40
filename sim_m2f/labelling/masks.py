"""The masks of one image's annotated boxes, none of them empty, and what tells how good each is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from sim_m2f.data.segmentation import encode_masks
from sim_m2f.geometry import iou, mask_extents
from sim_m2f.segmenter import Segmenter

SIGNS = ("confidence", "box_fit", "flip_agreement", "free_agreement")


@dataclass(frozen=True)
class Labels:
    """Masks of N boxes of one image.

    Attributes:
        masks: (N, H, W) bool, each within its box and never empty.
        signs: (N, 4), 0 to 1, by ``SIGNS``: the mean probability of the mask's pixels, IoU of the box around
            it and the given one, IoU with the mask that the mirrored image gives, and the largest IoU with a
            mask of the same class that the network finds without boxes. All 0 where the network gave nothing.
    """

    masks: np.ndarray
    signs: np.ndarray


def label(
    model: Segmenter, pixels: np.ndarray, boxes: np.ndarray, labels: np.ndarray, colors: bool
) -> Labels:
    """Ask the network for the masks of boxes, as the image is and mirrored, and for what it finds itself.

    Args:
        model: a network that learned from prompts.
        pixels: (H, W, 3) uint8 RGB.
        boxes: (N, 4) xyxy in pixels of the image.
        labels: (N,) classes, 0 to C-1.
        colors: whether masks are corrected by colours.
    """
    width = pixels.shape[1]
    mirrored = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    given, free = model.predict_both(pixels, boxes, labels, colors)
    flipped = model.predict(pixels[:, ::-1].copy(), boxes=mirrored, labels=labels, colors=colors)
    masks = given.masks.cpu().numpy()
    again = encode_masks(flipped.masks.flip(-1).cpu().numpy())
    same_class = given.labels[:, None] == free.labels
    found = np.where(same_class.cpu().numpy(), overlaps(given.rles, free.rles), 0.0)
    around = iou(mask_extents(given.masks).double().cpu(), torch.from_numpy(boxes))
    signs = np.stack(
        [
            given.scores.cpu().numpy(),
            around.numpy(),
            overlaps(given.rles, again).diagonal(),
            found.max(1, initial=0.0),
        ],
        axis=1,
    )
    for index in np.flatnonzero(~masks.any((1, 2))):
        masks[index], signs[index] = ellipse(boxes[index], *pixels.shape[:2]), 0.0
    return Labels(masks, signs)


def overlaps(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> np.ndarray:
    """(N, M) IoU of masks as compressed RLE."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return np.asarray(coco_mask.iou(first, second, [0] * len(second)))


def corners(box: np.ndarray, height: int, width: int) -> tuple[int, int, int, int]:
    """First column and row of the pixels with centres in a box xyxy, and the ends; at least one of each."""
    x0, y0, x1, y1 = (math.ceil(value - 0.5) for value in box)
    x0, y0, x1, y1 = max(0, x0), max(0, y0), min(width, x1), min(height, y1)
    x0, y0 = min(x0, width - 1), min(y0, height - 1)
    return x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)


def filled(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool: the pixels with centres in a box; at least one."""
    mask = np.zeros((height, width), bool)
    x0, y0, x1, y1 = corners(box, height, width)
    mask[y0:y1, x0:x1] = True
    return mask


def ellipse(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) bool: pixels with centres in the ellipse that touches a box's sides; one at least, amid them."""
    y, x = np.ogrid[:height, :width]
    across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    half = np.maximum((box[2:] - box[:2]) / 2, 1e-6)
    inside = ((x + 0.5 - across) / half[0]) ** 2 + ((y + 0.5 - down) / half[1]) ** 2 < 1
    inside[min(max(int(down), 0), height - 1), min(max(int(across), 0), width - 1)] = True
    return inside


def without_overlaps(masks: np.ndarray, boxes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Masks (N, H, W) bool; of a class, a pixel belongs to the object in whose box it is most central.

    An object of which nothing would be left keeps what it had.
    """
    kept = masks.copy()
    y, x = np.ogrid[: masks.shape[1], : masks.shape[2]]
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        shared = masks[own].sum(0) > 1
        if not shared.any():
            continue
        nearest, owner = np.full(masks.shape[1:], np.inf), np.full(masks.shape[1:], -1)
        for index in own:
            x0, y0, x1, y1 = boxes[index]
            across, down = abs((2 * x + 1 - x0 - x1) / (x1 - x0)), abs((2 * y + 1 - y0 - y1) / (y1 - y0))
            distance = np.where(masks[index], np.maximum(across, down), np.inf)
            owner[distance < nearest] = index
            nearest = np.minimum(nearest, distance)
        for index in own:
            rest = masks[index] & (owner == index)
            kept[index] = rest if rest.any() else masks[index]
    return kept
