"""Checkpoints: written whole or not at all, read without running code from them."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sim_m2f.distributed import is_first_rank
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write, write_file
from sim_m2f.modeling.mask2former import Mask2Former
from sim_m2f.weights.load import LoadReport, is_dense, load_into
from sim_m2f.weights.sources import LAST_CHECKPOINT, local_weights
from sim_m2f.weights.timm_backbone import TIMM, load_timm_backbone
from sim_m2f.weights.weight_files import read_weight_file


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them).

    Raises:
        UserError: the file cannot be written; an older file of the name is as it was.
    """
    with atomic_write(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch hides what the system says
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def replace_checkpoint(path: Path, state: dict[str, Any], previous: Path | None) -> None:
    """Write a checkpoint, make it the newest of its folder, and remove the ``previous`` one.

    Raises:
        UserError: a file cannot be written; the previous checkpoint is still the newest.
    """
    save_checkpoint(path, state)
    write_file(path.parent / LAST_CHECKPOINT, path.name)
    if previous not in (None, path):
        previous.unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint of ours or of any torch file of tensors; never runs code from it.

    Raises:
        UserError: the file is missing or damaged, is no checkpoint, or holds more than tensors.
    """
    state = read_weight_file(Path(path))
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint; take another file")
    return state


def load_checkpoint(
    network: Mask2Former, source: str | Path, complete: bool = False, teacher: bool | None = None
) -> LoadReport:
    """Load weights of any origin that MODEL.WEIGHTS may name, and print what was loaded.

    Args:
        network: ``build_model(cfg)``.
        source: a file or a folder of ours, of Mask2Former, detectron2, torchvision, Swin or transformers, an
            address (https://, detectron2://, hf://), or ``timm://NAME`` for timm's pretrained backbone.
        complete: refuse weights that leave any of the network's at its initial value.
        teacher: of a run's checkpoint take the teacher's weights, where it has them, or the student's; unless
            told, the teacher's if the run evaluated it (TEST.USE_TEACHER).

    Returns:
        what became of every weight.

    Raises:
        UserError: there is no such file, it is damaged or would run code, or it belongs to another network.
    """
    if str(source).startswith(TIMM):
        report = load_timm_backbone(network.backbone, str(source).removeprefix(TIMM))
    else:
        state = read_weight_file(local_weights(source))
        if isinstance(state, dict) and (state.get("use_teacher") if teacher is None else teacher):
            state = teacher_weights(state) or state
        report = load_into(network, state, str(source))
    if complete and report.unfilled:
        number, example = len(report.unfilled), report.unfilled[0]
        fault = f"{number} weights of the network are missing or of another shape, such as {example}"
        raise UserError(f"{source}: {fault}; check MODEL.* and NUM_CLASSES")
    if is_first_rank():
        print(report)
    return report


def teacher_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of the teacher's network in a checkpoint of ours; empty where it has none."""
    prefix, teacher = "network.", state.get("teacher")
    named = {str(key): weight for key, weight in teacher.items()} if isinstance(teacher, dict) else {}
    return {key.removeprefix(prefix): weight for key, weight in named.items() if key.startswith(prefix)}


def load_weights(model: nn.Module, weights: Any, path: str | Path) -> None:
    """Load all weights of the network by name; ``path`` is where they come from.

    Raises:
        UserError: a weight is missing, unknown or of another shape.
    """
    own = model.state_dict()
    weights = weights if isinstance(weights, dict) else {}
    shapes = {name: weight.shape if is_dense(weight) else None for name, weight in weights.items()}
    fit = {name for name in own if own[name].shape == shapes.get(name)}
    unfit = sorted({*own, *shapes} - fit, key=str)
    if unfit:
        fault = f"{len(unfit)} weights are missing, unknown or of another shape, such as {unfit[0]}"
        raise UserError(f"{path}: belongs to another network: {fault}; check MODEL.* and NUM_CLASSES")
    model.load_state_dict(weights)
