"""The few places where ranks have to know of each other; in a single process each returns its argument."""

import torch.distributed as dist
from torch import Tensor


def is_first_rank() -> bool:
    """Whether this process is rank 0, which speaks for all."""
    return not _distributed() or dist.get_rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.SUM)


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest value over all ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.MAX)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without gradient.

    A loss whose sum is divided by the mean of the ranks' numbers gives, after gradients are averaged over the
    ranks, the loss of the whole batch.
    """
    return sum_over_ranks(value) / (dist.get_world_size() if _distributed() else 1)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(value: Tensor, operation: dist.ReduceOp) -> Tensor:
    value = value.detach()
    if _distributed():
        value = value.clone()
        dist.all_reduce(value, operation)
    return value
