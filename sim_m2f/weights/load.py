"""Weights of any origin into a network: whose names they have, what fits, and a table that says so."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim_m2f.errors import UserError
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.weights.caffe2 import from_caffe2, is_caffe2
from sim_m2f.weights.names import BODY, NAMINGS, Naming, from_names, stored_transformers_name

CONTAINERS = ("model", "state_dict", "model_state", "blobs")  # where others keep the weights in their files
CLASS_HEAD = "sem_seg_head.predictor.class_embed."
HEAD = "sem_seg_head."
META_ARCHITECTURE = "network."  # where sim_m2f.integrations.detectron2 has the network among other modules
NUMBER = re.compile(r"\d+")  # of a stage, a block or a layer
# What others keep beside their weights and a network computes itself.
COMPUTED = re.compile(
    r"(num_batches_tracked|relative_position_index|attn_mask|empty_weight|pixel_mean|pixel_std)$"
    r"|^model\.pixel_level_module\.encoder\.layernorm\."
)


@dataclass(frozen=True)
class LoadReport:
    """What became of a network's and a file's weights, by name.

    Attributes:
        source: where the weights come from.
        origin: whose names they have.
        loaded, missing: names of the network; a missing one keeps its initial value.
        reshaped: names of the network, the file's shape and the network's; they keep their initial value.
        skipped: names of the file that the network has no use for.
        notes: further lines for the user.
    """

    source: str
    origin: str
    loaded: list[str]
    missing: list[str]
    reshaped: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    skipped: list[str]
    notes: list[str]

    @property
    def unfilled(self) -> list[str]:
        """The weights of the network that were not loaded."""
        return [*self.reshaped, *self.missing]

    def __str__(self) -> str:
        rows = {"loaded": self.loaded, "missing": self.missing, "wrong shape": [], "re-initialised": []}
        for name, (theirs, ours) in self.reshaped.items():
            if name.startswith(CLASS_HEAD):
                classes = f"{ours[0] - 1} classes, the file has {theirs[0] - 1}"
                rows["re-initialised"].append(f"{name} for {classes}")
            else:
                rows["wrong shape"].append(name)
        rows["skipped"] = self.skipped
        lines = [f"{row:<15}{len(names):>5}  {_summary(names)}" for row, names in rows.items() if names]
        return "\n  ".join([f"Weights: {self.source}, {self.origin}", *lines, *self.notes])


def _summary(names: list[str]) -> str:
    """A few names, or the modules that they are in when they are many."""
    if len(names) > 3:
        modules = [".".join(name.split(".")[: 2 if name.startswith(HEAD) else 1]) for name in names]
        names = list(dict.fromkeys(modules))
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def load_into(network: Mask2Former, state: Any, source: str) -> LoadReport:
    """Load what fits of a file's contents, by the names of whoever wrote it.

    Args:
        network: whose weights are replaced, in place.
        state: the contents of a file of weights.
        source: where they come from, for messages.

    Raises:
        UserError: there are no weights, or they are of another backbone or of another network altogether.
    """
    weights, own, notes = tensors_in(state), network.state_dict(), []
    if is_caffe2(weights):
        weights, notes = from_caffe2(weights, network.pixel_std), list(_caffe2_notes(network))

    def hits(naming: Naming) -> int:
        return sum(weights.keys() >= set(naming(name)) for name in own)

    origin, naming = max(NAMINGS.items(), key=lambda item: hits(item[1]))
    found = from_names(weights, own, naming)
    shapes = {name: (tuple(found[name].shape), tuple(own[name].shape)) for name in own if name in found}
    report = LoadReport(
        source=source,
        origin=origin,
        loaded=[name for name, (theirs, ours) in shapes.items() if theirs == ours],
        missing=[name for name in own if name not in found and not COMPUTED.search(name)],
        reshaped={name: pair for name, pair in shapes.items() if pair[0] != pair[1]},
        skipped=[name for name in found if name not in own and not COMPUTED.search(name)],
        notes=notes,
    )
    _check(report, own, naming)
    network.load_state_dict({name: found[name] for name in report.loaded}, strict=False)
    return report


def is_dense(weight: Any) -> bool:
    """Whether it is a tensor with a number in every place, not with a code for one."""
    strided = isinstance(weight, Tensor) and weight.layout == torch.strided
    return strided and not weight.is_meta and not weight.is_quantized


def tensors_in(state: Any) -> dict[str, Tensor]:
    """The weights in a file's contents, under the names that they have there."""
    state = state if isinstance(state, Mapping) else {}
    for _ in CONTAINERS:  # never deeper, since a file may contain itself
        state = next((state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)), state)
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.as_tensor(value.astype(value.dtype.newbyteorder("=")))  # PyTorch has no other order
        if isinstance(value, Tensor) and not is_dense(value):
            fault = "is quantized" if value.is_quantized else "is sparse or holds no values"
            raise UserError(f"weight {name} {fault}; take another checkpoint")
        if isinstance(value, Tensor) and not str(name).endswith("_momentum"):
            tensors[str(name)] = value
    prefix = META_ARCHITECTURE if any(name.startswith(META_ARCHITECTURE) for name in tensors) else ""
    return {
        stored_transformers_name(name.removeprefix(prefix).removeprefix("module.")): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _caffe2_notes(network: Mask2Former) -> Iterator[str]:
    yield "pixels: converted from BGR in 0..255 to the network's RGB"
    strided = dict(network.named_modules()).get(f"{BODY}layer2.0.conv1")
    if strided and strided.stride != (2, 2):
        yield "MSRA's ResNets stride in the 1x1 convolutions; for them set MODEL.RESNETS.STRIDE_IN_1X1 True"


def _check(report: LoadReport, own: Mapping[str, Tensor], naming: Naming) -> None:
    """Raises UserError where backbones differ, or most of the rest does."""
    if not report.loaded and not report.reshaped:
        example = f"; it has {report.skipped[0]}, for instance" if report.skipped else ""
        advice = "take a checkpoint of Mask2Former or of its backbone"
        raise UserError(f"{report.source}: has nothing in common with this network{example}; {advice}")
    unfilled = report.unfilled
    backbone = [name for name in unfilled if name.startswith(BODY)]
    kinds = {NUMBER.sub("#", theirs) for name in own if name.startswith(BODY) for theirs in naming(name)}
    surplus = [name for name in report.skipped if NUMBER.sub("#", name) in kinds]
    if backbone or surplus:
        numbers = f"{len(backbone)} weights do not fit, {len(surplus)} are too many"
        example, advice = (backbone or surplus)[0], "check MODEL.BACKBONE, MODEL.RESNETS, MODEL.SWIN"
        raise UserError(f"{report.source}: of another backbone: {numbers} (such as {example}); {advice}")
    head = [name for name in own if name.startswith(HEAD)]
    different = [name for name in unfilled if name.startswith(HEAD) and not name.startswith(CLASS_HEAD)]
    if set(head) - set(report.missing) and len(different) > len(head) / 2:
        fault = f"{len(different)} of {len(head)} weights of the head do not fit (such as {different[0]})"
        advice = "check MODEL.SEM_SEG_HEAD and MODEL.MASK_FORMER"
        raise UserError(f"{report.source}: of another network: {fault}; {advice}")
