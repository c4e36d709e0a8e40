"""ResNets of Caffe2 in detectron2's zoo (MSRA, FAIR): other names, BGR pixels that are not scaled."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sim_m2f.weights.names import caffe2_to_detectron2, to_names

FROZEN_EPS = 1e-5
STEM = "stem.conv1.weight"


def is_caffe2(names: Collection[str]) -> bool:
    """Whether weights are named as in Caffe2's ResNets."""
    return "conv1_w" in names and any(name.startswith("res2_0_branch") for name in names)


def from_caffe2(weights: Mapping[str, Tensor], pixel_std: Sequence[float]) -> dict[str, Tensor]:
    """The weights under detectron2's names, for RGB pixels that are divided by ``pixel_std``.

    Files whose norms are folded into scale and bias get the statistics that leave those as they are. The mean
    of the pixels is the same in both conventions.
    """
    renamed = to_names(weights, caffe2_to_detectron2)
    renamed[STEM] = renamed[STEM].flip(1) * torch.tensor(pixel_std).view(1, 3, 1, 1)
    for name in [name for name in renamed if name.endswith(".norm.weight")]:
        norm = name.removesuffix("weight")
        renamed.setdefault(f"{norm}running_mean", torch.zeros_like(renamed[name]))
        renamed.setdefault(f"{norm}running_var", torch.ones_like(renamed[name]) - FROZEN_EPS)
    return renamed
