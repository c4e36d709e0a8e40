"""SIM-M2F: instance masks learned from bounding boxes alone (SIM, CVPR 2023, on Mask2Former)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim_m2f.allocator import keep_freed_memory as keep_freed_memory
    from sim_m2f.config import get_cfg as get_cfg
    from sim_m2f.modeling import build_model as build_model
    from sim_m2f.segmenter import Instances as Instances
    from sim_m2f.segmenter import Segmenter as Segmenter
    from sim_m2f.segmenter import from_pretrained as from_pretrained
    from sim_m2f.weights.checkpoint import load_checkpoint as load_checkpoint

__version__ = "0.2.0"

# Public names are imported when they are used: ``sim-m2f doctor`` runs where packages are missing.
_HOMES = {
    "allocator": ["keep_freed_memory"],
    "config": ["get_cfg"],
    "modeling": ["build_model"],
    "segmenter": ["Instances", "Segmenter", "from_pretrained"],
    "weights.checkpoint": ["load_checkpoint"],
}
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"sim_m2f.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
