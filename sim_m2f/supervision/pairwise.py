"""Pairwise loss: neighbours of like colour carry the same label (BoxInst, https://arxiv.org/abs/2012.02310)."""

from typing import Any

import torch
from torch import Tensor

from sim_m2f.distributed import number_over_ranks
from sim_m2f.supervision.affinity import neighbour_offsets
from sim_m2f.supervision.matched import MatchedBoxes
from sim_m2f.supervision.targets import Targets, box_pixels


def pairwise(matched: MatchedBoxes) -> Tensor:
    """The pairwise loss per counted edge, summed over the layers; less where the fill guard is at work."""
    supervision, match = matched.supervision, matched.by_box
    dilation = supervision.sim.PAIRWISE.DILATION
    sums, numbers = pairwise_loss(matched.masks, matched.objects, supervision.edges, dilation)
    counted = number_over_ranks((numbers * match.matched).sum(1))
    sums = sums * match.matched
    if supervision.sim.FILL_GUARD.ENABLED:
        sums = sums * (1 - matched.deficit)
    return (sums.sum(1) / counted).sum()


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


def pairwise_loss(logits: Tensor, targets: Targets, edges: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Sum over the counted edges of -log P(same label), and their number.

    An edge (i, j) to one of 8 neighbours counts for an object when i is in its box and ``edges`` has it;
    it counts twice, once from each end, when both lie in the box.

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        targets: the T objects.
        edges: (B, 4, h, w) bool, from each pixel to its four neighbours after it: alike, both ends usable.
        dilation: distance of the neighbours in pixels at stride 4.

    Returns:
        (L, T) sums and (T,) numbers.
    """
    _, objects, height, width = logits.shape
    pixels = box_pixels(targets, margin=dilation)
    columns, rows = (projection.bool() for projection in targets.projections)
    position = pixels.y * width + pixels.x
    first = (pixels.target * height * width) + position
    inside = _in_box(columns, rows, pixels.target, pixels.x, pixels.y)
    image = targets.image_index[pixels.target]

    seconds, weights = [], []
    for direction, (dy, dx) in enumerate(neighbour_offsets(dilation)):
        exists = edges[image, direction, pixels.y, pixels.x]
        other_inside = _in_box(columns, rows, pixels.target, pixels.x + dx, pixels.y + dy)
        weights.append(exists * (inside.to(logits.dtype) + other_inside))
        seconds.append(torch.where(exists, first + dy * width + dx, first))
    weight = torch.stack(weights)
    pairs = first, torch.stack(seconds), weight, pixels.target
    sums = SameLabel.apply(logits.flatten(1), *pairs, objects)
    return sums, logits.new_zeros(objects).index_add(0, pixels.target, weight.sum(0))


def _in_box(columns: Tensor, rows: Tensor, target: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(P,) bool: whether pixel (x, y) lies in the box of its object; False outside of the image."""
    height, width = rows.shape[1], columns.shape[1]
    in_image = (x >= 0) & (x < width) & (y < height)
    return in_image & columns[target, x.clamp(0, width - 1)] & rows[target, y.clamp(max=height - 1)]
