"""How much of its box a mask fills and how solid it is: what tells masks from mere outlines."""

import torch
from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.matched import Matched
from sim_m2f.supervision.reading import whole_masks


@torch.no_grad()
def mask_shapes(matched: Matched) -> dict[str, Tensor]:
    """Means of ``mask_fill`` and ``mask_solidity`` over the annotated objects, of the last layer's masks.

    Those of the parts of a batch add up to its own.
    """
    masks, counted = whole_masks(matched.predicted, matched.rows[-1]), matched.annotated.matched[-1].float()
    shapes = {"mask_fill": mask_fill(masks, matched.objects.box_masks), "mask_solidity": mask_solidity(masks)}
    number = at_least_one(matched.objects.numbers.annotated)
    return {name: (shape * counted).sum() / number for name, shape in shapes.items()}


@torch.no_grad()
def mask_fill(logits: Tensor, box_masks: Tensor) -> Tensor:
    """(T,): share of the box's pixels that are in the mask.

    Args:
        logits: (T, h, w) mask logits of T objects, stride 4.
        box_masks: (T, h, w), 1 inside the object's box, else 0.
    """
    inside = (logits > 0) * box_masks
    return inside.sum((1, 2)) / box_masks.sum((1, 2))


@torch.no_grad()
def mask_solidity(logits: Tensor) -> Tensor:
    """(T,): pixels of the mask, per pixel from the first to the last one of each row and of each column.

    1 for a convex mask of any size, little for an outline; the mean of rows and columns, 0 for an empty mask.

    Args:
        logits: (T, h, w) mask logits of T objects.
    """
    mask = logits > 0
    area = mask.sum((1, 2))
    return (area / _spanned(mask) + area / _spanned(mask.transpose(1, 2))) / 2


def _spanned(mask: Tensor) -> Tensor:
    """(T,): pixels from the first to the last True of every row (T, h, w); at least 1."""
    numbers = torch.arange(1, mask.shape[2] + 1, device=mask.device)
    last = (numbers * mask).amax(2)
    first = (numbers.flip(0) * mask).amax(2)  # counted from the end
    return ((last + first - mask.shape[2]) * (last > 0)).sum(1).clamp(min=1)
