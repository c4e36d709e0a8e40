"""Dice and focal loss, each in one place, and how many pixels go through a loss together."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**21  # numbers that are computed together where a pixel has many, so that little else is in memory


def dice_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - 2 sum(ut) / (sum(u^2) + sum(t^2) + 1e-5) over the last dimension (V-Net, https://arxiv.org/abs/1606.04797).

    Args:
        prediction: (..., K) probabilities u.
        target: (..., K) t, 0 to 1.

    Returns:
        (...), 0 to 1.
    """
    overlap = (prediction * target).sum(-1)
    return 1 - 2 * overlap / ((prediction**2).sum(-1) + (target**2).sum(-1) + 1e-5)


def dice_cost(prediction: Tensor, target: Tensor) -> Tensor:
    """(L, B, Q, N): ``dice_loss`` of all pairs of (L, B, Q, K) probabilities and (B, N, K) targets."""
    overlap = torch.einsum("lbqk,bnk->lbqn", prediction, target)
    squares = (prediction**2).sum(-1)[..., None] + (target**2).sum(-1)[:, None]
    return 1 - 2 * overlap / (squares + 1e-5)


def linear_dice_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - (2 sum(ut) + 1) / (sum(u) + sum(t) + 1) over the last dimension (Mask2Former, from masks)."""
    return 1 - (2 * (prediction * target).sum(-1) + 1) / (prediction.sum(-1) + target.sum(-1) + 1)


def linear_dice_cost(prediction: Tensor, target: Tensor) -> Tensor:
    """(L, Q, N): ``linear_dice_loss`` of all pairs of (L, Q, P) probabilities and (N, P) targets."""
    total = prediction.sum(-1)[..., None] + target.sum(-1)
    return 1 - (2 * prediction @ target.T + 1) / (total + 1)


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t of each pixel (https://arxiv.org/abs/1708.02002).

    Args:
        logits: (..., P).
        labels: (..., P) int64, 1 for positive pixels; all others count as negative.
        alpha: weight of the positive pixels, 1 - alpha that of the negative ones.
        gamma: exponent.

    Returns:
        (..., P).
    """
    return _Focal.apply(logits, labels == 1, alpha, gamma)


class _Focal(torch.autograd.Function):
    """With its derivative written out, so that nothing but the logits is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
        ctx.save_for_backward(logits, positive)
        ctx.keys = alpha, gamma
        return _focal(logits, positive, alpha, gamma)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient * _focal_slope(*ctx.saved_tensors, *ctx.keys), None, None, None


class FocalSums(torch.autograd.Function):
    """Sums of the focal loss over groups of pixels, which are gathered once more for the backward pass.

    Takes logits (L, P), the places (N,) of N pixels among the P, each one's own, whether they are positive
    (N,), the group (N,) of each, the number G of groups, alpha and gamma; returns (L, G).
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        places: Tensor,
        positive: Tensor,
        group: Tensor,
        groups: int,
        *keys: float,
    ) -> Tensor:
        ctx.save_for_backward(logits, places, positive, group)
        ctx.keys = keys
        sums = logits.new_zeros(len(logits), groups)
        for part in parts(len(places), len(logits)):
            values = _focal(logits.index_select(1, places[part]), positive[part], *keys)
            sums.index_add_(1, group[part], values)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, places, positive, group = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for part in parts(len(places), len(logits)):
            slope = _focal_slope(logits.index_select(1, places[part]), positive[part], *ctx.keys)
            result.index_copy_(1, places[part], slope.mul_(gradient.index_select(1, group[part])))
        return result, None, None, None, None, None, None


def parts(length: int, width: int) -> Iterator[slice]:
    """Slices of so many pixels; together ``CHUNK`` numbers or fewer, of which each pixel has ``width``."""
    size = max(CHUNK // max(width, 1), 1)
    return (slice(start, start + size) for start in range(0, length, size))


def _focal(logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    against = torch.where(positive, -logits, logits)
    weight = torch.where(positive, alpha, 1 - alpha)
    return weight * against.sigmoid() ** gamma * F.softplus(against)


def _focal_slope(logits: Tensor, positive: Tensor, alpha: float, gamma: float) -> Tensor:
    """The derivative of ``_focal``."""
    against = torch.where(positive, -logits, logits)
    probability = against.sigmoid()
    slope = F.softplus(against).mul_(1 - probability).mul_(gamma).add_(probability)
    return slope.mul_(probability**gamma).mul_(torch.where(positive, -alpha, 1 - alpha))
