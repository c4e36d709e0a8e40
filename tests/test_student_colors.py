"""What the student sees in other colours, and what it does not touch."""

import pytest
import torch

from sim_m2f.data.student_colors import student_colors
from sim_m2f.pixels import Pixels

UNSEEDED, SIZES = [None] * 4, [(64, 48)] * 4


@pytest.fixture
def pixels(small_cfg) -> Pixels:
    return Pixels(small_cfg)


def images(pixels: Pixels) -> torch.Tensor:
    """Four images of random colours, the last 16 columns of each padding."""
    rgb = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    normalised = pixels.normalise(rgb)
    normalised[..., 48:] = 0
    return normalised


def test_share_of_the_images_changes_and_padding_stays(pixels) -> None:
    given = images(pixels)
    kept = given.clone()
    torch.manual_seed(0)
    assert torch.equal(student_colors(given, pixels, 0.0, UNSEEDED, SIZES), given)
    changed = sum(
        (student_colors(given, pixels, 0.5, UNSEEDED, SIZES) != given).flatten(1).any(1).sum().item()
        for _ in range(50)
    )
    assert 0.4 < changed / 200 < 0.55  # a change may be none: one in 40 draws of CHANGES
    assert torch.equal(given, kept)
    seen = student_colors(given, pixels, 1.0, UNSEEDED, SIZES)
    assert torch.equal(seen[..., 48:], given[..., 48:])
    rgb = pixels.undo(seen[..., :48])
    assert rgb.min() > -1e-3
    assert rgb.max() < 255 + 1e-3


def test_an_image_has_the_colours_of_its_seed(pixels) -> None:
    given, seeds = images(pixels), [(0, 7, slot) for slot in range(4)]
    together = student_colors(given, pixels, 1.0, seeds, SIZES)
    alone = [student_colors(given[i : i + 1], pixels, 1.0, seeds[i : i + 1], SIZES[:1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(
        together, student_colors(given, pixels, 1.0, [(0, 8, slot) for slot in range(4)], SIZES)
    )


def test_a_pixel_of_the_mean_is_no_padding(small_cfg):
    small_cfg.MODEL.PIXEL_MEAN, small_cfg.MODEL.PIXEL_STD = [128.0] * 3, [64.0] * 3
    pixels = Pixels(small_cfg)
    rgb = torch.full((1, 3, 32, 32), 128.0)
    rgb[..., 16:] = 127.0
    images = pixels.normalise(rgb)
    for seed in range(6):
        seen = pixels.undo(student_colors(images, pixels, 1.0, [(0, 0, seed)], [(32, 32)]))[0]
        assert (seen[:, 20, 4] - seen[:, 20, 28]).abs().max() < 3  # as alike as before
