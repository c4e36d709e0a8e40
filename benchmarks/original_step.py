"""A training step of Mask2Former itself; see ``original`` for what computes its deformable attention."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import original
import torch
from torch import Tensor

from sim_m2f.config import CfgNode

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class OriginalTrainer:
    """Its R-50, its losses, AdamW and the clipping of its recipe, on batches of ours.

    Args:
        checkout: the folder of Mask2Former; detectron2 has to be importable.
        cfg: of the batches, with masks; SOLVER.AMP says the precision.
        device: "cpu" or "cuda".
    """

    def __init__(self, checkout: Path, cfg: CfgNode, device: str) -> None:
        self.device, self.clip = device, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE
        automatic = "bf16" if cfg.SOLVER.AMP.DTYPE == "auto" else cfg.SOLVER.AMP.DTYPE
        precision = automatic if cfg.SOLVER.AMP.ENABLED and device == "cuda" else "no"
        self.accelerator = SimpleNamespace(mixed_precision=precision)
        self.model = original.build(checkout, device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.SOLVER.BASE_LR)
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
