"""The configuration: its keys and defaults, how files and command lines change it, and what is checked."""

from sim_m2f.config.checks import (
    changed_on_resume,
    check_choices,
    extent_warning,
    frozen_warning,
    validate,
    without_effect,
)
from sim_m2f.config.defaults import cfg_from_text, get_cfg
from sim_m2f.config.node import CfgNode, value_of

__all__ = [
    "CfgNode",
    "cfg_from_text",
    "changed_on_resume",
    "check_choices",
    "extent_warning",
    "frozen_warning",
    "get_cfg",
    "validate",
    "value_of",
    "without_effect",
]
