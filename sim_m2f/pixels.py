"""Normalising the pixels of images, and undoing it."""

import torch
from torch import Tensor, nn

from sim_m2f.config import CfgNode


class Pixels(nn.Module):
    """MODEL.PIXEL_MEAN and MODEL.PIXEL_STD; not part of any ``state_dict``."""

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1), persistent=False)

    def normalise(self, rgb: Tensor) -> Tensor:
        """(..., 3, H, W) RGB of 0 to 255 to what the network sees, float32."""
        return (rgb - self.mean) / self.std

    def undo(self, images: Tensor) -> Tensor:
        """What ``normalise`` gave, (..., 3, H, W), to RGB of 0 to 255, float32."""
        return images.float() * self.std + self.mean
