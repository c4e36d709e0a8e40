"""Pairwise loss: neighbours of like colour carry the same label (BoxInst, https://arxiv.org/abs/2012.02310)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sim_m2f.distributed import number_over_ranks
from sim_m2f.supervision.affinity import neighbour_offsets
from sim_m2f.supervision.losses import parts
from sim_m2f.supervision.matched import MatchedBoxes
from sim_m2f.supervision.targets import BoxPixels, Targets


def pairwise(matched: MatchedBoxes) -> Tensor:
    """The pairwise loss per counted edge, summed over the layers; less where the fill guard is at work."""
    supervision, match = matched.supervision, matched.by_box
    dilation = supervision.sim.PAIRWISE.DILATION
    where = matched.pixels, matched.objects, supervision.edges, dilation
    sums, numbers = pairwise_loss(matched.logits.pixels, *where)
    counted = number_over_ranks((numbers * match.matched).sum(1))
    sums = sums * match.matched
    if supervision.sim.FILL_GUARD.ENABLED:
        sums = sums * (1 - matched.deficit)
    return (sums.sum(1) / counted).sum()


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


def pairwise_loss(
    logits: Tensor, pixels: BoxPixels, targets: Targets, edges: Tensor, dilation: int
) -> tuple[Tensor, Tensor]:
    """Sum over the counted edges of -log P(same label), and their number.

    An edge (i, j) to one of 8 neighbours counts for an object when i is in its box and ``edges`` has it;
    it counts twice, once from each end, when both lie in the box.

    Args:
        logits: (L, P), stride 4: the matched mask of every object after every decoder layer, at the pixels.
        pixels: the P pixels of the boxes with ``dilation`` more on all sides.
        targets: the T objects.
        edges: (B, 4, h, w) bool, from each pixel to its four neighbours after it: alike, both ends usable.
        dilation: distance of the neighbours in pixels at stride 4.

    Returns:
        (L, T) sums and (T,) numbers.
    """
    target, x, y = pixels.target, pixels.x, pixels.y
    offsets = torch.tensor(neighbour_offsets(dilation)).to(x.device, non_blocking=True)
    dy, dx = offsets[:, :1], offsets[:, 1:]
    exists = edges[targets.image_index[target], :, y, x].T
    ends = targets.inside(target, x, y).byte() + targets.inside(target, x + dx, y + dy)
    weight = exists * ends
    way = (dy * pixels.columns + dx).int()
    sums = SameLabel.apply(logits, way, weight, target, len(targets))
    numbers = logits.new_zeros(len(targets)).index_add(0, target, weight.sum(0).to(logits.dtype))
    return sums, numbers
