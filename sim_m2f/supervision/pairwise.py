"""Pairwise loss: neighbours of like colour carry the same label (BoxInst, https://arxiv.org/abs/2012.02310)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from sim_m2f.distributed import number_over_ranks
from sim_m2f.supervision.affinity import neighbour_offsets
from sim_m2f.supervision.matched import MatchedBoxes
from sim_m2f.supervision.targets import BoxPixels, Targets

CHUNK = 2**22  # pairs of logits that are compared together


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
    that nothing is kept for the backward pass but the logits. As many pixels go together as ``CHUNK`` allows.

    Takes logits (L, P), the other pixels (D, P) of the D pairs of each, weights (D, P), the object (P,) of
    each pixel, and the number T of objects; returns (L, T).
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, other: Tensor, weight: Tensor, target: Tensor, objects: int
    ) -> Tensor:
        ctx.save_for_backward(logits, other, weight, target)
        sums = logits.new_zeros(len(logits), objects)
        for part, there, share in _parts(logits, other, weight):
            a, b = logits[:, None, part], logits[:, there]
            loss = softplus(b).add_(softplus(a)).sub_(softplus(b.add_(a)))
            sums.index_add_(1, target[part], loss.mul_(share).sum(1))
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, other, weight, target = ctx.saved_tensors
        result = torch.zeros_like(logits)
        for part, there, share in _parts(logits, other, weight):
            a, b = logits[:, None, part], logits[:, there]
            both, each = (a + b).sigmoid_(), gradient[:, None, target[part]] * share
            result[:, part] += (a.sigmoid() - both).mul_(each).sum(1)
            result.index_add_(1, there.flatten(), b.sigmoid_().sub_(both).mul_(each).flatten(1))
        return result, None, None, None, None


def _parts(logits: Tensor, other: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the pixels, each with its other pixels and their weights, ``CHUNK`` pairs or fewer."""
    size = max(CHUNK // (len(logits) * len(other)), 1)
    for start in range(0, logits.shape[1], size):
        part = slice(start, start + size)
        yield part, other[:, part], weight[:, part]


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
    ends = targets.inside(target, x, y).to(logits.dtype) + targets.inside(target, x + dx, y + dy)
    weight = exists * ends
    # where the weight is 0 the other end may lie beyond the pixels: any other one serves
    there = torch.arange(len(x), device=x.device) + dy * pixels.columns + dx
    there = there.clamp_(0, max(len(x) - 1, 0))
    sums = SameLabel.apply(logits, there, weight, target, len(targets))
    return sums, logits.new_zeros(len(targets)).index_add(0, target, weight.sum(0))
