"""Pickles of arrays, read without running code from them.

A pickle names functions to call. Only those that build arrays, tensors and plain containers are let through;
any other name ends the reading before anything is called.
"""

import codecs
import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    from numpy._core import multiarray, numeric
except ImportError:  # numpy 1
    from numpy.core import multiarray, numeric

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in torch files older than PyTorch 1.6


class ForbiddenPickleError(Exception):
    """A pickle asks for something else than arrays and containers."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return codecs.latin_1_encode(text)[0]


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _parameter(data: Tensor, requires_grad: bool, hooks: Any) -> Tensor:
    return nn.Parameter(data, requires_grad=requires_grad)


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}
for package in ("numpy.core", "numpy._core"):
    ALLOWED[f"{package}.multiarray", "_reconstruct"] = multiarray._reconstruct
    ALLOWED[f"{package}.multiarray", "scalar"] = multiarray.scalar
    ALLOWED[f"{package}.numeric", "_frombuffer"] = numeric._frombuffer


class ArrayUnpickler(pickle.Unpickler):
    """Unpickles arrays, tensors and plain containers.

    Raises:
        ForbiddenPickleError: on anything else, before it is called.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise ForbiddenPickleError(f"{module}.{name}") from None


def read_pickle(path: Path) -> Any:
    """The object in a pickle file of Python 2 or 3."""
    with path.open("rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()
