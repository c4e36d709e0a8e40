"""Counts on a CPU what a piece of work asks of a GPU: operator calls, casts, and waits of the host."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Those whose result's size or value the host has to wait for.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.bincount}
VIEWS = (
    *(
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "lift_fresh",
        "narrow",
        "permute",
        "select",
        "slice",
    ),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view"),
    *(
        "_reshape_alias",
        "_unsafe_view",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    ),
)
IDLE = {f"aten.{name}" for name in VIEWS}


class StepCounts(TorchDispatchMode):
    """Counts of what runs under it, backward passes too.

    Some tensors are taken to be on the GPU: those that ``on_gpu`` marks, what ``to(device,
    non_blocking=True)`` copies, and all that is computed from these. What ``cpu()`` gives is on the CPU.

    Attributes:
        calls: operators below autograd, without those that compute nothing: views and empty tensors.
        views: these.
        casts: copies that change the floating-point type.
        waits: what made the host wait for a tensor of the GPU, and how often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.casts = 0
        self.waits: Counter[str] = Counter()
        self.methods = _Copies(self)

    @property
    def views(self) -> int:
        return sum(self.names[name] for name in self.names if name in IDLE)

    @property
    def calls(self) -> int:
        return self.names.total() - self.views

    def __enter__(self) -> "StepCounts":
        super().__enter__()
        self.methods.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.methods.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet, result = operator.overloadpacket, operator(*args, **(kwargs or {}))
        self.names[str(packet)] += 1
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if packet is aten._to_copy:
            self.casts += result.dtype != args[0].dtype and result.is_floating_point()
        if any(map(is_on_gpu, leaves)):
            on_gpu(result)
            indices = args[1] if packet in (aten.index, aten.index_put, aten.index_put_) else ()
            if packet in WAITS or any(index is not None and index.dtype == torch.bool for index in indices):
                self.waits[str(packet)] += 1
            if packet is aten.repeat_interleave and (kwargs or {}).get("output_size") is None:
                self.waits[str(packet)] += 1
        return result


class _Copies(TorchFunctionMode):
    """Copies between the devices, which are no operators on a CPU."""

    def __init__(self, counts: StepCounts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is Tensor.to and kwargs.get("non_blocking") and not is_on_gpu(args[0]):
            return on_gpu(result.clone(memory_format=torch.preserve_format))
        if function is Tensor.cpu and is_on_gpu(args[0]):
            self.counts.waits["cpu"] += 1
            return torch.from_numpy(args[0].detach().numpy().copy())
        return result


def on_gpu(tensors: Any) -> Any:
    """The tensors, marked."""
    for leaf in tree_leaves(tensors):
        if isinstance(leaf, Tensor):
            leaf.of_gpu = True
    return tensors


def is_on_gpu(tensor: Tensor) -> bool:
    return getattr(tensor, "of_gpu", False)
