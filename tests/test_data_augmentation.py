"""Augmentation: boxes, masks and valid pixels must stay on what they mark, whatever is drawn."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from sim_m2f import get_cfg
from sim_m2f.data import augmentation

SIZE = 64


def config(**keys):
    cfg = get_cfg()
    cfg.INPUT.IMAGE_SIZE = SIZE
    for key, value in keys.items():
        cfg.INPUT[key] = value
    return cfg


def sample(height, width, boxes, bottom_rows=0):
    """A black image with a white rectangle in each box, masks as the boxes, lowest rows not valid."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
        image[:, y1:y2, x1:x2] = 255
    valid = torch.ones(height, width, dtype=torch.uint8)
    valid[height - bottom_rows :] = 0
    return {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            format="XYXY",
            canvas_size=(height, width),
        ),
        "labels": torch.arange(len(boxes)),
        "valid": tv_tensors.Mask(valid),
        "masks": tv_tensors.Mask(masks),
        "known": torch.ones(len(boxes), dtype=torch.bool),
    }


def extent(mask):
    """The box xyxy around the true pixels of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("flip", ["horizontal", "vertical", "none"])
def test_box_and_mask_follow_the_object(flip):
    augment = augmentation.train_augmentation(config(MIN_SCALE=0.5, MAX_SCALE=2.0, RANDOM_FLIP=flip))
    kept = 0
    for seed in range(60):
        torch.manual_seed(seed)
        result = augment(sample(50, 80, [(20, 10, 50, 35)]))
        seen = result["image"][0].numpy() > 127
        if len(result["boxes"]) == 0:
            assert seen.sum() <= 2 * SIZE, "at most a sliver of a dropped object is seen"
            continue
        kept += 1
        np.testing.assert_allclose(result["boxes"][0].numpy(), extent(seen), atol=1.01)
        np.testing.assert_allclose(extent(result["masks"][0].numpy()), extent(seen), atol=1.01)
    assert kept > 40


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 0.125])
def test_masks_are_resized_without_a_shift(scale):
    augment = augmentation.train_augmentation(config(MIN_SCALE=scale, MAX_SCALE=scale, RANDOM_FLIP="none"))
    offsets = []
    for _ in range(200):
        (x, y), (width, height) = torch.randint(20, 34, (2,)).tolist(), torch.randint(16, 29, (2,)).tolist()
        result = augment(sample(SIZE, SIZE, [(x, y, x + width, y + height)]))
        offsets.append(np.subtract(extent(result["masks"][0].numpy()), result["boxes"][0].numpy()))
    assert abs(np.mean(offsets)) < 0.05


def test_a_thin_mask_stays_where_the_image_becomes_small():
    augment = augmentation.train_augmentation(config(MIN_SCALE=0.25, MAX_SCALE=0.25, RANDOM_FLIP="none"))
    thin = sample(SIZE, SIZE, [(0, 8, 64, 24), (20, 20, 40, 40)])
    thin["masks"][0] = 0
    thin["masks"][0, 17] = 1
    thin["masks"][1] = 0
    thin["known"][1] = False
    result = augment(thin)
    assert extent(result["masks"][0].numpy()) == [0, 4, 16, 5]
    assert not result["masks"][1].any()


def test_boxes_are_clipped_to_the_crop_and_thin_ones_dropped_with_label_and_mask():
    augment = augmentation.train_augmentation(config(MIN_SCALE=2.0, MAX_SCALE=2.0, RANDOM_FLIP="none"))
    boxes = [(x, y, x + 12, y + 12) for x in range(0, 64, 16) for y in range(0, 64, 16)]
    for seed in range(10):
        torch.manual_seed(seed)
        result = augment(sample(64, 64, boxes))
        remaining = result["boxes"]
        assert len(remaining) == len(result["labels"]) == len(result["masks"])
        assert 0 < len(remaining) < len(boxes)
        assert (remaining >= 0).all()
        assert (remaining <= SIZE).all()
        assert ((remaining[:, 2:] - remaining[:, :2]) >= 1).all()
        scaled = 2 * torch.tensor(boxes).float()
        left, top = (scaled[result["labels"]] - remaining)[:, :2].amax(
            0
        )  # of the crop; less where it clips a box
        expected = (scaled - torch.stack([left, top, left, top])).clamp(0, SIZE)
        large = ((expected[:, 2:] - expected[:, :2]) >= 1).all(1)
        np.testing.assert_allclose(remaining.numpy(), expected[large].numpy())


def test_objects_of_whose_known_mask_nothing_is_left_are_dropped():
    """Masks are the left third of a box; the same boxes without a known mask stay."""
    augment = augmentation.train_augmentation(config(MIN_SCALE=2.0, MAX_SCALE=2.0, RANDOM_FLIP="none"))
    lost = 0
    for seed in range(40):
        original = sample(64, 64, [(4, 8, 61, 56), (4, 8, 61, 56)])
        original["masks"][:, :, 23:] = 0
        original["masks"][1], original["known"] = 0, torch.tensor([True, False])
        original["image"][:] = 0
        original["image"][:, 8:56, 4:23] = 255
        torch.manual_seed(seed)
        result = augment(original)
        seen = bool((result["image"] > 127).any())
        assert result["labels"].tolist() == ([0, 1] if seen else [1])
        assert result["known"].tolist() == ([True, False] if seen else [False])
        assert len(result["masks"]) == len(result["boxes"]) == len(result["labels"])
        lost += not seen
    assert 0 < lost < 40


def test_no_objects():
    torch.manual_seed(0)
    result = augmentation.train_augmentation(config())(sample(50, 80, []))
    assert result["boxes"].shape == (0, 4)
    assert result["masks"].shape[0] == 0


@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
def test_the_lowest_rows_stay_marked(flip):
    augment = augmentation.train_augmentation(config(MIN_SCALE=0.8, MAX_SCALE=1.6, RANDOM_FLIP=flip))
    turned = 0
    for seed in range(40):
        torch.manual_seed(seed)
        original = sample(60, 60, [], bottom_rows=10)
        original["image"][:, 50:] = 255  # the rows that are not valid are white
        result = augment(original)
        marked, white = result["valid"].numpy() == 0, result["image"][0].numpy() > 127
        assert (marked != white).any(axis=1).sum() <= 1, "but for the row between the two"
        turned += bool(white.any() and white[0].all())
    assert (turned > 0) == (flip == "vertical")


def test_the_scale_is_uniform_and_the_aspect_ratio_kept():
    jitter = augmentation.LargeScaleJitter((100, 100), (0.1, 2.0))
    torch.manual_seed(0)
    sizes = [
        jitter(tv_tensors.Image(torch.zeros(3, 40, 80, dtype=torch.uint8))).shape[-2:] for _ in range(600)
    ]
    heights, widths = np.array(sizes).T
    assert (np.abs(heights - widths / 2) <= 0.76).all(), "each side is rounded to the nearest pixel"
    scales = np.sort(widths / 100)
    uniform = np.linspace(0.1, 2.0, len(scales))
    assert np.abs(scales - uniform).max() < 0.1, "Kolmogorov-Smirnov distance of 0.05 on a range of 1.9"


def test_the_crop_is_uniform_and_keeps_short_sides():
    crop = augmentation.CropToFit(10)
    image = torch.arange(14).repeat(1, 6, 1).to(torch.uint8)
    torch.manual_seed(0)
    starts = []
    for _ in range(500):
        result = crop(tv_tensors.Image(image))
        assert result.shape == (1, 6, 10)
        starts.append(int(result[0, 0, 0]))
        np.testing.assert_array_equal(result[0, 0].numpy(), np.arange(10) + starts[-1])
    assert np.abs(np.bincount(starts, minlength=5) - 100).max() < 40
    assert len(np.bincount(starts)) == 5


def test_narrow_images_keep_a_pixel():
    augment = augmentation.train_augmentation(config(MIN_SCALE=0.1, MAX_SCALE=0.1))
    assert augment(sample(2, 500, []))["image"].shape == (3, 1, 6)


def test_the_test_size_is_detectron2s():
    generator = np.random.default_rng(0)
    for height, width in [
        (480, 640),
        (427, 640),
        (200, 1000),
        (1, 900),
        *generator.integers(20, 900, (30, 2)),
    ]:
        scale = 800 / min(height, width)
        if scale * max(height, width) > 1333:
            scale = 1333 / max(height, width)
        expected = (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
        resize = augmentation.ResizeShortestEdge(800, 1333)
        blank = tv_tensors.Image(torch.zeros(1, int(height), int(width), dtype=torch.uint8))
        assert tuple(resize(blank).shape[-2:]) == expected


def test_min_size_test_0_keeps_the_image():
    original = sample(50, 80, [(20, 10, 50, 35)])
    result = augmentation.eval_augmentation(config(MIN_SIZE_TEST=0))(original)
    assert torch.equal(result["image"], original["image"])
