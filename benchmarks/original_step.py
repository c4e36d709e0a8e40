"""A training step of Mask2Former itself, from a checkout of github.com/facebookresearch/Mask2Former.

Its deformable attention is that of the module MultiScaleDeformableAttention, here ours: a difference between
the steps is not the operator's.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sim_m2f.config import CfgNode

CONFIG = "configs/coco/instance-segmentation/maskformer2_R50_bs16_50ep.yaml"
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OriginalTrainer:
    """Its R-50, its losses, AdamW and the clipping of its recipe, on batches of ours.

    Args:
        checkout: the folder of Mask2Former; detectron2 has to be importable.
        cfg: of the batches, with masks; SOLVER.AMP says the precision.
        device: "cpu" or "cuda".
    """

    def __init__(self, checkout: Path, cfg: CfgNode, device: str) -> None:
        sys.path.insert(0, str(checkout))
        from detectron2.config import get_cfg
        from detectron2.modeling import build_model
        from detectron2.projects.deeplab import add_deeplab_config
        from mask2former import add_maskformer2_config

        original = get_cfg()
        add_deeplab_config(original)
        add_maskformer2_config(original)
        original.merge_from_file(str(checkout / CONFIG))
        original.MODEL.DEVICE = device
        self.device, self.clip = device, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
        automatic = "bf16" if cfg.SOLVER.AMP.DTYPE == "auto" else cfg.SOLVER.AMP.DTYPE
        precision = automatic if cfg.SOLVER.AMP.ENABLED and device == "cuda" else "no"
        self.accelerator = SimpleNamespace(mixed_precision=precision)
        self.model = build_model(original).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.SOLVER.BASE_LR, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")

    def step(self, batch: dict[str, Any]) -> None:
        precision = self.accelerator.mixed_precision
        with torch.autocast(self.device, TYPES.get(precision), enabled=precision != "no"):
            losses = self.model(
                [self._input(*pair) for pair in zip(batch["images"], batch["targets"], strict=True)]
            )
        self.backward(sum(losses.values()))
        self.update()

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def _input(self, image: Tensor, target: dict[str, Tensor]) -> dict[str, Any]:
        """What its data mapper gives."""
        from detectron2.structures import Instances

        instances = Instances(tuple(image.shape[1:]))
        instances.gt_classes, instances.gt_masks = target["labels"], target["masks"]
        return {"image": image, "instances": instances}
