"""SIM-M2F: instance masks learned from bounding boxes alone (SIM, CVPR 2023, on Mask2Former)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sim_m2f.allocator import keep_freed_memory
    from sim_m2f.config import get_cfg
    from sim_m2f.modeling import build_model
    from sim_m2f.segmenter import Instances, Segmenter, from_pretrained
    from sim_m2f.weights.checkpoint import load_checkpoint

__all__ = [
    "Instances",
    "Segmenter",
    "build_model",
    "from_pretrained",
    "get_cfg",
    "keep_freed_memory",
    "load_checkpoint",
]
__version__ = "0.2.0"

_HOMES = {
    "keep_freed_memory": "sim_m2f.allocator",
    "get_cfg": "sim_m2f.config",
    "build_model": "sim_m2f.modeling",
    "Instances": "sim_m2f.segmenter",
    "Segmenter": "sim_m2f.segmenter",
    "from_pretrained": "sim_m2f.segmenter",
    "load_checkpoint": "sim_m2f.weights.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: ``sim-m2f doctor`` runs where packages are missing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
