"""Files of weights: torch, pickle and safetensors, told apart by their content, without running code."""

import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import safe_open

from sim_m2f.errors import UserError, first_line, memory_problem
from sim_m2f.files import refuse_special
from sim_m2f.weights.pickles import ALLOWED, NUMBERS, TORCH_MAGIC, ForbiddenPickleError, read_pickle

WEIGHTS = re.compile(rb"(?s)(?P<torch>PK\x03\x04)|(?P<pickle>\x80)|(?P<safetensors>.{4}\0{4}\{)")
# What a file seems to be that begins otherwise; the first of these that fits.
NO_WEIGHTS = {
    rb"\Z": "is empty",
    rb"\s*<(!doctype|html|\?xml|head)": "is a web page, not weights",
    rb"\s*version https://git-lfs": "is a pointer of Git LFS, not the weights ('git lfs pull' fetches them)",
    rb"": "is no file of weights (neither torch, pickle nor safetensors)",
}
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
        return _read_shards(path) if path.name.endswith(SHARDS) else _read(path)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a checkpoint") from error
    except Exception as error:  # damaged files raise errors of every kind
        forbidden = re.search(r"(?s)Weights only.*?(?:GLOBAL|class|function)\s+([\w.]+)", str(error))
        if forbidden or isinstance(error, ForbiddenPickleError):
            name = forbidden[1] if forbidden else error
            problem = f"not loaded: it asks to run {name}, which no file of weights needs"
        elif memory_problem(error):  # or its sizes are damaged
            problem = "needs more memory than is free; free some, or download it again if it is damaged"
        else:
            reason = first_line(error)[:120]
            problem = f"damaged or cut short ({reason}); download it again or take another file"
        raise UserError(f"{path}: {problem}") from error


def refuse_size(where: object, size: int) -> None:
    """Raises UserError for weights of so many bytes that the memory cannot hold them."""
    memory = psutil.virtual_memory().total
    if size > memory:
        fault = f"has {size / 1e9:,.1f} GB, more than this machine's memory ({memory / 1e9:,.1f} GB)"
        raise UserError(f"{where}: {fault}; take a smaller file")


def weights_problem(head: bytes) -> str | None:
    """What a file that begins with ``head`` seems to be, unless it looks like weights."""
    if WEIGHTS.match(head):
        return None
    return next(problem for start, problem in NO_WEIGHTS.items() if re.match(start, head, re.IGNORECASE))


def _read(path: Path) -> Any:
    refuse_special(path)
    refuse_size(path, path.stat().st_size)
    with path.open("rb") as file:
        kind = WEIGHTS.match(head := file.read(HEAD))
    if not kind:
        raise UserError(f"{path}: {weights_problem(head)}; download it again or take another file")
    if kind["safetensors"]:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if kind["torch"]:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:  # PyTorch packs without compression
            raise UserError(f"{path}: unpacks to {unpacked:,} bytes, more than it has; take another file")
    if kind["pickle"]:
        content = read_pickle(path)
        if type(content) is not int or content != TORCH_MAGIC:
            return content
    with torch.serialization.safe_globals(NUMPY_GLOBALS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sparse weights, which are refused
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_shards(index: Path) -> dict[str, Any]:
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    shards = [index.parent / Path(name).name for name in sorted(set(names))]
    refuse_size(index, sum(shard.stat().st_size for shard in shards if shard.is_file()))
    weights: dict[str, Any] = {}
    for shard in shards:
        weights.update(read_weight_file(shard))
    return weights
