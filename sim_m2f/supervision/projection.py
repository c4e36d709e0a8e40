"""Projection loss: a mask's extent along x and along y is the box's (BoxInst, https://arxiv.org/abs/2012.02310)."""

from torch import Tensor

from sim_m2f.supervision.losses import dice_loss
from sim_m2f.supervision.matched import MatchedBoxes, per_object


def projection(matched: MatchedBoxes) -> Tensor:
    """The projection loss per annotated object, summed over the layers."""
    logits = matched.logits
    loss = projection_loss(logits.along_x, logits.along_y, *matched.objects.projections)
    return per_object(loss, matched.by_box, matched.objects)


def projection_loss(along_x: Tensor, along_y: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """dice(max over rows of p, box columns) + dice(max over columns of p, box rows), p the probability.

    Args:
        along_x: (L, T, w), stride 4: the largest logit of every column of each object's mask, per layer.
        along_y: (L, T, h), likewise of every row.
        columns: (T, w), 1 on the columns of the box.
        rows: (T, h), 1 on the rows of the box.

    Returns:
        (L, T).
    """
    return dice_loss(along_x.sigmoid(), columns) + dice_loss(along_y.sigmoid(), rows)
