"""Checkpoints: written whole or not at all, read without running code from them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write

LAST = "last_checkpoint"
TIMM = "timm://"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors, numbers, strings and containers of them).

    Raises:
        UserError: the file cannot be written; an older file of the name is as it was.
    """
    with atomic_write(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            raise UserError(
                f"{path}: cannot be written ({error}); free space or choose another OUTPUT_DIR"
            ) from error


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint of ours or of any torch file of tensors; never runs code from it.

    Raises:
        UserError: the file is missing or damaged, is no checkpoint, or holds more than tensors.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the path of a checkpoint") from error
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: not a checkpoint of tensors only; not loaded ({reason})") from error
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        raise UserError(f"{path}: not a checkpoint, or damaged ({reason}); take another file") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a checkpoint; take another file")
    return state


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load the network's weights from a checkpoint, or its backbone's from timm (``timm://NAME``).

    Of a run that evaluated its teacher (TEST.USE_TEACHER) these are the teacher's weights.

    Raises:
        UserError: the file cannot be read, or belongs to another network.
    """
    if str(path).startswith(TIMM):
        model.backbone.load_pretrained(str(path).removeprefix(TIMM))
        return
    state = read_checkpoint(path)
    weights = state.get("model", state)
    if state.get("use_teacher"):
        weights = teacher_weights(state)
    load_weights(model, weights, path)


def teacher_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of the teacher's network in a checkpoint of ours; empty where it has none."""
    prefix, named = "network.", state.get("teacher", {}).items()
    return {key.removeprefix(prefix): weight for key, weight in named if key.startswith(prefix)}


def load_weights(model: nn.Module, weights: dict[str, Any], path: str | Path) -> None:
    """Load all weights of the network by name; ``path`` is where they come from.

    Raises:
        UserError: a weight is missing, unknown or of another shape.
    """
    own = model.state_dict()
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    common = own.keys() & weights.keys()
    reshaped = [name for name in common if own[name].shape != getattr(weights[name], "shape", None)]
    if missing or unknown or reshaped:
        example = sorted(reshaped or missing or unknown)[0]
        raise UserError(
            f"{path}: belongs to another network: {len(missing)} weights missing, {len(unknown)} unknown, "
            f"{len(reshaped)} of another shape (for instance {example}); check MODEL.* and NUM_CLASSES"
        )
    model.load_state_dict(weights)


def last_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run, named in ``OUTPUT_DIR/last_checkpoint``, or None."""
    pointer = output_dir / LAST
    if not pointer.exists():
        return None
    return output_dir / pointer.read_text(encoding="utf-8").strip()


def point_to(path: Path) -> None:
    """Make ``path`` the newest checkpoint of its folder."""
    with atomic_write(path.parent / LAST) as file:
        file.write(path.name)
