"""ResNets of Caffe2 in detectron2's zoo (MSRA, FAIR): other names, BGR pixels that are not scaled."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FROZEN_EPS = 1e-5
BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
NORM = {
    **dict.fromkeys(("s", "gamma"), "weight"),
    **dict.fromkeys(("b", "beta", "bias"), "bias"),
    **dict.fromkeys(("rm", "running_mean"), "running_mean"),
    **dict.fromkeys(("riv", "running_var"), "running_var"),
}
STEM = "stem.conv1.weight"


def is_caffe2(names: Sequence[str]) -> bool:
    """Whether weights are named as in Caffe2's ResNets."""
    return "conv1_w" in names and any(name.startswith("res2_0_branch") for name in names)


def from_caffe2(weights: Mapping[str, Tensor], pixel_std: Sequence[float]) -> dict[str, Tensor]:
    """The weights under detectron2's names, for RGB pixels that are divided by ``pixel_std``.

    Files whose norms are folded into scale and bias get the statistics that leave those as they are. The mean
    of the pixels is the same in both conventions.
    """
    renamed = {_detectron2_name(name): weight for name, weight in weights.items()}
    renamed[STEM] = renamed[STEM].flip(1) * torch.tensor(pixel_std).view(1, 3, 1, 1)
    for name in [name for name in renamed if name.endswith(".norm.weight")]:
        norm = name.removesuffix("weight")
        renamed.setdefault(f"{norm}running_mean", torch.zeros_like(renamed[name]))
        renamed.setdefault(f"{norm}running_var", torch.ones_like(renamed[name]) - FROZEN_EPS)
    return renamed


def _detectron2_name(name: str) -> str:
    if name == "conv1_w":
        return STEM
    if match := re.fullmatch(r"(?:res_)?conv1_(?:bn|gn)_(\w+)", name):
        return f"stem.conv1.norm.{NORM.get(match[1], match[1])}"
    if match := re.fullmatch(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_w", name):
        return f"res{match[1]}.{match[2]}.{BRANCHES[match[3]]}.weight"
    if match := re.fullmatch(r"res(\d)_(\d+)_branch(1|2a|2b|2c)_(?:bn|gn)_(\w+)", name):
        return f"res{match[1]}.{match[2]}.{BRANCHES[match[3]]}.norm.{NORM.get(match[4], match[4])}"
    return name
