"""Pairwise loss: neighbours of like colour carry the same label (BoxInst, https://arxiv.org/abs/2012.02310)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.box_edges import BoxEdges
from sim_m2f.supervision.losses import parts
from sim_m2f.supervision.matched import MatchedBoxes


def pairwise(matched: MatchedBoxes) -> Tensor:
    """The pairwise loss per counted edge, summed over the layers; less where the fill guard is at work."""
    supervision, target = matched.supervision, matched.pixels.target
    assert supervision.edges is not None
    sums = pairwise_loss(matched.logits.pixels, supervision.edges, target, len(matched.objects))
    sums = sums * matched.by_box.matched
    if supervision.sim.FILL_GUARD.ENABLED:
        sums = sums * (1 - matched.deficit)
    return sums.sum() / at_least_one(matched.objects.numbers.edges)


class SameLabel(torch.autograd.Function):
    """Sums of -log P(same label) = softplus(a) + softplus(b) - softplus(a + b) of pairs of logits.

    The derivative sigmoid(a) - sigmoid(a + b) is written out and the pairs are gathered once more for it, so
    that nothing is kept for the backward pass but the logits; ``parts`` of the pixels go together.

    Takes logits (L, P), the way (D, P) from each pixel to the D others that it is paired with, weights
    (D, P), the object (P,) of each pixel, and the number T of objects; returns (L, T).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, way: Tensor, weight: Tensor, target: Tensor, objects: int
    ) -> Tensor:
        ctx.save_for_backward(logits, way, weight, target)
        sums = logits.new_zeros(len(logits), objects)
        for part, there in _others(logits, way):
            a, b = logits[:, None, part], _gathered(logits, there)
            loss = softplus(b).add_(softplus(a)).sub_(softplus(b.add_(a)))
            sums.index_add_(1, target[part], loss.mul_(weight[:, part]).sum(1))
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, way, weight, target = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for part, there in _others(logits, way):
            a, b = logits[:, None, part], _gathered(logits, there)
            both, each = (a + b).sigmoid_(), gradient[:, None, target[part]] * weight[:, part]
            result[:, part] += (a.sigmoid() - both).mul_(each).sum(1)
            result.index_add_(1, there.flatten(), b.sigmoid_().sub_(both).mul_(each).flatten(1))
        return result, None, None, None, None


def _gathered(logits: Tensor, places: Tensor) -> Tensor:
    """(L, D, p): logits (L, P) at places (D, p)."""
    return logits.index_select(1, places.flatten()).unflatten(1, places.shape)


def _others(logits: Tensor, way: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the pixels (L, P), each with the other pixels (D, p) of its pairs.

    A way that leads out of the pixels ends at the first or the last: the pair's weight is 0.
    """
    last = logits.shape[1] - 1
    for part in parts(logits.shape[1], len(logits) * len(way)):
        here = torch.arange(part.start, min(part.stop, last + 1), device=logits.device)
        yield part, (here + way[:, part]).clamp_(0, last)


def pairwise_loss(logits: Tensor, edges: BoxEdges, target: Tensor, objects: int) -> Tensor:
    """(L, T): sum over an object's counted edges of -log P(same label).

    Args:
        logits: (L, P), stride 4: the matched mask of every object after every decoder layer, at P pixels.
        edges: of the P pixels.
        target: (P,) int64, their objects.
        objects: T.
    """
    return SameLabel.apply(logits, edges.way, edges.weight, target, objects)
