"""Prototypes: a few unit vectors per class in the space of the mask features (SIM, section 3.2).

Optimal transport assigns pixels to them. The pixels of all classes are one flat list; what belongs to a class
is summed by its number, without a loop over classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.distributed import max_over_ranks, sum_over_ranks


class Prototypes(nn.Module):
    """L unit vectors per class, following the centroids of the pixels that optimal transport assigns to them.

    ``vectors`` are (C, L, d).

    Args:
        classes: C.
        width: d, of the mask features.
        keys: MODEL.SIM.PROTOTYPES.
    """

    vectors: Tensor

    def __init__(self, classes: int, width: int, keys: CfgNode) -> None:
        super().__init__()
        self.keys = keys
        self.register_buffer("vectors", F.normalize(torch.randn(classes, keys.COUNT, width), dim=-1))

    def counts(self, labels: Tensor, images: Tensor, number: int, confident: Tensor) -> Tensor:
        """(B, C): the confident pixels of each of ``number`` images by class; see ``sample``."""
        group = images * len(self.vectors) + labels
        empty = torch.zeros(number * len(self.vectors), device=labels.device)
        return empty.index_add(0, group, confident.float()).view(number, -1)

    def sample(
        self, labels: Tensor, images: Tensor, confident: Tensor, keys: Tensor, shares: Tensor, present: int
    ) -> tuple[Tensor, Tensor]:
        """The pixels that an update takes: of a class, as many of each image as its share of all images' is.

        Args:
            labels: (N,) int64, the classes of the pixels' objects.
            images: (N,) int64, the pixels' images, of B.
            confident: (N,) bool, whether the pixel surely belongs to its object; only these count.
            keys: (N,) random numbers, from 0 to 1; of an image's pixels of a class, those of the least count.
            shares: (B, C) of the images in all confident pixels of a class.
            present: how many classes there are among the labels.

        Returns:
            (M,) indices and (M,) classes, C for a place that is left over: M is known without asking the
            device.
        """
        classes, limit = len(self.vectors), self.keys.PIXELS_PER_CLASS
        group = torch.where(confident, images * classes + labels, shares.numel())
        limits = F.pad((limit * shares).round().flatten(), (0, 1))
        index, taken = sample_per_group(group, keys, limits)
        first = (~taken).int().argsort(stable=True)[: present * (limit + len(shares))]
        return index[first], torch.where(taken, labels[index], classes)[first]

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Move the prototypes towards the centroids of their pixels; one that received none stays.

        It computes in float64, so that sums over ranks do not depend on their order.

        Args:
            features: (N, d) the teacher's features of N pixels, of any length.
            labels: (N,) int64, the classes of their objects; a pixel of class C does not count.
        """
        features = F.normalize(features.double(), dim=-1)
        classes, count, width = self.vectors.shape
        vectors = F.pad(self.vectors.double(), (0, 0, 0, 0, 0, 1))  # and those of class C
        scores = torch.einsum("nd,nld->nl", features, vectors[labels])
        plan = sinkhorn(scores, labels, classes + 1, self.keys.EPSILON, self.keys.ITERATIONS)
        slot = labels * count + plan.argmax(1)
        slots = (classes + 1) * count
        sums = sum_over_ranks(features.new_zeros(slots, width).index_add(0, slot, features))
        numbers = sum_over_ranks(features.new_zeros(slots).index_add(0, slot, features.new_ones(len(slot))))
        sums, numbers = (total.view(classes + 1, count, -1)[:-1] for total in (sums, numbers))
        momentum = self.keys.MOMENTUM
        centroid = sums / numbers.clamp(min=1)
        moved = F.normalize(momentum * self.vectors + (1 - momentum) * centroid, dim=-1)
        self.vectors.copy_(torch.where(numbers > 0, moved, self.vectors.double()))

    @torch.no_grad()
    def similarity(self, features: Tensor, label: int) -> Tensor:
        """(N,): the largest inner product of each unit feature with the prototypes of a class, -1 to 1.

        ``features`` are (N, d), of any length.
        """
        return (F.normalize(features.float(), dim=-1) @ self.vectors[label].T).amax(1)


def sample_per_group(group: Tensor, keys: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Of every group the pixels with the least keys, so many at most.

    Args:
        group: (N,) int64, 0 to G-1.
        keys: (N,) from 0 to 1.
        limits: (G,) most of each group.

    Returns:
        (N,) indices of all pixels in another order, and (N,) bool, which of them are drawn.
    """
    order = (group + keys.double()).argsort(stable=True)
    group = group[order]
    place = torch.arange(len(group), device=group.device) - torch.searchsorted(group, group)
    return order, place < limits[group]


def sinkhorn(scores: Tensor, labels: Tensor, classes: int, epsilon: float, iterations: int) -> Tensor:
    """Entropic optimal transport of every class's pixels to its prototypes, in the log domain.

    Per class, max over Q of Tr(Q^T S) + epsilon H(Q), with the same mass on each of the L prototypes and on
    each of the class's pixels; the pixels of all ranks count.

    Args:
        scores: (N, L), inner product of each pixel with the prototypes of its class.
        labels: (N,) int64, class of each pixel.
        classes: C.
        epsilon: weight of the entropy.
        iterations: of the alternating normalisation, that of the pixels coming last.

    Returns:
        (N, L) log Q: a row of Q sums to 1 / N_c, a column, over the N_c pixels of a class, to 1 / L once
        converged.
    """
    count = scores.shape[1]
    pixels = sum_over_ranks(scores.new_zeros(classes).index_add(0, labels, scores.new_ones(len(labels))))
    log_pixels = pixels.clamp(min=1).log()[labels][:, None]
    plan = scores / epsilon
    for _ in range(iterations):
        plan = plan - _logsumexp_per_class(plan, labels, classes)[labels] - math.log(count)
        plan = plan - plan.logsumexp(1, keepdim=True) - log_pixels
    return plan


def _logsumexp_per_class(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(N, L) to (C, L): log of the sum of exp over the pixels of a class on all ranks."""
    index = labels[:, None].expand_as(values)
    lowest = values.new_full((classes, values.shape[1]), -torch.inf)
    largest = max_over_ranks(lowest.scatter_reduce(0, index, values, "amax"))
    sums = torch.zeros_like(largest).index_add(0, labels, (values - largest[labels]).exp())
    return largest + sum_over_ranks(sums).log()
