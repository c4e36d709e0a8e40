"""Parameter names of other implementations. Each naming maps one of our names to theirs, one to one.

The rules are in ``names.yaml`` beside this file. Where another implementation keeps queries, keys and values
apart, one of our names has three of theirs, whose tensors follow each other along the first dimension in
ours. The way back needs the names of our network only.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sim_m2f.config.defaults import read_yaml

Naming = Callable[[str], tuple[str, ...]]

BODY = "backbone.body."  # what timm calls by its own names
_SUM = re.compile(r"\{(\d+)([+-]\d+)\}")
_PARTS = re.compile(r"\[(\S+?)\]")
_NAMINGS = read_yaml(Path(__file__).with_suffix(".yaml"))


def _names(naming: str, name: str) -> tuple[str, ...]:
    """What ``names.yaml`` makes of a name."""
    for part in _NAMINGS[naming]:
        if match := re.match(part["ours"], name):
            rest = name[match.end() :]
            for pattern, replacement in part["rules"].items():
                rest = re.sub(pattern, replacement, rest)
            name = part["theirs"] + _SUM.sub(lambda terms: str(int(terms[1]) + int(terms[2])), rest)
            break
    parts = _PARTS.search(name)
    return tuple(_PARTS.sub(part, name) for part in parts[1].split("|")) if parts else (name,)


detectron2_names: Naming = partial(_names, "detectron2")
transformers_names: Naming = partial(_names, "transformers")
caffe2_to_detectron2: Naming = partial(_names, "caffe2_to_detectron2")


def own_names(name: str) -> tuple[str, ...]:
    return (name,)


def backbone_names(name: str) -> tuple[str, ...]:
    """Names in detectron2's files of the backbone alone, which are those of Swin's authors too."""
    return (detectron2_names(name)[0].removeprefix("backbone."),)


# Whose names a file of weights may have.
NAMINGS: dict[str, Naming] = {
    "SIM-M2F": own_names,
    "Mask2Former (detectron2)": detectron2_names,
    "Mask2Former (transformers)": transformers_names,
    "backbone (detectron2, Swin)": backbone_names,
    "backbone (torchvision, timm)": partial(_names, "timm"),
}


def stored_transformers_name(name: str) -> str:
    """The name that a weight, called ``name`` in memory, has in transformers' files; others as they are."""
    return _names("transformers_files", name)[0]


def to_names(weights: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Weights under the names that ``naming`` gives them."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = naming(name)
        parts = weight.chunk(len(theirs)) if len(theirs) > 1 else (weight,)
        renamed.update(zip(theirs, parts, strict=True))
    return renamed


def from_names(weights: Mapping[str, Any], names: Iterable[str], naming: Naming) -> dict[str, Any]:
    """What another implementation has for our ``names``, and whatever else it has under its own names."""
    rest, restored = dict(weights), {}
    for name in names:
        theirs = naming(name)
        if all(part in rest for part in theirs):
            parts = [rest.pop(part) for part in theirs]
            restored[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return {**rest, **restored}
