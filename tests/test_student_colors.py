"""What the student sees in other colours, and what it does not touch."""

import pytest
import torch

from sim_m2f.data.student_colors import student_colors
from sim_m2f.pixels import Pixels

UNSEEDED = [None] * 4


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
    assert torch.equal(student_colors(given, pixels, 0.0, UNSEEDED), given)
    changed = sum(
        (student_colors(given, pixels, 0.5, UNSEEDED) != given).flatten(1).any(1).sum().item()
        for _ in range(50)
    )
    assert 0.4 < changed / 200 < 0.55  # a change may be none: one in 40 draws of CHANGES
    assert torch.equal(given, kept)
    seen = student_colors(given, pixels, 1.0, UNSEEDED)
    assert torch.equal(seen[..., 48:], given[..., 48:])
    rgb = pixels.undo(seen[..., :48])
    assert rgb.min() > -1e-3
    assert rgb.max() < 255 + 1e-3


def test_an_image_has_the_colours_of_its_seed(pixels) -> None:
    given, seeds = images(pixels), [(0, 7, slot) for slot in range(4)]
    together = student_colors(given, pixels, 1.0, seeds)
    alone = [student_colors(given[i : i + 1], pixels, 1.0, seeds[i : i + 1]) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, student_colors(given, pixels, 1.0, [(0, 8, slot) for slot in range(4)]))
