"""Strong colour augmentation for the student; teacher and losses see the images as they are (BoxTeacher)."""

import torch
from torch import Tensor
from torchvision.transforms import v2

from sim_m2f.pixels import Pixels

CHANGES = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.5),
    ]
)


def student_colors(images: Tensor, pixels: Pixels, share: float) -> Tensor:
    """Each image, with probability ``share``, in other colours, grey or blurred; padding stays.

    Draws from torch's global random state of the CPU.

    Args:
        images: (B, 3, H, W), normalised, 0 on padding.
        pixels: how they are normalised.
        share: of the images, 0 to 1.
    """
    changed = images.clone()
    for index in (torch.rand(len(images)) < share).nonzero()[:, 0].tolist():
        rgb = CHANGES((pixels.undo(images[index]) / 255).clamp(0, 1))
        changed[index] = pixels.normalise(255 * rgb).where(images[index] != 0, 0)
    return changed
