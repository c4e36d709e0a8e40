"""Mask2Former's large-scale jitter for training, detectron2's resizing for tests, on tv_tensors.

A sample is ``structures.Annotated``. torchvision's own ScaleJitter and RandomShortestSize round down (narrow
images to nothing) and its RandomCrop pads on all sides.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sim_m2f.config import CfgNode
from sim_m2f.structures import Annotated

FLIPS = {"horizontal": v2.RandomHorizontalFlip, "vertical": v2.RandomVerticalFlip, "none": v2.Identity}
MIN_BOX = 1.0  # a box thinner than this many pixels after the crop is dropped


class LargeScaleJitter(v2.ScaleJitter):
    """Resize to fit ``target_size`` times u, u uniform in ``scale_range``; keep the aspect ratio.

    A mask owns a pixel when it fills at least half as much of it as of the one that it fills most.
    torchvision takes the nearest pixel up and to the left, which shifts masks against images and boxes.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        least, most = self.scale_range
        scale = least + (most - least) * torch.rand(()).item()
        factor = scale * self.target_size[0] / max(height, width)
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask) or inpt.ndim != 3 or not len(inpt):
            return super().transform(inpt, params)
        shares = F.resize_image(255 * inpt.as_subclass(Tensor), params["size"], antialias=True)
        return tv_tensors.Mask((shares > shares.amax((1, 2), keepdim=True) // 2).view(torch.uint8))


class CropToFit(v2.RandomCrop):
    """Crop to at most ``size`` pixels at a random place, without padding; boxes are clipped."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        old = v2.query_size(flat_inputs)
        height, width = map(min, old, self.size)
        top, left = (int(torch.randint(a - b + 1, ())) for a, b in zip(old, (height, width), strict=True))
        place = {"top": top, "left": left, "height": height, "width": width}
        return {"needs_crop": True, "needs_pad": False, **place}


class ResizeShortestEdge(v2.RandomShortestSize):
    """Resize the shorter side to ``min_size`` pixels, or less where the longer would pass ``max_size``."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = min(self.min_size[0] / min(height, width), self.max_size / max(height, width))
        return {"size": [max(1, int(side * factor + 0.5)) for side in (height, width)]}


def drop_lost(sample: Annotated) -> Annotated:
    """Drop the objects whose box is thinner than MIN_BOX, and those of whose true mask nothing is left."""
    boxes = sample["boxes"]
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX).all(dim=1)
    if "masks" in sample:
        seen = sample["masks"].bool().flatten(1).any(dim=1)
        kept &= seen | ~sample["known"]
    names = "boxes", "labels", "masks", "known", "proposals", "proposal_scores"
    tensors = cast(dict[str, torch.Tensor], sample)
    remaining = {name: value[kept] if name in names else value for name, value in tensors.items()}
    return cast(Annotated, remaining)


def train_augmentation(cfg: CfgNode) -> v2.Transform:
    """Flip, jitter and crop as INPUT.* says; draws from torch's global random state."""
    size = cfg.INPUT.IMAGE_SIZE
    jitter = LargeScaleJitter((size, size), (cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE))
    return v2.Compose([FLIPS[cfg.INPUT.RANDOM_FLIP](), jitter, CropToFit(size), drop_lost])


def eval_augmentation(cfg: CfgNode) -> v2.Transform:
    """Resize as INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST say; MIN_SIZE_TEST 0 keeps the size."""
    if cfg.INPUT.MIN_SIZE_TEST == 0:
        return v2.Identity()
    return ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
