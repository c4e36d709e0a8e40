"""How well the colours of an object and of its surroundings explain a pixel: two histograms per object."""

import torch
from torch import Tensor

BINS = (24, 16, 16)  # of L, a and b, over SPAN standard deviations of the object's pixels around their mean
SPAN = 4.0
LEAST_DEVIATION = 3.0  # in units of CIELAB, so that noise is not told apart
LEAST = 1e-4  # probability of a colour that a region does not have
MOST = 3.0  # largest logarithm of the ratio of two probabilities


def color_bins(lab: Tensor, counts: Tensor, target: Tensor, objects: int) -> Tensor:
    """(P,) int64: the bins of CIELAB colours, finer where those of an object's pixels are more alike.

    Args:
        lab: (P, 3).
        counts: (P,) bool, pixels that say how wide the bins are.
        target: (P,) int64, the object of each pixel.
        objects: T.
    """
    weight = counts[:, None].to(lab.dtype)
    empty = lab.new_zeros(objects, 3)
    number = empty[:, :1].index_add(0, target, weight).clamp(min=1)
    mean = empty.index_add(0, target, lab * weight) / number
    away = lab - mean[target]
    deviation = (empty.index_add(0, target, away**2 * weight) / number).sqrt().clamp(min=LEAST_DEVIATION)
    bins = torch.tensor(BINS).to(lab.device, non_blocking=True)
    place = ((away / deviation[target] / SPAN + 0.5) * bins).long().clamp(min=0).minimum(bins - 1)
    return (place[:, 0] * BINS[1] + place[:, 1]) * BINS[2] + place[:, 2]


def log_ratio(color: Tensor, mask: Tensor, counts: Tensor, target: Tensor, objects: int) -> Tensor:
    """(P,): log(P(colour | mask) / P(colour | rest)) at each pixel, at most MOST either way.

    Args:
        color: (P,) int64 bins.
        mask: (P,) probability that the pixel belongs to its object.
        counts: (P,) bool, pixels that the histograms are made of.
        target: (P,) int64 its object.
        objects: T.
    """
    size = BINS[0] * BINS[1] * BINS[2]
    place = target * size + color
    parts = torch.stack([mask, 1 - mask]) * counts
    histograms = parts.new_zeros(2, objects * size).index_add(1, place, parts)
    histograms = _smoothed(histograms.view(2 * objects, *BINS)).view(2, objects, size)
    shares = histograms / histograms.sum(-1, keepdim=True).clamp(min=1e-6) + LEAST
    return (shares[0] / shares[1]).log().flatten()[place].clamp(-MOST, MOST)


def _smoothed(histograms: Tensor) -> Tensor:
    """(N, L, a, b): each bin's mean with its neighbours along every axis, weights 1, 2, 1."""
    for axis in (1, 2, 3):
        last = histograms.shape[axis] - 1
        before = torch.cat([histograms.narrow(axis, 0, 1), histograms.narrow(axis, 0, last)], dim=axis)
        after = torch.cat([histograms.narrow(axis, 1, last), histograms.narrow(axis, last, 1)], dim=axis)
        histograms = (before + after) / 4 + histograms / 2
    return histograms
