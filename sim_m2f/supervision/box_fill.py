"""A loss towards the filled box for the first steps from scratch: it tells queries where their object is."""

import torch.nn.functional as F
from torch import Tensor

from sim_m2f.supervision.losses import dice_loss
from sim_m2f.supervision.matched import MatchedBoxes, per_object
from sim_m2f.supervision.reading import recomputed


def box_fill(matched: MatchedBoxes) -> Tensor:
    """The loss towards the filled box per annotated object, summed over the layers."""
    return per_object(fill_losses(matched), matched.by_box, matched.objects)


def fill_losses(matched: MatchedBoxes) -> Tensor:
    """(L, T): ``box_fill_loss`` of each object's mask."""
    boxes = matched.objects.box_masks
    return recomputed(lambda masks: box_fill_loss(masks, boxes), matched.predicted, matched.rows)


def box_fill_loss(logits: Tensor, box_masks: Tensor) -> Tensor:
    """dice(p, b) + mean over the image of the binary cross-entropy towards b.

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        box_masks: (T, h, w), 1 inside the box.

    Returns:
        (L, T).
    """
    filled = box_masks.expand_as(logits)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, filled, reduction="none").mean((-2, -1))
    return dice_loss(logits.sigmoid().flatten(2), filled.flatten(2)) + cross_entropy
