"""Boxes around masks, and how well boxes agree."""

import torch
from torch import Tensor


def boxes_of_profiles(along_x: Tensor, along_y: Tensor) -> Tensor:
    """The box around each mask, from its largest probability in every column (..., w) and row (..., h).

    Returns:
        (..., 4) xyxy in shares of the picture, from first to last column and row above one half; zeros
        for an empty mask.
    """
    (left, right), (top, bottom) = _extent(along_x), _extent(along_y)
    return torch.stack([left, top, right, bottom], dim=-1)


def _extent(profile: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position above one half in the last dimension, in shares of it; 0, 0 for none."""
    above = profile > 0.5
    length = profile.shape[-1]
    first = above.int().argmax(-1)
    end = length - above.flip(-1).int().argmax(-1)
    some = above.any(-1)
    return first * some / length, end * some / length


def overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of xyxy boxes, broadcast over the leading dimensions."""
    corners = torch.cat([torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1)
    overlap = _area(corners)
    return overlap, _area(a) + _area(b) - overlap


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes, broadcast; 0 for two empty boxes."""
    overlap, union = overlap_and_union(a, b)
    return overlap / union.clamp(min=1e-6)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of xyxy boxes, broadcast (https://arxiv.org/abs/1902.09630)."""
    overlap, union = overlap_and_union(a, b)
    hull = _area(
        torch.cat([torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1)
    )
    return overlap / union.clamp(min=1e-6) - (hull - union) / hull.clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
