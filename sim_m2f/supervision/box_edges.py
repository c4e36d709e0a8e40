"""The edges between alike neighbours in the boxes, which the pairwise loss counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sim_m2f.supervision.affinity import neighbour_offsets
from sim_m2f.supervision.targets import Targets, box_pixels


@dataclass(frozen=True)
class BoxEdges:
    """Pairs of P pixels in and around the boxes and their D = 4 neighbours; places are t * h * w + y * w + x.

    Attributes:
        first: (P,) int64, the place of each pixel.
        second: (D, P) int64, those of its neighbours.
        weight: (D, P) float, how often the edge counts: 0, 1 or 2.
        target: (P,) int64, the object.
    """

    first: Tensor
    second: Tensor
    weight: Tensor
    target: Tensor


def box_edges(targets: Targets, edges: Tensor, dilation: int) -> BoxEdges:
    """The edges of the pixels of all boxes.

    An edge (i, j) to one of 8 neighbours counts for an object when i is in its box and ``edges`` has it;
    it counts twice, once from each end, when both lie in the box.

    Args:
        targets: the T objects.
        edges: (B, 4, h, w) bool, from each pixel to its four neighbours after it: alike, both ends usable.
        dilation: distance of the neighbours in pixels at stride 4.
    """
    height, width = targets.size
    pixels = box_pixels(targets, margin=dilation)
    columns, rows = (projection.bool() for projection in targets.projections)
    first = (pixels.target * height + pixels.y) * width + pixels.x
    inside = _in_box(columns, rows, pixels.target, pixels.x, pixels.y)
    image = targets.image_index[pixels.target]

    seconds, weights = [], []
    for direction, (dy, dx) in enumerate(neighbour_offsets(dilation)):
        exists = edges[image, direction, pixels.y, pixels.x]
        other_inside = _in_box(columns, rows, pixels.target, pixels.x + dx, pixels.y + dy)
        weights.append(exists * (inside.float() + other_inside))
        seconds.append(torch.where(exists, first + dy * width + dx, first))
    return BoxEdges(first, torch.stack(seconds), torch.stack(weights), pixels.target)


def _in_box(columns: Tensor, rows: Tensor, target: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(P,) bool: whether pixel (x, y) lies in the box of its object; False outside of the image."""
    height, width = rows.shape[1], columns.shape[1]
    in_image = (x >= 0) & (x < width) & (y < height)
    return in_image & columns[target, x.clamp(0, width - 1)] & rows[target, y.clamp(max=height - 1)]
