"""The configuration: its keys and defaults, how files and command lines change it, and what is checked."""

from sim_m2f.config.checks import check_choices, extent_warning, validate, without_effect
from sim_m2f.config.defaults import get_cfg
from sim_m2f.config.node import CfgNode, value_of

__all__ = ["CfgNode", "check_choices", "extent_warning", "get_cfg", "validate", "value_of", "without_effect"]
