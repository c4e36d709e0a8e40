"""Projection loss: a mask's extent along x and along y is the box's (BoxInst, https://arxiv.org/abs/2012.02310)."""

from torch import Tensor


def dice_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - 2 sum(ut) / (sum(u^2) + sum(t^2) + 1e-5) over the last dimension, probabilities in and 0..1 out."""
    overlap = (prediction * target).sum(-1)
    return 1 - 2 * overlap / ((prediction**2).sum(-1) + (target**2).sum(-1) + 1e-5)


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
