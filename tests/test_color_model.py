"""Masks corrected by colour, against histograms counted in loops."""

import itertools
import math

import numpy as np
import pytest
import torch

import sim_m2f
from sim_m2f.supervision.affinity import rgb_to_lab
from sim_m2f.supervision.base import normalised
from sim_m2f.supervision.color_histograms import (
    BINS,
    LEAST,
    LEAST_DEVIATION,
    MOST,
    SPAN,
    color_bins,
    log_ratio,
)
from sim_m2f.supervision.color_model import (
    DISTANCES,
    ColorLabels,
    color_labels,
    corrected,
    corrected_masks,
)
from sim_m2f.supervision.color_term import color_model
from sim_m2f.supervision.copy_paste import build_copy_paste
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.matched import MatchedBoxes, Supervision
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.targets import box_pixels, flatten_targets


def smoothed(histogram: np.ndarray) -> np.ndarray:
    for axis in range(3):
        padded = np.pad(histogram, [(1, 1) if other == axis else (0, 0) for other in range(3)], mode="edge")
        low, middle, high = (np.take(padded, range(s, s + BINS[axis]), axis) for s in range(3))
        histogram = low / 4 + middle / 2 + high / 4
    return histogram


def test_the_ratio_is_that_of_smoothed_histograms():
    color, mask = torch.randint(6000, (40,)), torch.rand(40)
    color[:20] = color[0] + torch.randint(3, (20,))
    counts, target = torch.rand(40) < 0.8, torch.arange(40) // 20
    found = log_ratio(color, mask, counts, target, 2)
    for t in range(2):
        regions = np.zeros((2, math.prod(BINS)))
        for p in range(40):
            if target[p] == t and counts[p]:
                regions[0, color[p]] += mask[p].item()
                regions[1, color[p]] += 1 - mask[p].item()
        own, rest = (
            smoothed(region.reshape(BINS)).ravel() / smoothed(region.reshape(BINS)).sum()
            for region in regions
        )
        for p in range(20 * t, 20 * t + 20):
            expected = math.log((own[color[p]] + LEAST) / (rest[color[p]] + LEAST))
            assert found[p].item() == pytest.approx(min(max(expected, -MOST), MOST), abs=1e-4)


def test_bins_span_the_colours_of_each_object():
    lab = torch.tensor([50.0, 3, -20]) + torch.tensor([20.0, 9, 0.1]) * torch.randn(60, 3)
    counts, target = torch.rand(60) < 0.7, torch.arange(60) // 30
    found = color_bins(lab, counts, target, 2).tolist()
    for p in range(60):
        own = lab[(target == target[p]) & counts].double().numpy()
        width = SPAN * np.maximum(own.std(axis=0), LEAST_DEVIATION)
        place = (lab[p].double().numpy() - own.mean(axis=0)) / width + 0.5
        cell = [min(max(math.floor(x * n), 0), n - 1) for x, n in zip(place, BINS, strict=True)]
        assert found[p] == (cell[0] * BINS[1] + cell[1]) * BINS[2] + cell[2]


@pytest.fixture
def scene():
    """A red disc on green in one box, half of the box's mask wrong, and the same disc alone in its box."""
    y, x = torch.meshgrid(torch.arange(128), torch.arange(128), indexing="ij")
    disc = (y - 64) ** 2 + (x - 64) ** 2 < 30**2
    color = torch.where(
        disc, torch.tensor([200.0, 30, 30])[:, None, None], torch.tensor([30.0, 160, 60])[:, None, None]
    )
    boxes = torch.tensor([[34.0, 34.0, 94.0, 94.0]])
    targets = flatten_targets(
        [{"boxes": boxes, "labels": torch.zeros(1, dtype=torch.int64)}], (32, 32), torch.device("cpu")
    )
    return color[None], disc[2::4, 2::4], targets


def test_colours_put_a_filled_box_right(scene):
    image, disc, targets = scene
    keys = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL
    valid = torch.ones(1, 32, 32, dtype=torch.bool)
    labels = color_labels(8 * targets.box_masks - 4, image, valid, targets, keys)
    mask = labels.masks[0] > 0.5
    assert (mask & disc).sum() / (mask | disc).sum() > 0.88
    assert labels.quality[0] > 0.85
    assert not (labels.masks * (1 - targets.box_masks)).any()


def test_the_surroundings_leave_other_boxes_out(scene):
    """A second box beside the first holds red things too, which do not count as its surroundings."""
    image, _, _ = scene
    image[:, :, 30:98, 96:112] = torch.tensor([200.0, 30, 30])[:, None, None]
    boxes = torch.tensor([[34.0, 34.0, 94.0, 94.0], [96.0, 30.0, 112.0, 98.0]])
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}
    keys, valid = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL, torch.ones(1, 32, 32, dtype=torch.bool)
    found = []
    for count in (2, 1):
        part = {name: values[:count] for name, values in target.items()}
        targets = flatten_targets([part], (32, 32), torch.device("cpu"))
        found.append(color_labels(4 * targets.box_masks - 3, image, valid, targets, keys).masks[0])
    red = (image[0, 0, 2::4, 2::4] > 100) & (targets.box_masks[0] > 0)
    assert found[0][red].mean() > found[1][red].mean()


def test_neighbours_of_like_colour_draw_each_other(scene):
    """One mean-field step from one histogram, written out in loops, with a box that the image's edge cuts."""
    generator = torch.Generator().manual_seed(3)
    image = (scene[0] + 60 * torch.randn(1, 3, 128, 128, generator=generator)).clamp(0, 255)
    box = {"boxes": torch.tensor([[96.0, 40.0, 128.0, 64.0]]), "labels": torch.zeros(1, dtype=torch.int64)}
    targets = flatten_targets([box], (32, 32), torch.device("cpu"))
    logits, valid = torch.randn(1, 32, 32, generator=generator), torch.ones(1, 32, 32, dtype=torch.bool)
    keys = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL
    keys.ITERATIONS, keys.SMOOTHING_STEPS, keys.SPAN = 1, 0, 0.0
    before = corrected(logits, image, valid, targets, keys)[0].double()
    keys.SMOOTHING_STEPS = 1
    after = corrected(logits, image, valid, targets, keys)[0].double()
    lab = rgb_to_lab(torch.nn.functional.avg_pool2d(image, 2) / 255)[0].permute(1, 2, 0).double()
    left, top, right, bottom = 48 - 4, 20 - 4, 64, 32 + 4  # the box, and four pixels around it in the image
    for y, x in itertools.product(range(20, 32), range(48, 64)):
        drawn = 0.0
        for distance in DISTANCES:
            for dy, dx in itertools.product((-distance, 0, distance), repeat=2):
                if (dy or dx) and left <= x + dx < right and top <= y + dy < bottom:
                    apart = ((lab[y, x] - lab[y + dy, x + dx]) ** 2).sum() / (2 * keys.SMOOTHING_COLOR**2)
                    drawn += math.exp(-apart) * (2 * before[y + dy, x + dx].item() - 1) / len(DISTANCES)
        expected = before[y, x].logit() + keys.SMOOTHING * drawn
        assert after[y, x].item() == pytest.approx(expected.sigmoid().item(), abs=2e-5)


def test_a_pixel_belongs_to_one_object_at_most():
    """Two boxes that overlap on an image of one colour, which says nothing; by the definition in float64."""
    boxes = torch.tensor([[8.0, 8.0, 80.0, 80.0], [48.0, 48.0, 120.0, 120.0]])
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}
    targets = flatten_targets([target], (32, 32), torch.device("cpu"))
    keys, valid = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL, torch.ones(1, 32, 32, dtype=torch.bool)
    keys.ITERATIONS, keys.SMOOTHING_STEPS, keys.SPAN, keys.KEEP = 1, 0, 0.0, 1.0
    logits = torch.tensor([2.0, -1.0])[:, None, None].expand(2, 32, 32)
    found = corrected(logits, torch.full((1, 3, 128, 128), 90.0), valid, targets, keys).double()
    odds = torch.tensor([2.0, -1.0], dtype=torch.float64).exp()
    assert torch.allclose(found[:, 32, 32], odds / (1 + odds.sum()), atol=1e-3)
    assert found[0, 16, 16].item() == pytest.approx((odds[0] / (1 + odds[0])).item(), abs=1e-3)
    assert found[1, 16, 16] == 0
    huge = corrected(torch.full((2, 32, 32), 500.0), torch.zeros(1, 3, 128, 128), valid, targets, keys)
    assert huge[:, 32, 32].tolist() == pytest.approx([0.5, 0.5])


def test_boxes_alone_are_corrected_as_in_images_of_their_own(scene):
    """Three boxes on one object, in one image as if alone, and in three images."""
    image, _, _ = scene
    boxes = torch.tensor([[34.0, 34.0, 94.0, 94.0], [40.0, 40.0, 120.0, 104.0], [8.0, 30.0, 90.0, 90.0]])
    logits = 4 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(5))
    keys, device = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL, torch.device("cpu")
    together = [{"boxes": boxes, "labels": torch.zeros(3, dtype=torch.int64)}]
    apart = [{"boxes": box[None], "labels": torch.zeros(1, dtype=torch.int64)} for box in boxes]
    valid = torch.ones(3, 32, 32, dtype=torch.bool)
    found = corrected(logits, image, valid[:1], flatten_targets(together, (32, 32), device), keys, alone=True)
    expected = corrected(
        logits, image.expand(3, -1, -1, -1), valid, flatten_targets(apart, (32, 32), device), keys
    )
    assert torch.allclose(found, expected, atol=1e-6)


def test_masks_rise_until_they_span_their_boxes(scene):
    """A red disc in two boxes that are too wide for it: both masks as they are, and as high as they must."""
    boxes = torch.tensor([[10.0, 10.0, 118.0, 118.0], [0.0, 26.0, 128.0, 102.0]])
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}
    targets = flatten_targets([target], (32, 32), torch.device("cpu"))
    keys, valid = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL, torch.ones(1, 32, 32, dtype=torch.bool)
    logits = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(0)) - 2
    keys.SPAN = 0.0
    before = corrected(logits, scene[0], valid, targets, keys)
    keys.SPAN = 0.7
    after = corrected(logits, scene[0], valid, targets, keys)
    for mask, expected, (x0, y0, x1, y1) in zip(after, before, (2 * targets.ranges).tolist(), strict=True):
        own = expected[y0:y1, x0:x1].clamp(1e-6, 1 - 1e-6).logit().double()
        rise = next(rise for rise in np.arange(0, 4.01, 0.25) if spanned(own + rise) >= 0.7 or rise == 4)
        assert rise > 0
        assert torch.allclose(mask[y0:y1, x0:x1].double(), (own + rise).sigmoid(), atol=1e-5)


def spanned(logits: torch.Tensor) -> float:
    """The share of a map that the box around the positive logits covers."""
    rows, columns = np.nonzero(logits.numpy() > 0)
    return (np.ptp(rows) + 1) * (np.ptp(columns) + 1) / logits.numel() if len(rows) else 0.0


def test_without_a_network_the_first_mask_is_an_ellipse(scene):
    image, disc, targets = scene
    keys, valid = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL, torch.ones(1, 32, 32, dtype=torch.bool)
    nonsense = torch.full((1, 32, 32), -50.0)
    mask = color_labels(nonsense, image, valid, targets, keys, prior=1.0).masks[0] > 0.5
    assert (mask & disc).sum() / (mask | disc).sum() > 0.9
    assert not (color_labels(nonsense, image, valid, targets, keys).masks > 0.5).any()


def test_only_good_labels_are_learned_and_only_after_the_start(scene):
    image, _, _ = scene
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1, "MODEL.SIM.SUPERVISION", "box"])
    cfg.merge_from_list(["MODEL.SIM.COLOR_MODEL.ENABLED", True, "MODEL.SIM.COLOR_MODEL.START", 1.0])
    cfg.merge_from_list(["MODEL.SIM.COLOR_MODEL.WARMUP", 0.0])
    masks = torch.full((1, 2, 32, 32), -4.0)
    masks[0, :, 9:23, 9:23] = 4
    outputs = {
        "pred_logits": torch.zeros(1, 2, 2),
        "pred_masks": masks,
        "mask_features": torch.zeros(1, 4, 32, 32),
    }
    targets = [
        {"boxes": torch.tensor([[34.0, 34.0, 94.0, 94.0]]), "labels": torch.zeros(1, dtype=torch.int64)}
    ]
    criterion = build_criterion(cfg)
    normalised = criterion.pixels.normalise(image)
    outputs["aux_outputs"] = []
    losses, matched = criterion(outputs, targets, normalised)
    assert "loss_color_model" not in losses
    criterion.update(matched)
    loss = criterion(outputs, targets, normalised)[0]["loss_color_model"]
    assert loss > 0
    shifted = {**outputs, "pred_masks": masks.roll(16, dims=3)}  # the same mask, but beside the box
    assert criterion(shifted, targets, normalised)[0]["loss_color_model"] > 4 * loss
    criterion.sim.COLOR_MODEL.MIN_IOU = 0.999
    assert criterion(outputs, targets, normalised)[0]["loss_color_model"] == 0


def test_an_object_without_a_query_takes_no_other_objects_mask(scene):
    """As beside a query that knows nothing, and it is not pasted."""
    image, _, _ = scene
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1, "MODEL.SIM.SUPERVISION", "box"])
    cfg.merge_from_list(["MODEL.SIM.COLOR_MODEL.ENABLED", True])
    cfg.merge_from_list(["MODEL.SIM.COLOR_MODEL.START", 0.0, "MODEL.SIM.COLOR_MODEL.WARMUP", 0.0])
    cfg.merge_from_list(["MODEL.SIM.COLOR_MODEL.PRIOR", 0.0, "MODEL.SIM.COPY_PASTE.ENABLED", True])
    boxes = torch.tensor([[50.0, 34.0, 126.0, 94.0], [34.0, 34.0, 94.0, 94.0]])
    targets = [{"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}]
    masks = torch.zeros(1, 2, 32, 32)
    masks[0, 0] = -4
    masks[0, 0, 9:23, 9:23] = 4  # of the second object
    criterion, made = build_criterion(cfg), []
    copying = build_copy_paste(cfg, torch.device("cpu"))
    for queries in (1, 2):
        outputs = {
            "pred_logits": torch.zeros(1, queries, 2),
            "pred_masks": masks[:, :queries],
            "mask_features": torch.zeros(1, 4, 32, 32),
            "aux_outputs": [],
        }
        _, matched = criterion(outputs, targets, criterion.pixels.normalise(image))
        assert matched.match.query[0, 1] == 0
        assert matched.match.matched.tolist() == [[queries == 2, True]]
        made.append(matched.supervision.colors)
        copying.remember(criterion.pixels.normalise(image), [matched], copying.start)
    torch.testing.assert_close(made[0].masks, made[1].masks, rtol=0, atol=0)
    assert made[1].quality.min() > 0
    assert copying.bank.scores[:2].tolist() == made[0].quality.tolist() == [0, made[1].quality[1]]


@pytest.mark.parametrize("other", ["known", "pasted"])
def test_the_only_mask_of_an_image_that_is_learned_is_as_sure_as_any(scene, other):
    """Whatever is made of objects that learn otherwise; two that are learned share their weights."""
    image, _, _ = scene
    sim, flags = sim_m2f.get_cfg().MODEL.SIM, torch.tensor([False, True])
    target = {"boxes": torch.tensor([[34.0, 34.0, 94.0, 94.0]] * 2), "labels": torch.zeros(2).long()}
    others = {other: flags, "pasted_masks": torch.zeros(2, 32, 32, dtype=torch.bool)}
    colors = ColorLabels(torch.rand(2, 32, 32), torch.tensor([0.9, 0.8]), torch.tensor([0.6, 0.9]))
    predicted, valid = torch.randn(1, 1, 2, 32, 32), torch.ones(1, 32, 32, dtype=torch.bool)
    match = Match(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))

    def loss(trust: float, **fields: torch.Tensor) -> torch.Tensor:
        sim.COLOR_MODEL.TRUST = trust
        objects = flatten_targets([{**target, **fields, "seed": (0, 0, 0)}], (32, 32), torch.device("cpu"))
        objects = normalised(objects, torch.tensor([1, 2, 0, 2]))
        own = sim, (200, 1.0, 0.0), 0, 1, image, valid, box_pixels(objects), None, None, colors
        return color_model(MatchedBoxes(objects, match, predicted, Supervision(*own)))

    assert loss(0.0, **others) > 0
    torch.testing.assert_close(loss(3.0, **others), loss(0.0, **others))
    assert not torch.isclose(loss(3.0), loss(0.0), rtol=1e-3)


def test_given_boxes_are_corrected_at_twice_the_masks_size(scene):
    image, _, targets = scene
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disc = (2 * y + 1 - 64) ** 2 + (2 * x + 1 - 64) ** 2 < 30**2
    keys = sim_m2f.get_cfg().MODEL.SIM.COLOR_MODEL
    logits = corrected_masks(8 * targets.box_masks - 4, image[0], targets.boxes, (128, 128), keys)
    mask = logits[0] > 0
    assert mask.shape == (64, 64)
    assert (mask & disc).sum() / (mask | disc).sum() > 0.93
