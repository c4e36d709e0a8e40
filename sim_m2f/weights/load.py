"""Weights of any origin into a network: whose names they have, what fits, and a table that says so."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim_m2f.errors import UserError
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.weights.caffe2 import from_caffe2, is_caffe2
from sim_m2f.weights.names import (
    BODY,
    Naming,
    backbone_names,
    detectron2_names,
    from_names,
    own_names,
    stored_transformers_name,
    timm_names,
    transformers_names,
)

CONTAINERS = ("model", "state_dict", "model_state", "blobs")  # where others keep the weights in their files
CLASS_HEAD = "sem_seg_head.predictor.class_embed."
HEAD = "sem_seg_head."
META_ARCHITECTURE = "network."  # where sim_m2f.integrations.detectron2 has the network among other modules
# What others keep beside their weights and a network computes itself.
COMPUTED = re.compile(
    r"(num_batches_tracked|relative_position_index|attn_mask|empty_weight|pixel_mean|pixel_std)$"
    r"|^model\.pixel_level_module\.encoder\.layernorm\."
)


NAMINGS: dict[str, Naming] = {
    "SIM-M2F": own_names,
    "Mask2Former (detectron2)": detectron2_names,
    "Mask2Former (transformers)": transformers_names,
    "backbone (detectron2, Swin)": backbone_names,
    "backbone (torchvision, timm)": timm_names,
}


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
    def complete(self) -> bool:
        """Whether every weight of the network was loaded."""
        return not self.missing and not self.reshaped

    def __str__(self) -> str:
        classes = [
            f"{name} for {ours[0] - 1} classes, the file has {theirs[0] - 1}"
            for name, (theirs, ours) in self.reshaped.items()
            if name.startswith(CLASS_HEAD)
        ]
        others = [name for name in self.reshaped if not name.startswith(CLASS_HEAD)]
        rows = {
            "loaded": self.loaded,
            "missing": self.missing,
            "wrong shape": others,
            "re-initialised": classes,
            "skipped": self.skipped,
        }
        lines = [f"Weights: {self.source}, {self.origin}"]
        for row, names in rows.items():
            if names:
                lines.append(f"  {row:<15}{len(names):>5}  {_summary(names)}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


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
    weights, notes = tensors_in(state), []
    if is_caffe2(list(weights)):
        weights = from_caffe2(weights, network.pixel_std)
        notes = _caffe2_notes(network)
    own = network.state_dict()
    origin, naming = _origin(weights, own)
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


def tensors_in(state: Any) -> dict[str, Tensor]:
    """The weights in a file's contents, under the names that they have there."""
    state = state if isinstance(state, Mapping) else {}
    for _ in CONTAINERS:  # never deeper, since a file may contain itself
        state = next((state[key] for key in CONTAINERS if isinstance(state.get(key), Mapping)), state)
    arrays = {str(name): value for name, value in state.items() if _is_array(value)}
    inner = {
        name.removeprefix(META_ARCHITECTURE): value
        for name, value in arrays.items()
        if name.startswith(META_ARCHITECTURE)
    }
    return {
        stored_transformers_name(name.removeprefix("module.")): _as_tensor(value)
        for name, value in (inner or arrays).items()
        if not name.endswith("_momentum")
    }


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "fiub")


def _as_tensor(value: Tensor | np.ndarray) -> Tensor:
    """A tensor with the byte order of this machine, the only one that PyTorch has."""
    return (
        value if isinstance(value, Tensor) else torch.as_tensor(value.astype(value.dtype.newbyteorder("=")))
    )


def _origin(weights: Mapping[str, Tensor], own: Iterable[str]) -> tuple[str, Naming]:
    """The naming that most of the network's names are found by."""
    names = set(weights)

    def hits(naming: Naming) -> int:
        return sum(names.issuperset(naming(name)) for name in own)

    return max(NAMINGS.items(), key=lambda item: hits(item[1]))


def _caffe2_notes(network: Mask2Former) -> list[str]:
    notes = ["pixels: converted from BGR in 0..255 to the network's RGB"]
    stage = getattr(getattr(network.backbone, "body", None), "layer2", None)
    if stage is not None and tuple(stage[0].conv1.stride) != (2, 2):
        notes.append(
            "MSRA's ResNets stride in the 1x1 convolutions; for them set MODEL.RESNETS.STRIDE_IN_1X1 True"
        )
    return notes


def _check(report: LoadReport, own: Mapping[str, Tensor], naming: Naming) -> None:
    """Raises UserError where backbones differ, or most of the rest does."""
    if not report.loaded and not report.reshaped:
        example = f"; it has {report.skipped[0]}, for instance" if report.skipped else ""
        raise UserError(
            f"{report.source}: has nothing in common with this network{example}; "
            "take a checkpoint of Mask2Former or of its backbone"
        )
    unfilled = [*report.reshaped, *report.missing]
    backbone = [name for name in unfilled if name.startswith(BODY)]
    kinds = {_kind(theirs) for name in own if name.startswith(BODY) for theirs in naming(name)}
    surplus = [name for name in report.skipped if _kind(name) in kinds]
    if backbone or surplus:
        raise UserError(
            f"{report.source}: of another backbone: {len(backbone)} weights do not fit, {len(surplus)} are "
            f"too many (such as {(backbone or surplus)[0]}); check MODEL.BACKBONE, MODEL.RESNETS, MODEL.SWIN"
        )
    head = [name for name in own if name.startswith(HEAD)]
    different = [name for name in unfilled if name.startswith(HEAD) and not name.startswith(CLASS_HEAD)]
    has_head = any(name.startswith(HEAD) for name in [*report.loaded, *report.reshaped])
    if has_head and len(different) > len(head) / 2:
        raise UserError(
            f"{report.source}: of another network: {len(different)} of {len(head)} weights of the head do "
            f"not fit (such as {different[0]}); check MODEL.SEM_SEG_HEAD and MODEL.MASK_FORMER"
        )


def _kind(name: str) -> str:
    """A name without the numbers of its stage, block and layer."""
    return re.sub(r"\d+", "#", name)
