"""The original Mask2Former, learning from boxes: SIMCriterion in place of its SetCriterion.

    MASK2FORMER_REPO=/path/of/Mask2Former python examples/original_mask2former.py

trains the original's R-50 for a few steps on made-up images with boxes. It needs detectron2 and, on the
Python path, the original's repository. The operator MultiScaleDeformableAttention that the original imports
is the one that this project installs.
"""

import argparse
import os
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.structures import Boxes, ImageList, Instances
from mask2former import add_maskformer2_config
from mask2former.maskformer_model import MaskFormer
from torch import Tensor, nn

import sim_m2f
from sim_m2f.supervision.criterion import SIMCriterion

LOSSES = ("loss_ce", "loss_projection", "loss_pairwise", "loss_box_fill")


class BoxCriterion(nn.Module):
    """SIMCriterion with SetCriterion's signature; ``images`` are those that the outputs belong to."""

    def __init__(self, cfg: sim_m2f.config.CfgNode) -> None:
        super().__init__()
        self.criterion = SIMCriterion(cfg)
        self.weight_dict = dict.fromkeys(LOSSES, 1.0)  # the losses are weighted already
        self.images: Tensor | None = None

    def forward(self, outputs: dict, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        losses, matched = self.criterion(outputs, targets, self.images)
        self.criterion.update(matched)  # the original calls its criterion once a step
        return losses


class BoxMaskFormer(MaskFormer):
    """The original network; its targets are boxes instead of masks."""

    def prepare_targets(self, targets: list[Instances], images: ImageList) -> list[dict[str, Tensor]]:
        self.criterion.images = images.tensor
        return [{"labels": each.gt_classes, "boxes": each.gt_boxes.tensor} for each in targets]


def box_supervised(cfg: CfgNode) -> BoxMaskFormer:
    """The original's network for its configuration ``cfg``, with the losses from boxes."""
    sim = sim_m2f.get_cfg()
    sim.merge_from_list(["MODEL.SIM.SUPERVISION", "box", "SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER])
    sim.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES])
    parts = MaskFormer.from_config(cfg)
    return BoxMaskFormer(**{**parts, "criterion": BoxCriterion(sim)}).to(cfg.MODEL.DEVICE)


def original_cfg(config_file: str, *overrides: str) -> CfgNode:
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(["MODEL.WEIGHTS", "", *overrides])
    return cfg


def made_up_batch(size: int) -> list[dict]:
    """Two images with a bright rectangle each, in detectron2's form."""
    batch = []
    for label, (left, top) in enumerate([(size // 8, size // 4), (size // 2, size // 3)]):
        image = torch.full((3, size, size), 60.0)
        right, bottom = left + size // 3, top + size // 4
        image[:, top:bottom, left:right] = 200.0
        instances = Instances((size, size))
        instances.gt_classes = torch.tensor([label])
        instances.gt_boxes = Boxes(torch.tensor([[left, top, right, bottom]]).float())
        batch.append({"image": image, "instances": instances})
    return batch


def main(arguments: list[str] | None = None) -> list[float]:
    """Train for a few steps; returns the loss of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    files = Path(os.environ.get("MASK2FORMER_REPO", ".")) / "configs/coco/instance-segmentation"
    parser.add_argument("--config-file", default=str(files / "maskformer2_R50_bs16_50ep.yaml"))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="side of the images")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the original's configuration")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = box_supervised(original_cfg(args.config_file, "MODEL.DEVICE", device, *args.opts)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch, totals = made_up_batch(args.size), []
    for step in range(args.steps):
        losses = model(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
        print(f"step {step}: " + ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items()))
    return totals


if __name__ == "__main__":
    main()
