"""Projection loss: a mask's extent along x and along y is the box's (BoxInst, https://arxiv.org/abs/2012.02310)."""

from typing import Any

import torch
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
    along_x, along_y = _Profiles.apply(logits)
    return dice_loss(along_x.sigmoid(), columns) + dice_loss(along_y.sigmoid(), rows)


class _Profiles(torch.autograd.Function):
    """The largest value of every column and of every row of maps (..., h, w), with one gradient of the maps.

    As with ``amax``, equal largest values share the gradient.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> tuple[Tensor, Tensor]:
        along_x, along_y = maps.amax(-2), maps.amax(-1)
        ctx.save_for_backward(maps, along_x, along_y)
        return along_x, along_y

    @staticmethod
    def backward(ctx: Any, gradient_x: Tensor, gradient_y: Tensor) -> Tensor:
        maps, along_x, along_y = ctx.saved_tensors
        largest = maps == along_x[..., None, :]
        result = largest * (gradient_x / largest.sum(-2))[..., None, :]
        largest = maps == along_y[..., None]
        return result.addcmul_(largest, (gradient_y / largest.sum(-1))[..., None])
