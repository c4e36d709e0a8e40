"""Pairwise loss: neighbours of like colour carry the same label (BoxInst, https://arxiv.org/abs/2012.02310)."""

from typing import Any

import torch
from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.box_edges import BoxEdges
from sim_m2f.supervision.matched import MatchedBoxes


def pairwise(matched: MatchedBoxes) -> Tensor:
    """The pairwise loss per counted edge, summed over the layers; less where the fill guard is at work."""
    supervision = matched.supervision
    assert supervision.edges is not None
    sums = pairwise_loss(matched.masks, supervision.edges) * matched.by_box.matched
    if supervision.sim.FILL_GUARD.ENABLED:
        sums = sums * (1 - matched.deficit)
    return sums.sum() / at_least_one(matched.objects.numbers.edges)


class SameLabel(torch.autograd.Function):
    """Sums of -log P(same label) = softplus(a) + softplus(b) - softplus(a + b) of pairs of logits.

    The derivative sigmoid(a) - sigmoid(a + b) is written out and the pairs are gathered once more for it, so
    that nothing is kept for the backward pass but the masks, and all pairs share one gradient of them.

    Takes logits (L, S) of S places, the first places (P,) of D x P pairs, the second (D, P), weights (D, P),
    the object (P,) of each first place, and the number T of objects; returns (L, T).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, first: Tensor, second: Tensor, weight: Tensor, target: Tensor, objects: int
    ) -> Tensor:
        ctx.save_for_backward(logits, first, second, weight, target)
        softplus = torch.nn.functional.softplus
        sums, a = logits.new_zeros(len(logits), objects), logits.index_select(1, first)
        for place, share in zip(second, weight, strict=True):
            b = logits.index_select(1, place)
            loss = softplus(a).add_(softplus(b)).sub_(softplus(b.add_(a)))
            sums.index_add_(1, target, loss.mul_(share))
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, first, second, weight, target = ctx.saved_tensors
        result, a = torch.zeros_like(logits), logits.index_select(1, first)
        for place, share in zip(second, weight, strict=True):
            b = logits.index_select(1, place)
            both = (a + b).sigmoid_()
            each = gradient.index_select(1, target).mul_(share)
            result.index_add_(1, place, b.sigmoid_().sub_(both).mul_(each))
            result.index_add_(1, first, a.sigmoid().sub_(both).mul_(each))
        return result, None, None, None, None, None


def pairwise_loss(logits: Tensor, edges: BoxEdges) -> Tensor:
    """(L, T): sum over an object's counted edges of -log P(same label).

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        edges: of the pixels of the T objects.
    """
    pairs = edges.first, edges.second, edges.weight, edges.target
    return SameLabel.apply(logits.flatten(1), *pairs, logits.shape[1])
