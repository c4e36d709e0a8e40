"""The few places where ranks have to know of each other; in a single process each returns its argument."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def is_first_rank() -> bool:
    """Whether this process is rank 0, which speaks for all."""
    return not _distributed() or dist.get_rank() == 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.SUM)


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest value over all ranks, without gradient."""
    return _reduced(value, dist.ReduceOp.MAX)


def largest_number(number: int) -> int:
    """The largest of the ranks' numbers, asked for by way of the CPUs: nobody waits for a GPU."""
    if not _distributed():
        return number
    value = torch.tensor(number)
    dist.all_reduce(value, dist.ReduceOp.MAX, _group_of_cpus())
    return int(value)


def leave_group() -> None:
    """End this rank's part in the group; threads that are left to the interpreter's exit may abort it."""
    if _distributed():
        _group_of_cpus.cache_clear()
        _group_of_node.cache_clear()
        dist.destroy_process_group()


@functools.cache
def _group_of_cpus() -> Any:
    return dist.new_group(backend="gloo")


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of a tensor over all ranks, without gradient.

    A loss whose sum is divided by the mean of the ranks' numbers gives, after gradients are averaged over the
    ranks, the loss of the whole batch.
    """
    return sum_over_ranks(value) / ranks()


def at_least_one(number: Tensor) -> Tensor:
    """A mean over ranks to divide by: where there is none at all, that of a single one."""
    return number.clamp(min=1 / ranks())


def ranks() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _distributed() else 1


def share(number: int, rank: int, ranks: int) -> range:
    """Which of ``number`` things are a rank's: all ranks have as many, or one more."""
    return range(rank * number // ranks, (rank + 1) * number // ranks)


def from_all_ranks(note: Any, tensors: Sequence[Tensor]) -> list[tuple[Any, list[Tensor]]]:
    """Every rank's note and tensors on all ranks.

    The tensors' shapes may differ, not their types. Shapes and notes travel by way of the CPUs.
    """
    if not _distributed():
        return [(note, list(tensors))]
    notes: list[Any] = [None] * ranks()
    dist.all_gather_object(notes, (note, [tensor.shape for tensor in tensors]), _group_of_cpus())
    received = []
    for rank, (said, shapes) in enumerate(notes):
        if rank == dist.get_rank():
            copies = [tensor.contiguous() for tensor in tensors]
        else:
            copies = [tensor.new_empty(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
        for copy in copies:
            dist.broadcast(copy, rank)
        received.append((said, copies))
    return received


def gather_on_first_rank(value: Any) -> list[Any]:
    """Every rank's object on rank 0, which alone receives them, by way of CPUs; an empty list elsewhere."""
    if not _distributed():
        return [value]
    values = [None] * ranks() if is_first_rank() else None
    dist.gather_object(value, values, group=_group_of_cpus())
    return values or []


def from_first_rank(value: T) -> T:
    """Rank 0's object on all ranks, by way of the CPUs, which may wait longer for it than GPUs."""
    if not _distributed():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, _group_of_cpus())
    return values[0]


def once_per_node(work: Callable[[], T]) -> T:
    """What ``work`` returns, done by the first rank of each machine and given to its others; all call it.

    Raises:
        SystemExit: on the others, with status 2, where ``work`` raises on the first, which tells why.
    """
    if not _distributed():
        return work()
    group = _group_of_node()
    first = dist.get_global_rank(group, 0)
    done: list[list[T]] = [[]]
    try:
        if dist.get_rank() == first:
            done = [[work()]]
    finally:
        dist.broadcast_object_list(done, first, group)
    if not done[0]:
        raise SystemExit(2)
    return done[0][0]


@functools.cache
def _group_of_node() -> Any:
    size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's; the same on every machine
    return dist.new_subgroups(size, backend="gloo")[0]


def copy_from_first_rank(tensors: Sequence[Tensor]) -> None:
    """Give the tensors of all ranks the values of rank 0, in place and in one transfer."""
    if _distributed() and tensors:
        values = torch.cat([tensor.flatten().double() for tensor in tensors])
        dist.broadcast(values, 0)
        parts = values.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _reduced(value: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    value = value.detach()
    if _distributed():
        value = value.clone()
        dist.all_reduce(value, operation)
    return value
