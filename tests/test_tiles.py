"""Images as tiles, against scipy's connected components of the whole image."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from sim_m2f.config import extent_warning, validate
from sim_m2f.errors import UserError
from sim_m2f.modeling import build_model
from sim_m2f.modeling.tiles import OUTSIDE, tile_corners, tiled
from sim_m2f.structures import Prompts

SIDE, TILE = 192, 64


class Components(torch.nn.Module):
    """A network that sees bright regions: a query per connected component of what it is shown, 12 in all.

    A prompted query answers with the component at the middle of its box.
    """

    def forward(self, images: Tensor, auxiliary: bool = True, prompts: Prompts | None = None) -> dict:
        maps = [self.components(image) for image in images]
        logits = torch.zeros(len(images), 12, 2)
        for own, found in zip(logits, maps, strict=True):
            own[:, 0] = torch.where(found.flatten(1).any(1), 4.0, -4.0)
        outputs = {"pred_logits": logits, "pred_masks": torch.where(torch.stack(maps), 8.0, -8.0)}
        if prompts:
            outputs["prompted"] = self.prompted(maps, prompts)
        return outputs

    @staticmethod
    def components(image: Tensor) -> Tensor:
        labels, _ = ndimage.label((image[0, ::4, ::4] > 0.5).numpy())
        return torch.from_numpy(labels == np.arange(1, 13)[:, None, None])

    @staticmethod
    def prompted(maps: list[Tensor], prompts: Prompts) -> dict:
        masks = torch.full((*prompts.labels.shape, *maps[0].shape[1:]), -8.0)
        for found, boxes, own in zip(maps, prompts.boxes, masks, strict=True):
            side = torch.tensor(found.shape[:0:-1])
            middles = ((boxes[:, :2] + boxes[:, 2:]) / 2 * side).long().tolist()
            for (x, y), mask in zip(middles, own, strict=True):
                hit = found[:, min(y, side[1] - 1), min(x, side[0] - 1)]
                mask[found[hit].any(0)] = 8.0
        return {"pred_logits": torch.zeros(*prompts.labels.shape, 2), "pred_masks": masks}


def squares(seed: int, side: int = SIDE) -> Tensor:
    """(1, 3, side, side): bright squares of 8 to 16 pixels that do not touch, a quarter of a tile at most."""
    generator = np.random.default_rng(seed)
    image = torch.zeros(1, 3, side, side)
    for y in range(0, side, 24):
        for x in range(0, side, 24):
            height, width = 4 * generator.integers(2, 5, 2)
            top, left = 4 * generator.integers(0, 2, 2)
            if generator.random() < 0.5:
                image[..., y + top : y + top + height, x + left : x + left + width] = 1
    return image


@pytest.mark.parametrize(("seed", "side"), [*((seed, SIDE) for seed in range(5)), (5, 768)])
def test_every_object_is_found_once_and_whole(seed: int, side: int) -> None:
    image = squares(seed, side)
    truth, count = ndimage.label((image[0, 0, ::4, ::4] > 0.5).numpy())
    assert (count > 500) == (side > SIDE)
    masks = tiled(Components(), image, TILE, objects=600)["pred_masks"][0] > 0
    assert len(masks) == count
    expected = {np.flatnonzero(truth == label).tobytes() for label in range(1, count + 1)}
    assert {np.flatnonzero(mask.numpy()).tobytes() for mask in masks} == expected


@pytest.mark.parametrize("seed", range(3))
def test_prompted_boxes_keep_their_order_and_their_objects(seed: int) -> None:
    image = squares(seed)
    truth, count = ndimage.label((image[0, 0, ::4, ::4] > 0.5).numpy())
    order = np.random.default_rng(seed).permutation(count)
    places = ndimage.find_objects(truth)
    pixels = [[places[i][1].start, places[i][0].start, places[i][1].stop, places[i][0].stop] for i in order]
    prompts = Prompts(torch.tensor(pixels)[None] * 4 / SIDE, torch.zeros(1, count).long())
    masks = tiled(Components(), image, TILE, prompts)["prompted"]["pred_masks"][0]
    for index, mask in zip(order, masks, strict=True):
        assert ((mask > 0).numpy() == (truth == index + 1)).all()
    assert masks.min() == OUTSIDE


def test_tiles_cover_the_image_and_overlap() -> None:
    for height, width in ((64, 64), (96, 64), (640, 1056), (256, 2048)):
        corners = tile_corners(height, width, 64)
        seen = torch.zeros(height, width)
        for top, left in corners.tolist():
            assert top % 4 == left % 4 == 0
            assert top + 64 <= height
            assert left + 64 <= width
            seen[top : top + 64, left : left + 64] += 1
        assert seen.min() >= 1
        for axis in (0, 1):
            lines = corners[:, axis].unique()
            assert (lines.diff() <= 48 + 4).all()


def test_an_image_of_one_tile_and_an_empty_one(small_cfg) -> None:
    network = build_model(small_cfg).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        whole, same = network(image, auxiliary=False), tiled(network, image, 64)
    assert torch.equal(whole["pred_masks"], same["pred_masks"])
    empty = tiled(Components(), torch.zeros(1, 3, SIDE, SIDE), TILE)
    assert empty["pred_masks"].shape == (1, 1, SIDE // 4, SIDE // 4)
    assert not (empty["pred_masks"] > 0).any()


class HalfShared(torch.nn.Module):
    """Sees two masks of 4096 pixels each in the first tile, as many of them shared as it is told."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, images: Tensor, auxiliary: bool = True) -> dict:
        masks = torch.full((len(images), 2, 96 * 96), -8.0)
        masks[0, 0, :4096] = masks[0, 1, 4096 - self.shared : 8192 - self.shared] = 8.0
        logits = torch.tensor([4.0, -4.0]).expand(len(images), 2, 2)
        return {"pred_logits": logits, "pred_masks": masks.view(-1, 2, 96, 96)}


@pytest.mark.parametrize(("shared", "count"), [(2048, 2), (2049, 1)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, None])
def test_duplicates_are_counted_to_the_pixel(shared: int, count: int, kind: torch.dtype | None) -> None:
    with torch.autocast("cpu", dtype=kind, enabled=kind is not None):
        found = tiled(HalfShared(shared), torch.zeros(1, 3, 384, 416), 384)
    assert found["pred_masks"].shape == (1, count, 96, 104)


class Nested(torch.nn.Module):
    """Sees an object of the first class in every tile that has bright pixels, and in it a dark part of the
    second class; with ``twice`` the bright object as one of the second class as well.
    """

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice

    def forward(self, images: Tensor, auxiliary: bool = True) -> dict:
        shown = images[:, 0, ::4, ::4]
        whole = shown > 0.2
        part = whole if self.twice else whole & (shown < 0.8)
        masks = torch.where(torch.stack([whole, part], 1), 8.0, -8.0)
        return {
            "pred_logits": torch.diag(torch.tensor([6.0, 5.0, 0.0]))[:2].repeat(len(images), 1, 1),
            "pred_masks": masks,
        }


@pytest.mark.parametrize(("twice", "classes"), [(False, [0, 1]), (True, [0])])
def test_an_object_in_one_of_another_class_stays_and_a_duplicate_does_not(twice, classes) -> None:
    image = torch.zeros(1, 3, 256, 448)
    image[..., 40:160, 200:256] = 1.0
    image[..., 80:112, 220:240] = 0.5
    found = tiled(Nested(twice), image, 256)
    assert found["pred_logits"][0].argmax(-1).tolist() == classes
    if not twice:
        assert (found["pred_masks"][0] > 0).sum((1, 2)).tolist() == [30 * 14, 8 * 5]


def test_configuration(small_cfg) -> None:
    cfg = small_cfg
    cfg.TEST.TILE = 100
    with pytest.raises(UserError, match=r"TEST\.TILE is 100; use a multiple of 32"):
        validate(cfg)
    cfg.merge_from_list(["TEST.TILE", "256", "INPUT.MIN_SIZE_TEST", "512", "INPUT.MAX_SIZE_TEST", "512"])
    cfg.merge_from_list(["INPUT.MIN_SCALE", "1.7", "INPUT.MAX_SCALE", "2.4"])
    assert extent_warning(cfg) == ""
    cfg.merge_from_list(["INPUT.MIN_SCALE", "0.8", "INPUT.MAX_SCALE", "1.2"])
    assert "2 times as large as a tile" in extent_warning(cfg)
