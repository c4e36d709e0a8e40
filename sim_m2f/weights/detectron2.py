"""Checkpoints that the original Mask2Former loads: container, names, buffers and format versions."""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.errors import UserError
from sim_m2f.weights.names import detectron2_names, to_names
from sim_m2f.weights.swin import relative_position_indices
from sim_m2f.weights.transformers import class_weights

BACKBONES = ("build_resnet_backbone", "D2SwinTransformer")
HEAD_VERSION, FROZEN_NORM_VERSION = 2, 3


def detectron2_checkpoint(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Any]:
    """What ``torch.save`` has to write for the original's ``MODEL.WEIGHTS``; nothing is missing in it.

    The original renames the weights of its head unless the file says that they are of version 2; so the
    versions of its modules come along, as PyTorch keeps them beside the weights.

    Raises:
        UserError: detectron2 has no such backbone.
    """
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONES:
        raise UserError(f"MODEL.BACKBONE.NAME {name}: the original has {' and '.join(BACKBONES)} only")
    expected = {**weights, **relative_position_indices(weights, cfg)}
    model: Any = OrderedDict(to_names(expected, detectron2_names))
    model["criterion.empty_weight"] = class_weights(cfg)
    norms = [name.removesuffix(".running_mean") for name in model if name.endswith(".running_mean")]
    versions = {"": 1, "sem_seg_head": HEAD_VERSION, "sem_seg_head.predictor": HEAD_VERSION}
    versions |= dict.fromkeys(norms, FROZEN_NORM_VERSION)
    model._metadata = OrderedDict((name, {"version": number}) for name, number in versions.items())
    return {"model": model, "__author__": "SIM-M2F"}
