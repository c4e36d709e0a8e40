"""The most memory that the tensors made by a piece of work hold together, counted on any device."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryPeak(TorchDispatchMode):
    """``bytes`` is the peak of what operators allocate under it and do not give back meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.bytes = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _key(leaf) not in known | self.alive.keys():
                storage, key = leaf.untyped_storage(), _key(leaf)
                self.alive[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.bytes = max(self.bytes, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
