"""Every check of a configuration that names and types cannot make; the limits stand in ``limits.yaml``."""

import functools
import math
import reprlib
from pathlib import Path
from typing import Any

from sim_m2f.config.defaults import WITHOUT_EFFECT, get_cfg, read_yaml
from sim_m2f.config.node import CfgNode, leaf_keys, value_of
from sim_m2f.errors import UserError, is_line

_LARGEST = 2**32
_FAR = 1.25  # factor between extents that positions learned from one of them do not bridge
_LIMITS = read_yaml(Path(__file__).with_name("limits.yaml"))


def validate(cfg: CfgNode) -> None:
    """Check what names and types cannot say.

    Raises:
        UserError: a key asks for something that does not exist, a number is out of range or no multiple of
            what it is divided by, or keys do not go together.
    """
    for key, only in _LIMITS["ONLY_CHOICE"].items():
        value = value_of(cfg, key)
        if value != only:
            raise UserError(f"{key}: {value!r} does not exist here; the only choice is {only!r}")
    check_choices(cfg)
    for key in leaf_keys(cfg):
        value = value_of(cfg, key)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            _check_value(key, value, one)
    for key, length in _LIMITS["LENGTHS"].items():
        if len(value_of(cfg, key)) != length:
            raise UserError(f"{key} is {value_of(cfg, key)}; give {length} values")
    for key, number in _LIMITS["NAMES"].items():
        names = list(value_of(cfg, key))
        if len(names) != number or names != sorted(set(names)):
            raise UserError(f"{key} is {names}; give {number} different names in ascending order")
    for key in _LIMITS["ASCENDING"]:
        if list(value_of(cfg, key)) != sorted(value_of(cfg, key)):
            raise UserError(f"{key} is {value_of(cfg, key)}; give the smaller number first")
    for key, divisor in _LIMITS["MULTIPLES"]:
        number = value_of(cfg, divisor) if isinstance(divisor, str) else divisor
        if value_of(cfg, key) % number:
            name = f"{divisor} ({number})" if isinstance(divisor, str) else number
            raise UserError(f"{key} is {value_of(cfg, key)}; use a multiple of {name}")
    sim = cfg.MODEL.SIM
    if sim.PROMPTS.ENABLED and cfg.MODEL.MASK_FORMER.DEC_LAYERS == 1:
        fault = "MODEL.MASK_FORMER.DEC_LAYERS 1 has no layer that looks into their boxes"
        raise UserError(f"MODEL.SIM.PROMPTS.ENABLED: {fault}; use DEC_LAYERS of at least 2, or no prompts")
    learned = any(sim[term].ENABLED for term in ("GATED_MASKS", "PSEUDO_SEMANTIC", "SELF_CORRECTION"))
    if cfg.DATASETS.TRAIN_PROPOSALS and not (learned and sim.SUPERVISION != "mask"):
        fault = "no loss learns from them; set MODEL.SIM.GATED_MASKS.ENABLED True"
        raise UserError(f"DATASETS.TRAIN_PROPOSALS: {fault}, and learn from boxes")
    low, high = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE
    if not 0 < low <= high:
        raise UserError(f"INPUT.MIN_SCALE is {low}, INPUT.MAX_SCALE {high}; use 0 < MIN_SCALE <= MAX_SCALE")


def _check_value(key: str, value: Any, one: Any) -> None:
    """Check one of the values of a key, of which ``value`` are all, by its type and by its range."""
    if isinstance(one, float) and not math.isfinite(one):
        raise UserError(f"{key} is {value}; use a finite number")
    if isinstance(one, str) and not is_line(one):
        raise UserError(f"{key} is {reprlib.repr(one)}; use a text of one line")
    if found := range_of(key):
        least, most = found
        if one < least:
            raise UserError(f"{key} is {value}; use a number of at least {least}")
        if one > most:
            raise UserError(f"{key} is {value}; use a number of at most {most}")
    elif isinstance(one, int) and abs(one) > _LARGEST:
        raise UserError(f"{key} is {reprlib.repr(one)}; use a number of at most {_LARGEST}")


@functools.cache
def range_of(key: str) -> tuple[float, float] | None:
    """Least and largest number of a key, where there are any."""
    ranges = _LIMITS["RANGES"].items()
    return next((tuple(each) for name, each in ranges if f".{key}".endswith(f".{name}")), None)


def check_choices(cfg: CfgNode) -> None:
    """Check the keys that name one of several things.

    Raises:
        UserError: a key names something that does not exist.
    """
    for key, choices in _LIMITS["CHOICES"].items():
        value = value_of(cfg, key)
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if one not in choices:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise UserError(f"{key}: {one!r} does not exist; take {known}")


def extent_warning(cfg: CfgNode) -> str:
    """One line where tests see far more or less of an image than training does, else "".

    Learned positions are shares of what the network sees: tests show whole images, or tiles of TEST.TILE of
    them, training crops of INPUT.IMAGE_SIZE of images INPUT.MIN_SCALE to MAX_SCALE times as large.
    """
    low, high, tile = cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, cfg.TEST.TILE
    tests = max(cfg.INPUT.MIN_SIZE_TEST / tile, 1.0) if tile else 1.0
    if low <= _FAR * tests and high >= tests / _FAR:
        return ""
    shown = f"images {tests:.3g} times as large as a tile" if tile else "them whole"
    fault = f"training shows images {low} to {high} times as large as its crop, tests show {shown}"
    advice = f"masks will be out of place; let the scales enclose {tests:.3g}"
    return f"INPUT.MIN_SCALE {low} and MAX_SCALE {high}: {fault}; {advice}"


def frozen_warning(cfg: CfgNode) -> str:
    """One line where norms are kept fixed that were never trained, else ""."""
    resnet = cfg.MODEL.BACKBONE.NAME == "build_resnet_backbone" and cfg.MODEL.RESNETS.NORM == "FrozenBN"
    if cfg.MODEL.WEIGHTS or not resnet:
        return ""
    fault = "MODEL.RESNETS.NORM is FrozenBN, but the weights are random, so its norms never learn"
    return f"{fault}; set MODEL.WEIGHTS, or another norm (BN, GN)"


def without_effect(cfg: CfgNode) -> list[str]:
    """The keys that ask for something that does not happen here."""
    defaults = get_cfg()
    return [key for key in WITHOUT_EFFECT if value_of(cfg, key) != value_of(defaults, key)]


def changed_on_resume(cfg: CfgNode, previous: CfgNode, source: str) -> list[str]:
    """What a resumed run does otherwise: one text for each key that has another value than before.

    Raises:
        UserError: a key has changed that a resumed run cannot change; ``source`` is the checkpoint's name.
    """
    pairs = {key: (value_of(previous, key), value_of(cfg, key)) for key in leaf_keys(cfg)}
    changed = {key: f"{key} {old!r} -> {new!r}" for key, (old, new) in pairs.items() if old != new}
    free = (*_LIMITS["MAY_CHANGE"], *WITHOUT_EFFECT)
    if refused := [text for key, text in changed.items() if not key.startswith(free)]:
        advice = "take the old values, or start a run in another OUTPUT_DIR"
        raise UserError(f"{source}: a resumed run cannot change {', '.join(refused)}; {advice}")
    return list(changed.values())
