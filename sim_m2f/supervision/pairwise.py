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
    """-log P(same label) = softplus(a) + softplus(b) - softplus(a + b) of two logits, with its derivative
    sigmoid(a) - sigmoid(a + b) written out, so that nothing but the logits is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        softplus = torch.nn.functional.softplus
        return softplus(a) + softplus(b) - softplus(a + b)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        both = (a + b).sigmoid()
        return gradient * (a.sigmoid() - both), gradient * (b.sigmoid() - both)


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
    layers, objects, height, width = logits.shape
    pixels = box_pixels(targets, margin=dilation)
    columns, rows = (projection.bool() for projection in targets.projections)
    position = pixels.y * width + pixels.x
    first = (pixels.target * height * width) + position
    inside = _in_box(columns, rows, pixels.target, pixels.x, pixels.y)
    image = targets.image_index[pixels.target]
    flat_logits = logits.flatten(1)
    first_logits = flat_logits.index_select(1, first)

    sums = logits.new_zeros(layers, objects)
    numbers = logits.new_zeros(objects)
    for direction, (dy, dx) in enumerate(neighbour_offsets(dilation)):
        exists = edges[image, direction, pixels.y, pixels.x]
        other_inside = _in_box(columns, rows, pixels.target, pixels.x + dx, pixels.y + dy)
        weight = exists * (inside.to(logits.dtype) + other_inside)
        second = torch.where(exists, first + dy * width + dx, first)
        loss = SameLabel.apply(first_logits, flat_logits.index_select(1, second)) * weight
        sums = sums.index_add(1, pixels.target, loss)
        numbers = numbers.index_add(0, pixels.target, weight)
    return sums, numbers


def _in_box(columns: Tensor, rows: Tensor, target: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """(P,) bool: whether pixel (x, y) lies in the box of its object; False outside of the image."""
    height, width = rows.shape[1], columns.shape[1]
    in_image = (x >= 0) & (x < width) & (y < height)
    return in_image & columns[target, x.clamp(0, width - 1)] & rows[target, y.clamp(max=height - 1)]
