"""The extent of masks, boxes around them, and how well boxes agree."""

import torch
from torch import Tensor

STEP = 0.25  # logits by which masks rise at a time to span their boxes


def extent(filled: Tensor) -> tuple[Tensor, Tensor]:
    """First and past-the-last True of the last dimension of (..., n), int64; 0, 0 where there is none."""
    length = filled.shape[-1]
    some = filled.any(-1)
    first = filled.int().argmax(-1)
    end = length - filled.flip(-1).int().argmax(-1)
    return first * some, end * some


def mask_extents(masks: Tensor) -> Tensor:
    """(..., 4) int64: first column and row, last column and row + 1, of masks (..., h, w); zeros if empty."""
    (left, right), (top, bottom) = extent(masks.any(-2)), extent(masks.any(-1))
    return torch.stack([left, top, right, bottom], dim=-1)


def projection_boxes(along_x: Tensor, along_y: Tensor) -> Tensor:
    """The box around each mask, from its largest probability in every column (..., w) and row (..., h).

    Returns:
        (..., 4) xyxy in shares of the image, from first to last column and row above one half; zeros
        for an empty mask.
    """
    (left, right), (top, bottom) = extent(along_x > 0.5), extent(along_y > 0.5)
    width, height = along_x.shape[-1], along_y.shape[-1]
    return torch.stack([left / width, top / height, right / width, bottom / height], dim=-1)


def missing_logits(along_x: Tensor, along_y: Tensor, areas: Tensor, share: float, most: float) -> Tensor:
    """(N,): the least that the logits of each mask have to rise by, all alike, until it spans its box.

    Annotated boxes touch their objects on all sides (tightness, https://arxiv.org/abs/1912.04363), so a mask
    that leaves much of its box's width or height empty is too small.

    Args:
        along_x: (N, w) each column's largest logit in the box, -inf outside of it.
        along_y: (N, h) each row's.
        areas: (N,) of the boxes, in pixels.
        share: of its area that the box around the mask has to cover.
        most: how far masks rise that span too little even then.
    """
    rises = torch.arange(0, most + STEP, STEP, device=along_x.device)[:, None, None]
    (left, right), (top, bottom) = extent(along_x + rises > 0), extent(along_y + rises > 0)
    enough = (right - left) * (bottom - top) >= share * areas
    enough[-1] = True
    return rises[enough.int().argmax(0), 0, 0]


def overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of xyxy boxes, broadcast over the leading dimensions."""
    overlap = _area(torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:]))
    areas = [_area(boxes[..., :2], boxes[..., 2:]) for boxes in (a, b)]
    return overlap, areas[0] + areas[1] - overlap


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes, broadcast; 0 for two empty boxes."""
    overlap, union = overlap_and_union(a, b)
    return overlap / union.clamp(min=1e-6)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of xyxy boxes, broadcast (https://arxiv.org/abs/1902.09630)."""
    overlap, union = overlap_and_union(a, b)
    hull = _area(torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:]))
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def _area(first: Tensor, last: Tensor) -> Tensor:
    return (last - first).clamp(min=0).prod(-1)
