"""Projection loss: a mask's extent along x and along y is the box's (BoxInst, https://arxiv.org/abs/2012.02310)."""

from torch import Tensor

from sim_m2f.supervision.losses import dice_loss
from sim_m2f.supervision.matched import MatchedBoxes, per_object


def projection(matched: MatchedBoxes) -> Tensor:
    """The projection loss per annotated object, summed over the layers."""
    loss = projection_loss(matched.masks, *matched.objects.projections)
    return per_object(loss, matched.by_box, matched.objects)


def projection_loss(logits: Tensor, columns: Tensor, rows: Tensor) -> Tensor:
    """dice(max over rows of p, box columns) + dice(max over columns of p, box rows), p = sigmoid(logits).

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        columns: (T, w), 1 on the columns of the box.
        rows: (T, h), 1 on the rows of the box.

    Returns:
        (L, T).
    """
    along_x = logits.amax(-2).sigmoid()
    along_y = logits.amax(-1).sigmoid()
    return dice_loss(along_x, columns) + dice_loss(along_y, rows)
