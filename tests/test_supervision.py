"""Every part of the supervision by boxes against its definition, written out in float64 loops."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from skimage.color import rgb2lab

import sim_m2f
from sim_m2f.supervision.affinity import color_affinity, edge_mask, neighbour_offsets, rgb_to_lab
from sim_m2f.supervision.base import normalised
from sim_m2f.supervision.box_edges import box_edges
from sim_m2f.supervision.box_fill import box_fill_loss
from sim_m2f.supervision.criterion import TERMS, build_criterion
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.level_set import level_set, region_energy
from sim_m2f.supervision.mask_supervision import sample_together
from sim_m2f.supervision.matched import MatchedBoxes, Supervision
from sim_m2f.supervision.matcher import BoxMatcher, Match
from sim_m2f.supervision.pairwise import SameLabel, pairwise_loss
from sim_m2f.supervision.projection import projection_loss
from sim_m2f.supervision.targets import box_pixels, box_ranges, flatten_targets

HEIGHT, WIDTH = 9, 12
NEIGHBOURS = [(dy, dx) for dy in (-2, 0, 2) for dx in (-2, 0, 2) if (dy, dx) != (0, 0)]
BOXES = {
    "inside": [9.0, 6.0, 30.0, 25.0],
    "whole image": [0.0, 0.0, 48.0, 36.0],
    "left upper corner": [0.0, 0.0, 9.5, 7.0],
    "right lower corner": [37.0, 28.0, 48.0, 36.0],
    "between two centres": [10.2, 10.2, 11.0, 11.0],
    "a line at the end": [47.9, 0.0, 48.0, 36.0],
    "centres on its edges": [2.0, 2.0, 6.0, 10.0],
}


def owned(box: list[float]) -> set[tuple[int, int]]:
    """(row, column) of every pixel at stride 4 that a box owns."""
    x1, y1, x2, y2 = box
    columns = [k for k in range(WIDTH) if x1 <= 4 * (k + 0.5) < x2] or [
        min(int((x1 + x2) / 2 // 4), WIDTH - 1)
    ]
    rows = [k for k in range(HEIGHT) if y1 <= 4 * (k + 0.5) < y2] or [
        min(int((y1 + y2) / 2 // 4), HEIGHT - 1)
    ]
    return set(itertools.product(rows, columns))


def make_targets(*images: list[list[float]]):
    """Targets of the contract with classes 0, 1, 2, 0, ..."""
    return [
        {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(len(boxes)) % 3}
        for boxes in images
    ]


def flat(*images: list[list[float]]):
    return flatten_targets(make_targets(*images), (HEIGHT, WIDTH), torch.device("cpu"))


def matched_boxes(objects, masks, sim, step=0, matched=None, images=None, features=None):
    """Objects of one image, matched with the masks (L, T, h, w) in their order."""
    layers, number = masks.shape[:2]
    matched = torch.ones(layers, number, dtype=torch.bool) if matched is None else matched
    pixels = box_pixels(objects, sim.PAIRWISE.DILATION)
    supervision = Supervision(sim, (8, 3.0, 0.75), step, 100, images, None, pixels, features, None, None)
    match = Match(torch.arange(number).expand(layers, -1), matched)
    return MatchedBoxes(objects, match, masks[None], supervision)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("name", BOXES)
def test_box_masks_own_the_pixels_whose_centres_they_hold(name):
    mask = flat([BOXES[name]]).box_masks[0]
    assert {tuple(position) for position in mask.nonzero().tolist()} == owned(BOXES[name])
    assert set(mask.unique().tolist()) <= {0.0, 1.0}


def test_box_ranges_own_a_pixel_even_outside_the_image():
    ranges = box_ranges(torch.tensor([[60.0, 50.0, 70.0, 60.0], [-9.0, -9.0, -5.0, -5.0]]), (HEIGHT, WIDTH))
    assert ranges.tolist() == [[11, 8, 12, 9], [0, 0, 1, 1]]


@pytest.mark.parametrize("margin", [0, 2])
def test_box_pixels_list_every_pixel_once(margin):
    targets = flat([BOXES["inside"], BOXES["left upper corner"]], [], [BOXES["a line at the end"]])
    pixels = box_pixels(targets, margin)
    listed = list(zip(pixels.target.tolist(), pixels.y.tolist(), pixels.x.tolist(), strict=True))
    expected = set()
    for i, name in enumerate(["inside", "left upper corner", "a line at the end"]):
        for y, x in owned(BOXES[name]):
            for dy, dx in itertools.product(range(-margin, margin + 1), repeat=2):
                if 0 <= y + dy < HEIGHT and 0 <= x + dx < WIDTH:
                    expected.add((i, y + dy, x + dx))
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_lab_agrees_with_scikit_image():
    rgb = np.random.default_rng(0).random((2, 40, 50, 3))
    rgb[0, :8, :8] = np.linspace(0, 0.06, 64).reshape(8, 8, 1)  # the linear part of sRGB
    ours = rgb_to_lab(torch.from_numpy(rgb).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours.numpy(), rgb2lab(rgb), atol=2e-3)


def test_affinity_of_every_pair_of_neighbours():
    images = torch.rand(2, 3, 4 * HEIGHT, 4 * WIDTH, generator=torch.Generator().manual_seed(1)) * 60
    affinity = color_affinity(images, dilation=2)
    pooled = images.double().view(2, 3, HEIGHT, 4, WIDTH, 4).mean((3, 5)) / 255
    lab = rgb2lab(pooled.permute(0, 2, 3, 1).numpy())
    for direction, (dy, dx) in enumerate(neighbour_offsets(2)):
        for b, y, x in itertools.product(range(2), range(HEIGHT), range(WIDTH)):
            inside = 0 <= y + dy < HEIGHT and 0 <= x + dx < WIDTH
            expected = math.exp(-np.linalg.norm(lab[b, y, x] - lab[b, y + dy, x + dx]) / 2) if inside else 0.0
            assert affinity[b, direction, y, x].item() == pytest.approx(expected, abs=2e-3)


def test_affinity_has_a_gradient_free_of_nan_on_black_and_white():
    images = torch.cat([torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 255.0)])
    affinity = color_affinity(images, dilation=2)
    assert torch.isfinite(affinity).all()
    assert affinity.max() == 1


def test_edge_mask_needs_both_ends():
    valid = torch.ones(1, HEIGHT, WIDTH, dtype=torch.bool)
    valid[0, 5:, :] = False
    edges = edge_mask(valid, 2)
    for direction, (dy, dx) in enumerate(neighbour_offsets(2)):
        for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
            assert edges[0, direction, y, x].item() == (y + dy < 5 and 0 <= x + dx < WIDTH)


@pytest.mark.parametrize("name", BOXES)
def test_projection_loss_and_gradient(name):
    logits = torch.randn(2, 1, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    logits.requires_grad_()
    targets = flat([BOXES[name]])
    columns, rows = (projection.double() for projection in targets.projections)
    loss = projection_loss(logits.amax(-2), logits.amax(-1), columns, rows)
    box = owned(BOXES[name])

    def dice(u, t):
        overlap = sum(a * b for a, b in zip(u, t, strict=True))
        return 1 - 2 * overlap / (sum(a * a for a in u) + sum(b * b for b in t) + 1e-5)

    for layer in range(2):
        p = [[sigmoid(logits[layer, 0, y, x].item()) for x in range(WIDTH)] for y in range(HEIGHT)]
        along_x = dice(
            [max(p[y][x] for y in range(HEIGHT)) for x in range(WIDTH)],
            [float(x in {c for _, c in box}) for x in range(WIDTH)],
        )
        along_y = dice([max(row) for row in p], [float(y in {r for r, _ in box}) for y in range(HEIGHT)])
        assert loss[layer, 0].item() == pytest.approx(along_x + along_y, abs=1e-12)
    profiles = logits.amax(-2).detach().requires_grad_(), logits.amax(-1).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: projection_loss(x, y, columns, rows), profiles)


def test_same_label_loss_and_gradient():
    a, b = (
        torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).mul(4).unbind(0)
    )
    place = torch.arange(200)
    way, weight = torch.full((1, 400), 200), torch.ones(1, 400, dtype=torch.float64)
    weight[:, 200:] = 0  # pixels whose way leads out

    def losses(a, b):
        return SameLabel.apply(torch.cat([a, b])[None], way, weight, place.repeat(2), 200)[0]

    for x, y, value in zip(a.tolist(), b.tolist(), losses(a, b).tolist(), strict=True):
        p, q = sigmoid(x), sigmoid(y)
        assert value == pytest.approx(-math.log(p * q + (1 - p) * (1 - q)), abs=1e-10)
    assert torch.autograd.gradcheck(losses, (a.requires_grad_(), b.requires_grad_()))


def brute_force_pairwise(logits, boxes, images, affinity_of, valid, threshold):
    """Sums and numbers of the counted edges, one ordered pair of pixels at a time; differentiable."""
    sums, numbers = [], []
    for t, (box, image) in enumerate(zip(boxes, images, strict=True)):
        total, number = logits.new_zeros(()), 0
        for y, x in owned(box):
            for dy, dx in NEIGHBOURS:
                v, u = y + dy, x + dx
                if not (0 <= v < HEIGHT and 0 <= u < WIDTH) or not (
                    valid[image, y, x] and valid[image, v, u]
                ):
                    continue
                if affinity_of(image, (y, x), (v, u)) < threshold:
                    continue
                p, q = logits[t, y, x].sigmoid(), logits[t, v, u].sigmoid()
                total = total - torch.log(p * q + (1 - p) * (1 - q))
                number += 1
        sums.append(total)
        numbers.append(number)
    return torch.stack(sums), numbers


def test_pairwise_loss_and_gradient():
    boxes = list(BOXES.values())
    image_of = [0] * 4 + [1] * 3
    targets = flat(boxes[:4], boxes[4:])
    generator = torch.Generator().manual_seed(4)
    images = torch.rand(2, 3, 4 * HEIGHT, 4 * WIDTH, generator=generator) * 40
    valid = torch.ones(2, HEIGHT, WIDTH, dtype=torch.bool)
    valid[0, -3:] = False
    valid[1, :, -1] = False
    logits = (
        torch.randn(1, 7, HEIGHT, WIDTH, dtype=torch.float64, generator=generator).mul(2).requires_grad_()
    )
    threshold = 0.3
    edges = (color_affinity(images, 2) >= threshold) & edge_mask(valid, 2)
    pixels = box_pixels(targets, margin=2)
    found = box_edges(pixels, targets, edges, 2)
    sums = pairwise_loss(logits[:, pixels.target, pixels.y, pixels.x], found, pixels.target, 7)
    numbers = torch.zeros(7).index_add(0, pixels.target, found.weight.sum(0).float())

    pooled = images.double().view(2, 3, HEIGHT, 4, WIDTH, 4).mean((3, 5)) / 255
    lab = rgb2lab(pooled.permute(0, 2, 3, 1).numpy())

    def affinity_of(image, i, j):
        return math.exp(-np.linalg.norm(lab[image][i] - lab[image][j]) / 2)

    expected, expected_numbers = brute_force_pairwise(
        logits[0], boxes, image_of, affinity_of, valid, threshold
    )
    assert numbers.tolist() == expected_numbers
    assert 0 < sum(expected_numbers) < sum(8 * len(owned(box)) for box in boxes)
    torch.testing.assert_close(sums[0], expected, rtol=1e-10, atol=1e-10)
    weights = torch.rand(7, dtype=torch.float64, generator=generator)
    ours = torch.autograd.grad((sums[0] * weights).sum(), logits)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), logits)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_losses_in_boxes_read_the_matched_masks_with_one_gradient():
    """As from whole masks cut out by autograd, also where two objects have the same query."""
    generator = torch.Generator().manual_seed(9)
    boxes = list(BOXES.values())
    objects = flat(boxes[:3], boxes[3:])
    predicted = torch.randn(2, 3, 4, HEIGHT, WIDTH, generator=generator).requires_grad_()
    query = torch.randint(4, (3, len(boxes)), generator=generator)
    sim = sim_m2f.get_cfg().MODEL.SIM
    pixels = box_pixels(objects, margin=2)
    supervision = Supervision(sim, (8, 3.0, 0.75), 0, 1, None, None, pixels, None, None, None)
    matched = MatchedBoxes(objects, Match(query, torch.ones_like(query) > 0), predicted, supervision)
    read = matched.logits
    image = [0] * 3 + [1] * (len(boxes) - 3)
    whole = torch.stack(
        [
            torch.stack([predicted[image[t], layer, query[layer, t]] for t in range(len(boxes))])
            for layer in range(3)
        ]
    )
    assert torch.equal(matched.masks, whole)
    expected = whole[:, pixels.target, pixels.y, pixels.x], whole.amax(-2), whole.amax(-1)
    gradients = []
    for values in (read, expected):
        weights = torch.Generator().manual_seed(10)
        total = sum((value * torch.randn(value.shape, generator=weights)).sum() for value in values)
        gradients.append(torch.autograd.grad(total, predicted)[0])
    for ours, theirs in zip((*read, gradients[0]), (*expected, gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs)
    inner = box_pixels(objects)
    places = pixels.places(inner)
    for name in ("target", "x", "y"):
        assert torch.equal(getattr(pixels, name)[places], getattr(inner, name))
    assert torch.equal(matched.inside.nonzero().flatten(), places)


def test_losses_of_no_objects_are_zero_and_have_a_gradient():
    targets = flat([], [])
    logits = torch.zeros(3, 0, HEIGHT, WIDTH, requires_grad=True)
    edges = torch.ones(2, 4, HEIGHT, WIDTH, dtype=torch.bool)
    pixels = box_pixels(targets, margin=2)
    found = box_edges(pixels, targets, edges, 2)
    sums = pairwise_loss(logits[:, :, 0, 0], found, pixels.target, 0)
    total = (
        sums.sum()
        + projection_loss(logits.amax(-2), logits.amax(-1), *targets.projections).sum()
        + box_fill_loss(logits, targets.box_masks).sum()
    )
    total.backward()
    assert total.item() == 0
    assert found.weight.shape == (4, 0)
    assert logits.grad.shape == logits.shape


def test_box_fill_loss():
    logits = torch.randn(1, 2, HEIGHT, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    targets = flat([BOXES["inside"], BOXES["between two centres"]])
    loss = box_fill_loss(logits, targets.box_masks.double())
    for t, name in enumerate(["inside", "between two centres"]):
        box = owned(BOXES[name])
        cross_entropy, overlap, squares = 0.0, 0.0, 0.0
        for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
            p, b = sigmoid(logits[0, t, y, x].item()), float((y, x) in box)
            cross_entropy -= (b * math.log(p) + (1 - b) * math.log(1 - p)) / (HEIGHT * WIDTH)
            overlap += p * b
            squares += p * p + b * b
        assert loss[0, t].item() == pytest.approx(
            cross_entropy + 1 - 2 * overlap / (squares + 1e-5), abs=1e-10
        )


def brute_force_cost(logits, masks, box, label, weights):
    """The matching cost of one query (class logits (C+1,), mask logits (h, w)) and one box."""
    exponentials = [math.exp(value) for value in logits.tolist()]
    cost = weights[0] * -exponentials[label] / sum(exponentials)
    p = masks.double().sigmoid().numpy()
    pixels = owned(box)
    for axis, length, index in ((0, WIDTH, 1), (1, HEIGHT, 0)):
        profile = p.max(axis)
        target = np.array([float(k in {pixel[index] for pixel in pixels}) for k in range(length)])
        cost += weights[1] * (1 - 2 * (profile * target).sum() / ((profile**2).sum() + target.sum() + 1e-5))
    ys, xs = np.nonzero(p > 0.5)
    predicted = (
        np.array([xs.min() / WIDTH, ys.min() / HEIGHT, (xs.max() + 1) / WIDTH, (ys.max() + 1) / HEIGHT])
        if len(xs)
        else np.zeros(4)
    )
    annotated = np.array(box) / np.array([4 * WIDTH, 4 * HEIGHT, 4 * WIDTH, 4 * HEIGHT])
    return cost + weights[2] * brute_force_box_cost(predicted, annotated)


def brute_force_box_cost(a, b):
    def centre_size(box):
        return np.array([(box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]])

    def area(box):
        return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)

    overlap = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
    hull = area([min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])])
    union = area(a) + area(b) - overlap
    return np.abs(centre_size(a) - centre_size(b)).sum() + 1 - (overlap / union - (hull - union) / hull)


@pytest.mark.parametrize("box_weight", [0.0, 3.0])
def test_matcher_finds_the_cheapest_assignment(box_weight):
    generator = torch.Generator().manual_seed(6)
    layers, queries = 2, 5
    images = [list(BOXES.values())[:3], [], list(BOXES.values())[3:]]
    targets = flat(*images)
    logits = torch.randn(layers, 3, queries, 4, generator=generator)
    masks = torch.randn(layers, 3, queries, HEIGHT, WIDTH, generator=generator) * 3 - 4
    masks[0, 0, 0] = -9.0  # an empty mask
    weights = (2.0, 5.0, box_weight)
    match = BoxMatcher(*weights)(Layers(logits, masks.transpose(0, 1)), targets)
    assert match.matched.all()
    for layer in range(layers):
        start = 0
        for image, boxes in enumerate(images):
            cost = np.array(
                [
                    [
                        brute_force_cost(logits[layer, image, q], masks[layer, image, q], box, t % 3, weights)
                        for t, box in enumerate(boxes)
                    ]
                    for q in range(queries)
                ]
            ).reshape(queries, len(boxes))
            rows, columns = linear_sum_assignment(cost)
            chosen = match.query[layer, start : start + len(boxes)].numpy()
            assert chosen[columns].tolist() == rows.tolist()
            start += len(boxes)


def test_masks_at_the_same_points_are_sampled_together():
    maps, points = torch.randn(6, 7, 11), torch.rand(200, 2)
    points[:4] = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0))  # the image's corners
    expected = F.grid_sample(maps[None], 2 * points[None, None] - 1, align_corners=False)[0, :, 0]
    torch.testing.assert_close(sample_together(maps, points), expected, rtol=1e-4, atol=1e-5)


def test_matcher_leaves_objects_over_when_queries_run_out():
    targets = flat(list(BOXES.values()))
    masks = torch.zeros(1, 1, 4, HEIGHT, WIDTH)
    match = BoxMatcher(2.0, 5.0, 0.0)(Layers(torch.zeros(1, 1, 4, 4), masks), targets)
    assert match.matched.sum() == 4
    assert sorted(match.query[match.matched].tolist()) == [0, 1, 2, 3]


def test_fill_deficit_is_linear_between_its_shares():
    objects = flat([BOXES["inside"], BOXES["whole image"]])
    logits, sim = torch.randn(3, 2, HEIGHT, WIDTH), sim_m2f.get_cfg().MODEL.SIM
    sim.FILL_GUARD.RANGE, sim.FILL_GUARD.FADE = (0.3, 0.6), 0.0
    deficit = matched_boxes(objects, logits, sim).deficit
    for layer, t in itertools.product(range(3), range(2)):
        values = [sigmoid(logits[layer, t, y, x]) for y, x in owned(list(BOXES.values())[t])]
        expected = min(max((0.6 - sum(values) / len(values)) / 0.3, 0), 1)
        assert deficit[layer, t].item() == pytest.approx(expected, abs=1e-5)
    assert matched_boxes(objects, logits - 50, sim).deficit.eq(1).all()


@pytest.mark.parametrize(
    ("fade", "step", "share"), [(0.0, 0, 1), (0.0, 99, 1), (0.5, 0, 1), (0.5, 25, 0.5), (20, 99, 0)]
)
def test_the_fill_guard_fades_only_when_told_to(fade, step, share):
    objects = flat([BOXES["inside"]])
    masks = torch.full((2, 1, HEIGHT, WIDTH), -9.0)
    sim = sim_m2f.get_cfg().MODEL.SIM
    sim.FILL_GUARD.FADE = fade
    assert matched_boxes(objects, masks, sim, step).deficit.eq(share).all()


def test_level_set_energy_is_the_variance_that_two_regions_leave():
    boxes = [[4.0, 8.0, 24.0, 28.0], [12.0, 0.0, 32.0, 16.0]]
    objects = flatten_targets(make_targets(boxes), (8, 8), torch.device("cpu"))
    pixels = box_pixels(objects)
    masks = torch.rand(3, len(pixels.x), dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(pixels.x), 2, dtype=torch.float64)
    energy = region_energy(masks, values, pixels, 2)
    for layer, t in itertools.product(range(3), range(2)):
        own = (pixels.target == t).nonzero().flatten().tolist()
        p, v = masks[layer].detach().numpy()[own], values.numpy()[own]
        regions = sum((w[:, None] * (v - np.average(v, 0, w)) ** 2).sum() for w in (p, 1 - p))
        assert energy[layer, t].item() == pytest.approx(regions / ((v - v.mean(0)) ** 2).sum(), rel=1e-9)
    assert torch.autograd.gradcheck(lambda m: region_energy(m, values, pixels, 2), masks)
    split = (values[:, 0] > 0).double()
    alike = torch.stack([split, -split], dim=1)
    assert region_energy(split[None], alike, pixels, 2).abs().max() < 1e-9
    assert region_energy(torch.full_like(split, 0.3)[None], values, pixels, 2).min() > 1 - 1e-9


def test_level_set_loss_is_the_energy_of_colours_per_object():
    image = torch.rand(1, 3, 32, 32) * 255
    objects = flatten_targets(make_targets([[4.0, 8.0, 24.0, 28.0]]), (8, 8), torch.device("cpu"))
    objects = normalised(objects, torch.ones(4))
    pixels, masks = box_pixels(objects), torch.randn(2, 1, 8, 8)
    sim, features = sim_m2f.get_cfg().MODEL.SIM, torch.randn(1, 4, 8, 8)
    matched = torch.tensor([[True], [False]])
    lab = rgb_to_lab(torch.nn.functional.avg_pool2d(image, 4) / 255)
    inside = masks[:, pixels.target, pixels.y, pixels.x].sigmoid()
    energies = [
        region_energy(inside, maps[0, :, pixels.y, pixels.x].T, pixels, 1)[0, 0].item()
        for maps in (lab, features)
    ]
    for sim.LEVEL_SET.FEATURES, expected in ((False, energies[0]), (True, sum(energies))):
        loss = level_set(matched_boxes(objects, masks, sim, 0, matched, image, features))
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_objects_costs_no_loss_but_that_of_classes():
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 1, "MODEL.SIM.SUPERVISION", "box"])
    for group in TERMS.values():
        keys = cfg.MODEL.SIM[group[0]]
        keys.ENABLED, keys.START, keys.WARMUP = True, 0.0, 0.0
    cfg.MODEL.SIM.PAIRWISE.FEATURE_AFFINITY = cfg.MODEL.SIM.TEACHER.ENABLED = True

    def outputs() -> dict:
        logits, masks = torch.zeros(2, 3, 2), torch.randn(2, 3, 16, 16, requires_grad=True)
        return {
            **{"pred_logits": logits.requires_grad_(), "pred_masks": masks, "aux_outputs": []},
            "mask_features": torch.randn(2, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM, 16, 16),
        }

    student = outputs()
    losses, _ = build_criterion(cfg)(student, make_targets([], []), torch.randn(2, 3, 64, 64), outputs())
    assert {name for name, loss in losses.items() if loss != 0} == {"loss_ce"}
    assert losses.keys() >= {name for name in TERMS if name not in ("loss_box_fill", "loss_known_masks")}
    sum(losses.values()).backward()
    assert student["pred_masks"].grad is None or not student["pred_masks"].grad.any()
