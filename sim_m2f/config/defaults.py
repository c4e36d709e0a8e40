"""The keys and their defaults, from ``defaults.yaml`` and ``without_effect.yaml`` beside this file."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode as FvcoreNode

from sim_m2f.config.node import ELEMENTS, CfgNode, leaf_keys, value_of
from sim_m2f.errors import UserError


def read_yaml(file: Path) -> dict[str, Any]:
    """The content of a YAML file that comes with the package."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def add_keys(node: FvcoreNode, values: Mapping[str, Any]) -> None:
    """Give a node new keys; texts such as "(1, 2)" become tuples, as they do in files of one's own."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            add_keys(node.setdefault(key, type(node)()), value)
        else:
            node[key] = CfgNode._decode_cfg_value(value)


_IGNORED = read_yaml(Path(__file__).with_name("without_effect.yaml"))
_DEFAULTS = CfgNode()
add_keys(_DEFAULTS, read_yaml(Path(__file__).with_suffix(".yaml")))
add_keys(_DEFAULTS, _IGNORED)
WITHOUT_EFFECT = tuple(leaf_keys(_IGNORED))
_VALUES = {key: value_of(_DEFAULTS, key) for key in leaf_keys(_DEFAULTS)}
ELEMENTS.update(
    (key, value[0]) for key, value in _VALUES.items() if value and isinstance(value, list | tuple)
)


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults; ``merge_from_file`` and ``merge_from_list`` change it."""
    return copy.deepcopy(_DEFAULTS)


def cfg_from_text(text: str, source: str = "checkpoint") -> CfgNode:
    """The configuration whose ``dump`` is ``text``.

    Raises:
        UserError: it is no such text; ``source`` is where it comes from.
    """
    cfg = get_cfg()
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, AttributeError) as error:
        raise UserError(f"{source}: its configuration is damaged; take another checkpoint") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{source}: its configuration is no mapping of keys; take another checkpoint")
    cfg.merge_values(values, source)
    return cfg
