"""The few places where ranks have to know of each other."""

import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without gradient; the tensor itself in a single process.

    A loss whose sum is divided by the mean of the ranks' numbers gives, after gradients are averaged over the
    ranks, the loss of the whole batch.
    """
    value = value.detach()
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value
