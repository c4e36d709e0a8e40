"""Gradients of images and ranks added up in float64, where the order of the additions does not show."""

from collections.abc import Iterable

import torch
from torch import nn

from sim_m2f.distributed import mean_over_ranks


class GradientSum:
    """Collects what backward passes leave in the parameters, and leaves there what all ranks have collected.

    Float32 gradients of one magnitude add up in float64 without rounding, so that the sum, in float32 again,
    is the same for any number of ranks, as long as what is added is.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.sums = [torch.zeros_like(each, dtype=torch.float64) for each in self.parameters]

    def collect(self) -> None:
        """Add the gradients to the sums and set them to zero; one that is missing is zero."""
        gradients = [parameter.grad for parameter in self.parameters]
        for total, gradient in zip(self.sums, gradients, strict=True):
            if gradient is not None:
                total += gradient
                gradient.zero_()

    def give(self) -> None:
        """Replace the gradients by the ranks' mean of the sums."""
        flat = mean_over_ranks(torch.cat([total.flatten() for total in self.sums]))
        parts = flat.split([total.numel() for total in self.sums])
        for parameter, part in zip(self.parameters, parts, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))
