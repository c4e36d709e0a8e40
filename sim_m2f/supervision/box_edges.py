"""The edges between alike neighbours in the boxes, which the pairwise loss counts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sim_m2f.supervision.affinity import neighbour_offsets
from sim_m2f.supervision.targets import BoxPixels, Targets


@dataclass(frozen=True)
class BoxEdges:
    """Pairs of P pixels in and around the boxes and their D = 4 neighbours after them.

    Attributes:
        way: (D, P) int32, how many places on among the P pixels each neighbour is; one that is not there may
            be anywhere.
        weight: (D, P) uint8, how often the edge counts: 0, 1 or 2.
    """

    way: Tensor
    weight: Tensor


def box_edges(pixels: BoxPixels, targets: Targets, edges: Tensor, dilation: int) -> BoxEdges:
    """The edges of the pixels of all boxes.

    An edge (i, j) to one of 8 neighbours counts for an object when i is in its box and ``edges`` has it;
    it counts twice, once from each end, when both lie in the box.

    Args:
        pixels: the P pixels of the boxes with ``dilation`` more on all sides.
        targets: the T objects.
        edges: (B, 4, h, w) bool, from each pixel to its four neighbours after it: alike, both ends usable.
        dilation: distance of the neighbours in pixels at stride 4.
    """
    target, x, y = pixels.target, pixels.x, pixels.y
    offsets = torch.tensor(neighbour_offsets(dilation)).to(x.device, non_blocking=True)
    dy, dx = offsets[:, :1], offsets[:, 1:]
    exists = edges[targets.image_index[target], :, y, x].T
    ends = targets.inside(target, x, y).byte() + targets.inside(target, x + dx, y + dy)
    return BoxEdges((dy * pixels.columns + dx).int(), exists * ends)
