"""Files of weights: torch, pickle and safetensors, told apart by their content, without running code."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from sim_m2f.errors import UserError
from sim_m2f.weights.pickles import ALLOWED, NUMBERS, TORCH_MAGIC, ForbiddenPickleError, read_pickle

ZIP = b"PK\x03\x04"
PICKLE = b"\x80"
NUMPY_GLOBALS: list[Any] = [
    *((target, ".".join(name)) for name, target in ALLOWED.items() if name[0].startswith("numpy")),
    *{type(np.dtype(code)) for code in NUMBERS},
]
SHARDS = ".index.json"
HEAD = 512  # bytes that tell what a file is


def read_weight_file(path: Path) -> Any:
    """What a file holds, its tensors on the CPU; safetensors give a dictionary of tensors.

    Raises:
        UserError: the file is missing, unreadable, damaged, no file of weights, or asks for code to be run.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
        if path.name.endswith(SHARDS):
            return _read_shards(path)
        if problem := weights_problem(head):
            raise UserError(f"{path}: {problem}; download it again or take another file")
        return _read(path, head)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a checkpoint") from error
    except ForbiddenPickleError as error:
        raise _forbidden(path, str(error)) from error
    except UserError:
        raise
    except Exception as error:  # damaged files raise errors of every kind
        raise _refusal(path, error) from error


def _is_safetensors(head: bytes) -> bool:
    return head[4:9] == b"\0\0\0\0{"  # the length of the JSON that follows, below 4 GB


def _read(path: Path, head: bytes) -> Any:
    if _is_safetensors(head):
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if head.startswith(PICKLE):
        content = read_pickle(path)
        if type(content) is not int or content != TORCH_MAGIC:
            return content
    with torch.serialization.safe_globals(NUMPY_GLOBALS):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_shards(index: Path) -> dict[str, Any]:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    weights: dict[str, Any] = {}
    for name in sorted(set(names)):
        weights.update(read_weight_file(index.parent / Path(name).name))
    return weights


def weights_problem(head: bytes) -> str | None:
    """What a file that begins with ``head`` seems to be, unless it looks like weights."""
    if head.startswith((ZIP, PICKLE)) or _is_safetensors(head):
        return None
    if not head:
        return "is empty"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not weights"
    if text.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights themselves ('git lfs pull' fetches them)"
    return "is no file of weights (neither torch, pickle nor safetensors)"


def _forbidden(path: Path, name: str) -> UserError:
    return UserError(f"{path}: not loaded: it asks to run {name}, which no file of weights needs")


def _refusal(path: Path, error: Exception) -> UserError:
    reason = str(error)
    if forbidden := re.search(r"(?:GLOBAL|class|function)\s+([\w.]+)", reason.partition("Weights only")[2]):
        return _forbidden(path, forbidden[1])
    line = reason.splitlines()[0][:120] if reason else type(error).__name__
    return UserError(f"{path}: damaged or cut short ({line}); download it again or take another file")
