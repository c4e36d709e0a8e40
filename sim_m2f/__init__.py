"""SIM-M2F: instance masks learned from bounding boxes alone (SIM, CVPR 2023, on Mask2Former)."""

from sim_m2f.allocator import keep_freed_memory
from sim_m2f.config import get_cfg
from sim_m2f.engine.checkpoint import load_checkpoint
from sim_m2f.modeling import build_model
from sim_m2f.pretrained import from_pretrained
from sim_m2f.segmenter import Instances, Segmenter

__all__ = [
    "Instances",
    "Segmenter",
    "build_model",
    "from_pretrained",
    "get_cfg",
    "keep_freed_memory",
    "load_checkpoint",
]
__version__ = "0.1.0"
