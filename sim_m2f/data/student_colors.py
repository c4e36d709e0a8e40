"""Strong colour augmentation for the student; teacher and losses see the images as they are (BoxTeacher)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from sim_m2f.draws import Seed, generator, uniform
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Size

CHANGES = v2.Compose(
    [
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(5, (0.1, 2.0))], 0.5),
    ]
)


def student_colors(
    images: Tensor, pixels: Pixels, share: float, seeds: Sequence[Seed], sizes: Sequence[Size]
) -> Tensor:
    """Each image, with probability ``share``, in other colours, grey or blurred; padding stays.

    Args:
        images: (B, 3, H, W), normalised, 0 on padding.
        pixels: how they are normalised.
        share: of the images, 0 to 1.
        seeds: of the images.
        sizes: height and width of each image without its padding.
    """
    changed = images.clone()
    for index in (uniform(seeds, "student colors", 1) < share).nonzero()[:, 0].tolist():
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(generator(seeds[index], "colors").get_state())
            rgb = CHANGES((pixels.undo(images[index]) / 255).clamp(0, 1))
        height, width = sizes[index]
        changed[index, :, :height, :width] = pixels.normalise(255 * rgb)[:, :height, :width]
    return changed
