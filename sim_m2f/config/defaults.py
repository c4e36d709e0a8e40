"""The keys and their defaults, from ``defaults.yaml`` and ``without_effect.yaml`` beside this file."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sim_m2f.config.node import CfgNode, leaf_keys


def read_beside(name: str) -> dict[str, Any]:
    """The content of a YAML file beside this one."""
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _add(node: CfgNode, values: Mapping[str, Any]) -> None:
    """Give a node new keys; texts such as "(1, 2)" become tuples, as they do in files of one's own."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _add(node.setdefault(key, CfgNode()), value)
        else:
            node[key] = CfgNode._decode_cfg_value(value)


_IGNORED = read_beside("without_effect.yaml")
_DEFAULTS = CfgNode()
_add(_DEFAULTS, read_beside("defaults.yaml"))
_add(_DEFAULTS, _IGNORED)
WITHOUT_EFFECT = tuple(leaf_keys(_IGNORED))


def get_cfg() -> CfgNode:
    """A fresh copy of the defaults; ``merge_from_file`` and ``merge_from_list`` change it."""
    return copy.deepcopy(_DEFAULTS)
