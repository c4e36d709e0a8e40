"""How far the logits of masks have to rise until the masks span their boxes.

Annotated boxes touch their objects on all sides (tightness, https://arxiv.org/abs/1912.04363), so a mask that
leaves much of its box's width or height empty is too small.
"""

import torch
from torch import Tensor

from sim_m2f.geometry import extent
from sim_m2f.supervision.targets import BoxPixels, Targets

MOST = 4.0  # logits rise by so much
STEPS = 16  # and by so many equal steps


def missing_logits(logits: Tensor, pixels: BoxPixels, targets: Targets, share: float) -> Tensor:
    """(T,): the least number of steps of MOST / STEPS, in logits, after which a mask's box is large enough.

    Args:
        logits: (P,) of the pixels, -inf where they cannot belong to their object.
        pixels: the P pixels, which include those of the boxes.
        targets: the T objects, of the pixels' stride.
        share: of the annotated box that the box around the mask has to cover.
    """
    height, width = targets.size
    rises = torch.linspace(0, MOST, STEPS + 1, device=logits.device)[:, None, None]
    sides = []
    for place, length in ((pixels.x, width), (pixels.y, height)):
        largest = logits.new_full((len(targets) * length,), -torch.inf)
        largest.scatter_reduce_(0, pixels.target * length + place, logits, "amax")
        first, end = extent(largest.view(-1, length) + rises > 0)
        sides.append(end - first)
    areas = (targets.device_ranges[:, 2:] - targets.device_ranges[:, :2]).prod(1)
    enough = sides[0] * sides[1] >= share * areas
    enough[-1] = True
    return rises[enough.int().argmax(0), 0, 0]
