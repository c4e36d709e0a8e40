"""Mask2Former itself, from a checkout of github.com/facebookresearch/Mask2Former; it imports detectron2."""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torch import nn

CONFIG = "configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
EXTENSION = "MultiScaleDeformableAttention"


def build(checkout: Path, device: str) -> nn.Module:
    """Its R-50 with random weights.

    On the CPU it computes deformable attention in PyTorch, as its extension is for CUDA alone; on a GPU by
    the module MultiScaleDeformableAttention that is installed, its own or ours.
    """
    sys.path.insert(0, str(checkout))
    with refusing_extension() if device == "cpu" else nullcontext():
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        from detectron2.projects.deeplab import add_deeplab_config
        from mask2former import add_maskformer2_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(str(checkout / CONFIG))
    cfg.MODEL.DEVICE = device
    return build_model(cfg)


@contextmanager
def refusing_extension() -> Iterator[None]:
    """Who imports the extension meanwhile gets one that refuses, as the original's does on the CPU."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("Not implemented on the CPU")

    installed = sys.modules.get(EXTENSION)
    extension = types.ModuleType(EXTENSION)
    extension.ms_deform_attn_forward = extension.ms_deform_attn_backward = refuse  # type: ignore[attr-defined]
    sys.modules[EXTENSION] = extension
    try:
        yield
    finally:
        del sys.modules[EXTENSION]
        if installed:
            sys.modules[EXTENSION] = installed
