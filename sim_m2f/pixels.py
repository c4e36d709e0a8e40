"""Normalising the pixels of images, and undoing it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.structures import Size


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

    def of_batch(self, images: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Padded images on any device to what the network sees, on this one; they travel as they are.

        Args:
            images: (B, 3, H, W) RGB of 0 to 255.
            sizes: height and width of each image without its padding.

        Returns:
            (B, 3, H, W) float32, channels last, 0 on padding.
        """
        device, (height, width) = self.mean.device, images.shape[-2:]
        travelled = images.to(device, memory_format=torch.channels_last, non_blocking=True)
        heights, widths = torch.tensor(sizes).to(device, non_blocking=True)[..., None, None].unbind(1)
        beyond_y = torch.arange(height, device=device)[:, None] >= heights
        beyond_x = torch.arange(width, device=device) >= widths
        return self.normalise(travelled).masked_fill_((beyond_y | beyond_x)[:, None], 0)

    def undo(self, images: Tensor) -> Tensor:
        """What ``normalise`` gave, (..., 3, H, W), to RGB of 0 to 255, float32."""
        return images.float() * self.std + self.mean
