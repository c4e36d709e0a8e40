"""Pickles of arrays, read without running code from them.

A pickle names functions to call. Only those that build arrays, tensors and plain containers are let through;
any other name ends the reading before anything is called.
"""

import collections
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

try:
    from numpy._core import multiarray, numeric
except ImportError:  # numpy 1
    from numpy.core import multiarray, numeric  # type: ignore[no-redef]

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first object in torch files older than PyTorch 1.6
NUMBERS = "?" + np.typecodes["AllInteger"] + np.typecodes["AllFloat"]


class ForbiddenPickleError(Exception):
    """A pickle asks for something else than arrays and containers."""


def _dtype(name: Any, align: bool = False, copy: bool = False) -> np.dtype:
    """A dtype of numbers, never NumPy's shared one, because a pickle sets its byte order next.

    Raises:
        ForbiddenPickleError: it is of anything else than numbers; a file's bytes are no objects.
    """
    dtype = np.dtype(name, copy=True)
    if dtype.char not in NUMBERS:
        raise ForbiddenPickleError(f"numpy.dtype({name!r})")
    return dtype


def _plain(dtype: np.dtype) -> np.dtype:
    """The numbers and the byte order of a dtype, without the flags and fields that a pickle may have set."""
    return np.dtype(dtype.char).newbyteorder(dtype.byteorder)


class _Array(np.ndarray):
    """An array of numbers that only a pickle's state fills; NumPy's own takes a buffer as objects."""

    def __new__(cls, *_: Any) -> "_Array":
        return super().__new__(cls, (0,))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *version_and_shape, dtype, is_fortran, content = state
        super().__setstate__((*version_and_shape, _plain(dtype), is_fortran, content))


def _scalar(dtype: np.dtype, content: Any) -> Any:
    return multiarray.scalar(_plain(dtype), content)


def _frombuffer(content: Any, dtype: np.dtype, *layout: Any) -> _Array:
    return numeric._frombuffer(content, _plain(dtype), *layout).view(_Array)  # type: ignore[attr-defined]


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): lambda text, encoding="latin1": str.encode(text, "latin1"),
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
}
for package in ("numpy.core", "numpy._core"):
    ALLOWED[f"{package}.multiarray", "_reconstruct"] = _Array
    ALLOWED[f"{package}.multiarray", "scalar"] = _scalar
    ALLOWED[f"{package}.numeric", "_frombuffer"] = _frombuffer


class ArrayUnpickler(pickle._Unpickler):
    """Unpickles arrays, tensors and plain containers.

    In Python, since the one in C reserves as much memory as the largest number of a memo says.

    Raises:
        ForbiddenPickleError: on anything else, before it is called.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ForbiddenPickleError(f"{module}.{name}")
        return ALLOWED[module, name]


def read_pickle(path: Path) -> Any:
    """The object in a pickle file of Python 2 or 3."""
    with path.open("rb") as file:
        return ArrayUnpickler(file, encoding="latin1").load()
