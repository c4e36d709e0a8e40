"""Teacher, prototypes, pseudo masks and their losses against definitions written out in float64, and POT."""

import itertools
import math
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch
from conftest import ROOT
from torchvision.ops import sigmoid_focal_loss

import sim_m2f
from sim_m2f.supervision.affinity import feature_affinity, neighbour_offsets
from sim_m2f.supervision.base import normalised
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.gated_masks import gated_masks
from sim_m2f.supervision.losses import FocalSums, focal_loss
from sim_m2f.supervision.mask_supervision import mask_losses
from sim_m2f.supervision.matched import MatchedBoxes, Supervision
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.prototypes import Prototypes, sample_per_group, sinkhorn
from sim_m2f.supervision.pseudo_masks import (
    IGNORED,
    instance_probability,
    positive_masks,
    positive_thresholds,
    pseudo_labels,
)
from sim_m2f.supervision.targets import BoxPixels, box_pixels, flatten_targets
from sim_m2f.supervision.teacher import Teacher


def prototypes_of(classes: int, count: int, limit: int) -> Prototypes:
    keys = sim_m2f.get_cfg().MODEL.SIM.PROTOTYPES
    keys.COUNT, keys.PIXELS_PER_CLASS, keys.MOMENTUM = count, limit, 0.9
    return Prototypes(classes, 4, keys)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def test_teacher_is_the_exponential_average_of_the_students():
    student = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    teacher = Teacher(student, momentum=0.6)
    histories = [[parameter.detach().double().clone()] for parameter in student.parameters()]
    for step in range(9):
        with torch.no_grad():
            for parameter, history in zip(student.parameters(), histories, strict=True):
                parameter.add_(torch.randn_like(parameter))
                history.append(parameter.detach().double().clone())
        student(torch.randn(4, 2))
        teacher.update(student)
        momenta = [min(0.6, (1 + n) / (10 + n)) for n in range(step + 1)]
        shares = [math.prod(momenta)] + [(1 - m) * math.prod(momenta[n + 1 :]) for n, m in enumerate(momenta)]
        for parameter, history in zip(teacher.network.parameters(), histories, strict=True):
            expected = sum(share * value for share, value in zip(shares, history, strict=True))
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(teacher.network[1].running_mean, student[1].running_mean)
    assert not teacher.train().network.training
    assert not teacher(torch.randn(4, 2)).requires_grad


def test_sinkhorn_converges_to_pots_transport_plan(generator):
    count, pixels = 4, [9, 1, 16]
    labels = torch.repeat_interleave(torch.tensor([0, 2, 3]), torch.tensor(pixels))
    shuffled = torch.randperm(len(labels), generator=generator)
    labels = labels[shuffled]
    scores = torch.rand(len(labels), count, generator=generator, dtype=torch.float64) * 2 - 1
    plan = sinkhorn(scores, labels, classes=5, epsilon=0.1, iterations=2000).exp()
    for label, number in zip((0, 2, 3), pixels, strict=True):
        cost = -scores[labels == label].T.numpy()
        uniform = np.full(count, 1 / count), np.full(number, 1 / number)
        expected = ot.sinkhorn(
            *uniform, cost, reg=0.1, method="sinkhorn_log", numItermax=20000, stopThr=1e-14
        )
        np.testing.assert_allclose(plan[labels == label].T.numpy(), expected, atol=1e-9)


def test_one_sinkhorn_iteration_is_the_written_out_normalisation(generator):
    labels = torch.tensor([1, 0, 1, 1, 0])
    scores = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    plan = sinkhorn(scores, labels, classes=2, epsilon=0.05, iterations=1).exp()
    for label in (0, 1):
        members = [i for i in range(5) if labels[i] == label]
        q = {(i, k): math.exp(scores[i, k].item() / 0.05) for i in members for k in range(3)}
        for k in range(3):
            total = sum(q[i, k] for i in members)
            for i in members:
                q[i, k] /= 3 * total
        for i in members:
            total = sum(q[i, k] for k in range(3))
            for k in range(3):
                assert plan[i, k].item() == pytest.approx(q[i, k] / (len(members) * total), rel=1e-10)


def test_prototypes_move_towards_the_centroids_of_their_pixels(generator):
    prototypes = prototypes_of(3, count=2, limit=100)
    before = prototypes.vectors.clone()
    features = torch.randn(30, 4, generator=generator) * 5
    labels = torch.tensor([0, 2]).repeat(15)
    confident = torch.arange(30) % 5 != 0
    images = torch.zeros_like(labels)
    counts = prototypes.counts(labels, images, 1, confident)
    assert counts.tolist() == [[12, 0, 12]]
    chosen, classes = prototypes.sample(labels, images, confident, torch.rand(30), counts / 12, present=2)
    prototypes.update(features[chosen], classes)
    unit = (features / features.norm(dim=1, keepdim=True))[confident]
    kept = labels[confident]
    scores = (unit[:, None] * before[kept]).sum(-1)
    assigned = sinkhorn(scores, kept, 3, 0.05, 3).argmax(1)
    for label, slot in itertools.product(range(3), range(2)):
        members = unit[(kept == label) & (assigned == slot)]
        expected = before[label, slot]
        if len(members):
            expected = 0.9 * expected + 0.1 * members.mean(0)
            expected = expected / expected.norm()
        torch.testing.assert_close(prototypes.vectors[label, slot], expected)
    assert torch.equal(prototypes.vectors[1], before[1])
    prototypes.update(features[:0], labels[:0])


def test_similarity_is_that_of_the_nearest_prototype_of_the_class(generator):
    prototypes = prototypes_of(5, count=3, limit=10)
    features = torch.randn(20, 4, generator=generator)
    similarity = prototypes.similarity(features, 4)
    for i in range(20):
        z = features[i] / features[i].norm()
        expected = max(float(z @ p) for p in prototypes.vectors[4])
        assert similarity[i].item() == pytest.approx(expected, abs=1e-6)


def test_sampling_keeps_at_most_the_limit_of_every_class_without_bias():
    labels = torch.tensor([0] * 40 + [1] * 5 + [2] * 40)
    group = torch.where(torch.arange(85) < 60, labels, 3)
    drawn = torch.zeros(85)
    for _ in range(400):
        index, taken = sample_per_group(group, torch.rand(85), torch.tensor([10, 10, 10, 0]))
        chosen = index[taken]
        assert len(chosen.unique()) == len(chosen)
        assert labels[chosen].bincount(minlength=3).tolist() == [10, 5, 10]
        drawn[chosen] += 1
    assert drawn[60:].sum() == 0
    assert (drawn[40:45] == 400).all()
    assert (drawn[:40] - 100).abs().max() < 5 * math.sqrt(400 * 0.25 * 0.75)


def two_images(generator):
    """Targets of two images at stride 4 (6 x 8), teacher outputs of 2 layers, 5 queries, 3 classes."""
    boxes = [[0.0, 0, 20, 12], [8, 8, 32, 24]], [[4, 0, 12, 24]]
    targets = [{"boxes": torch.tensor(each), "labels": torch.arange(len(each))} for each in boxes]
    objects = flatten_targets(targets, (6, 8), torch.device("cpu"))
    logits = torch.randn(2, 2, 5, 4, generator=generator)
    masks = torch.randn(2, 2, 5, 6, 8, generator=generator) * 2
    return objects, logits, masks


def test_instance_probability_is_the_weighted_mean_of_the_positive_masks(generator):
    objects, logits, masks = two_images(generator)
    match = Match(torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.ones(2, 3, dtype=torch.bool))
    pixels = box_pixels(objects)
    profiles = masks.amax(-2).sigmoid(), masks.amax(-1).sigmoid()
    chosen = positive_masks(logits, *profiles, match, objects, queries=2, min_iou=0.2)
    mean = instance_probability(masks.transpose(0, 1), chosen, objects, pixels)

    def weight(layer, t, query):
        p = logits[layer, objects.image_index[t], query].softmax(0)[objects.labels[t]].item()
        ys, xs = np.nonzero(masks[layer, objects.image_index[t], query].numpy() > 0)
        a = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * 4.0
        b = objects.boxes[t].numpy()
        sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
        overlap = sides.prod()
        return p, overlap / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - overlap)

    for t in range(3):
        assert chosen.quality[t].item() == pytest.approx(math.prod(weight(1, t, match.query[1, t])), abs=1e-5)
    for i, (t, y, x) in enumerate(
        zip(pixels.target.tolist(), pixels.y.tolist(), pixels.x.tolist(), strict=True)
    ):
        positives = [
            (math.prod(weight(layer, t, match.query[layer, t])) + 1e-6, layer, match.query[layer, t])
            for layer in (0, 1)
        ]
        taken = {
            match.query[1, s].item() for s in range(3) if objects.image_index[s] == objects.image_index[t]
        }
        further = [(weight(1, t, q), q) for q in range(5) if q not in taken]
        claims = sorted(((p * o, 1, q) for (p, o), q in further if o >= 0.2), key=lambda claim: -claim[0])[:2]
        values = [
            (w, masks[layer, objects.image_index[t], q, y, x].sigmoid().item())
            for w, layer, q in positives + claims
        ]
        expected = sum(w * value for w, value in values) / sum(w for w, _ in values)
        assert mean[i].item() == pytest.approx(expected, abs=1e-5)


def test_an_object_left_over_has_no_mask_and_takes_none(generator):
    """With fewer queries than objects: nobody's mask is its own, and query 0 keeps its owner's class."""
    objects, logits, masks = two_images(generator)
    match = Match(
        torch.tensor([[1, 0, 2], [0, 0, 3]]), torch.tensor([[True, False, True], [True, False, True]])
    )
    profiles = masks.amax(-2).sigmoid(), masks.amax(-1).sigmoid()
    chosen = positive_masks(logits, *profiles, match, objects, queries=0, min_iou=0.2)
    mean = instance_probability(masks.transpose(0, 1), chosen, objects, box_pixels(objects))
    assert (chosen.weight[:, 1] == 0).all()
    assert (mean[box_pixels(objects).target == 1] == 0).all()
    wanted = torch.full((2, 2, 5), 3)
    wanted[0, 0, 1], wanted[0, 1, 2], wanted[1, 0, 0], wanted[1, 1, 3] = 0, 0, 0, 0
    weights = torch.tensor([1, 1, 1, 0.1], dtype=torch.float64)
    expected = sum(
        torch.nn.functional.cross_entropy(a.double().flatten(0, 1), b.flatten(), weights)
        for a, b in zip(logits, wanted, strict=True)
    )
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.SIM.SUPERVISION", "box"])
    objects = normalised(objects, torch.tensor([2, 3, 0, 2]))
    loss = build_criterion(cfg).classification(logits, objects, match)
    assert loss.item() == pytest.approx(2 * expected.item(), rel=1e-5)  # CLASS_WEIGHT 2


def test_thresholds_and_labels_pixel_by_pixel(generator):
    areas = [7, 1, 20, 4]
    target = torch.repeat_interleave(torch.arange(4), torch.tensor(areas))
    semantic, instance = torch.rand(2, len(target), generator=generator, dtype=torch.float64).unbind(0)
    instance[target == 3] = 0.2  # no confident pixel at all
    pixels = BoxPixels(target, target, target, torch.ones_like(target), target, target)
    labels = pseudo_labels(semantic, instance, pixels, torch.ones(4), 0.5, (0.6, 0.8), 0.4, 0.7)
    thresholds = positive_thresholds(0.5 * (semantic + instance), instance, target, 4, (0.6, 0.8), 0.7)
    for t in range(4):
        members = [i for i in range(len(target)) if target[i] == t]
        blend = {i: 0.5 * semantic[i].item() + 0.5 * instance[i].item() for i in members}
        number = sum(instance[i].item() > 0.7 for i in members)
        threshold = min(max(sorted(blend.values(), reverse=True)[number - 1], 0.6), 0.8) if number else 0.8
        assert thresholds[t].item() == pytest.approx(threshold)
        for i in members:
            for mask, label in ((blend[i], labels.final[i]), (semantic[i].item(), labels.semantic[i])):
                assert label.item() == (1 if mask >= threshold else 0 if mask < 0.4 else IGNORED)


def test_feature_affinity_of_every_pair_of_neighbours(generator):
    features = torch.randn(1, 3, 5, 6, generator=generator)
    affinity = feature_affinity(features, 2)
    unit = features / features.norm(dim=1, keepdim=True)
    for direction, (dy, dx) in enumerate(neighbour_offsets(2)):
        for y, x in itertools.product(range(5 - dy), range(6)):
            if 0 <= x + dx < 6:
                distance = (unit[0, :, y, x] - unit[0, :, y + dy, x + dx]).norm().item()
                assert affinity[0, direction, y, x].item() == pytest.approx(math.exp(-distance), abs=1e-5)


FULL = [
    *("MODEL.SIM.TEACHER.ENABLED", "True", "MODEL.SIM.PAIRWISE.FEATURE_AFFINITY", "True"),
    *("MODEL.SIM.PSEUDO_SEMANTIC.ENABLED", "True", "MODEL.SIM.PSEUDO_SEMANTIC.START", "0"),
    *("MODEL.SIM.SELF_CORRECTION.ENABLED", "True", "MODEL.SIM.SELF_CORRECTION.START", "0"),
    *("MODEL.SIM.PSEUDO_SEMANTIC.WARMUP", "0", "MODEL.SIM.SELF_CORRECTION.WARMUP", "0"),
    *("MODEL.SIM.POSITIVE_MASKS.WEIGHTING", "True", "MODEL.SIM.PAIRWISE.WARMUP", "0"),
    *("MODEL.SIM.PROTOTYPES.TEMPERATURE", "1.0", "MODEL.SIM.PROTOTYPES.CENTER", "0.0"),
    *("MODEL.SIM.PSEUDO_MASKS.ALPHA", "0.5"),
    *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "MODEL.SEM_SEG_HEAD.MASK_DIM", "6"),
]


def losses_with(
    overrides: list[str], generator, dtype=torch.float32
) -> tuple[dict[str, torch.Tensor], MatchedBoxes]:
    """What the criterion makes of fixed outputs of student and teacher."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_list([*FULL, *overrides])
    objects, logits, masks = two_images(generator)
    counts = objects.counts
    targets = [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(objects.boxes.split(counts), objects.labels.split(counts), strict=True)
    ]
    outputs = [
        {
            "pred_logits": (logits[1] * scale).to(dtype),
            "pred_masks": (masks[1] * scale).to(dtype),
            "mask_features": torch.randn(2, 6, 6, 8, generator=generator).to(dtype),
            "aux_outputs": [
                {"pred_logits": (logits[0] * scale).to(dtype), "pred_masks": (masks[0] * scale).to(dtype)}
            ],
        }
        for scale in (1.0, 1.5)
    ]
    images = torch.randn(2, 3, 24, 32, generator=generator) * 0.05
    return build_criterion(cfg)(outputs[0], targets, images, outputs[1])


@pytest.mark.parametrize(
    ("term", "loss"),
    [
        ("PSEUDO_SEMANTIC", "loss_pseudo_semantic"),
        ("SELF_CORRECTION", "loss_self_correction"),
        ("PAIRWISE", "loss_pairwise"),
    ],
)
def test_a_weight_of_zero_equals_leaving_the_term_out(term, loss):
    def run(*overrides):
        return losses_with(list(overrides), torch.Generator().manual_seed(7))[0]

    everything = run()
    weightless = run(f"MODEL.SIM.{term}.WEIGHT", "0")
    without = run(f"MODEL.SIM.{term}.ENABLED", "False")
    assert everything[loss] > 0
    assert weightless.pop(loss) == 0
    assert weightless == without
    everything.pop(loss)
    assert everything == without


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_losses_of_the_rounded_outputs(dtype):
    """All after the network is computed in float32; features that are much longer change nothing."""
    rounded, _ = losses_with([], torch.Generator().manual_seed(7), dtype)
    exact, _ = losses_with([], torch.Generator().manual_seed(7))
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        assert rounded[name].item() == pytest.approx(loss.item(), rel=0.05, abs=0.01), name
    prototypes = prototypes_of(3, count=2, limit=20)
    before = prototypes.vectors.clone()
    features = (torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 1e4).to(dtype)
    prototypes.update(features, torch.arange(30) % 3)
    moved = prototypes.vectors.clone()
    assert moved.isfinite().all()
    assert not torch.equal(moved, before)
    prototypes.vectors.copy_(before)
    prototypes.update(features.double() / 1e4, torch.arange(30) % 3)
    torch.testing.assert_close(prototypes.vectors, moved)


def test_focal_loss_has_the_derivative_of_its_formula():
    logits = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(40) % 2
    expected = sigmoid_focal_loss(logits, labels.double().expand(3, -1), alpha=0.3, gamma=1.5)
    torch.testing.assert_close(focal_loss(logits, labels, 0.3, 1.5), expected)
    assert torch.autograd.gradcheck(lambda logits: focal_loss(logits, labels, 0.3, 1.5), (logits,))
    places = torch.arange(0, 40, 3).flip(0)
    group = places % 4 % 3

    def sums(logits):
        return FocalSums.apply(logits, places, labels[places] == 1, group, 4, 0.3, 1.5)

    for index in range(4):
        members = places[group == index]
        torch.testing.assert_close(sums(logits)[:, index], expected[:, members].sum(1))
    assert torch.autograd.gradcheck(sums, (logits,))


def test_pseudo_losses_are_means_over_the_labelled_pixels_of_each_layer():
    """Per layer, the focal loss of pixels that keep or change their label, per labelled pixel."""
    weights = ["MODEL.SIM.PSEUDO_SEMANTIC.WEIGHT", "1", "MODEL.SIM.SELF_CORRECTION.WEIGHT", "1"]
    losses, matched = losses_with(weights, torch.Generator().manual_seed(7))
    labels, pixels = matched.supervision.labels, matched.supervision.labels.pixels
    logits = matched.masks[:, pixels.target, pixels.y, pixels.x].double()
    target = labels.final.clamp(min=0).double().expand_as(logits)
    focal = sigmoid_focal_loss(logits, target, alpha=0.25, gamma=2)
    labelled, kept = labels.final != IGNORED, labels.final == labels.semantic
    assert 0 < (labelled & kept).sum() < labelled.sum()
    for name, chosen in (("loss_pseudo_semantic", kept), ("loss_self_correction", ~kept)):
        expected = (focal * (labelled & chosen)).sum(1).div(labelled.sum()).sum()
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-5)


def test_copy_paste_loss_is_focal_and_dice_of_the_pasted_objects(generator):
    """And projection, towards boxes, is a mean over the images' own objects alone."""
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(ROOT / "configs/shapes/boxinst_R18.yaml")
    cfg.merge_from_list([*FULL, "MODEL.SIM.COPY_PASTE.ENABLED", "True", "MODEL.SIM.COPY_PASTE.START", "0"])
    objects, logits, masks = two_images(generator)
    wanted = torch.rand(2, 6, 8, generator=generator) > 0.5
    targets = [
        {"boxes": objects.boxes[:2], "labels": objects.labels[:2], "pasted": torch.tensor([False, True])},
        {"boxes": objects.boxes[2:], "labels": objects.labels[2:], "pasted": torch.tensor([False])},
    ]
    targets[0]["pasted_masks"], targets[1]["pasted_masks"] = wanted, wanted[:1]
    outputs = {"pred_logits": logits[1], "pred_masks": masks[1], "aux_outputs": []}
    criterion = build_criterion(cfg)
    losses, _ = criterion(outputs, targets, torch.zeros(2, 3, 24, 32))

    flat = flatten_targets(targets, (6, 8), torch.device("cpu"))
    match = criterion.matcher(criterion.layers(outputs), flat)
    own = [masks[1, flat.image_index[t], match.query[0, t]].double() for t in range(3)]
    target = wanted[1].double()
    p = own[1].sigmoid()
    dice = 1 - 2 * (p * target).sum() / ((p**2).sum() + target.sum() + 1e-5)
    focal = sigmoid_focal_loss(own[1], target, alpha=0.25, gamma=2).mean()
    assert losses["loss_copy_paste"].item() == pytest.approx((focal + dice).item(), rel=1e-4)
    columns, rows = (projection.double() for projection in flat.projections)

    def projected(t):
        found = own[t].sigmoid()
        pairs = (found.amax(0), columns[t]), (found.amax(1), rows[t])
        return sum(1 - 2 * (u * v).sum() / ((u**2).sum() + v.sum() + 1e-5) for u, v in pairs)

    assert losses["loss_projection"].item() == pytest.approx(
        5 * (projected(0) + projected(2)).item() / 2, rel=1e-4
    )


def test_gated_masks_are_learned_as_true_ones_in_proportion_to_their_quality():
    """Two objects in a batch; the pseudo mask of the second is not good enough."""
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [20.0, 4.0, 60.0, 30.0]])
    target = {"boxes": boxes, "labels": torch.zeros(2, dtype=torch.int64)}
    objects = flatten_targets([target], (16, 16), torch.device("cpu"))
    pixels, masks = box_pixels(objects), torch.randn(1, 2, 16, 16)
    instance = torch.rand(len(pixels.x))
    labels = pseudo_labels(instance, instance, pixels, torch.tensor([0.8, 0.4]), 0.5, (0.7, 0.8), 0.4, 0.7)
    wanted = torch.zeros(2, 16, 16)
    for t, y, x, m in zip(pixels.target, pixels.y, pixels.x, instance, strict=True):
        threshold = positive_thresholds(instance, instance, pixels.target, 2, (0.7, 0.8), 0.7)[t]
        wanted[t, y, x] = 1.0 if m >= threshold else 0.0 if m < 0.4 else m
    torch.testing.assert_close(labels.soft_masks(objects), wanted)
    points, empty = (40, 3.0, 0.75), torch.zeros(0)
    sim = sim_m2f.get_cfg().MODEL.SIM
    supervision = Supervision(sim, points, 0, 1, empty, empty, pixels, None, labels, None)
    everything = torch.ones(1, 2, dtype=torch.bool)
    match = Match(torch.arange(2)[None], everything)
    objects = normalised(replace(objects, seeds=[(0, 1, 2)]), torch.tensor([1, 2, 0, 2]))
    matched = MatchedBoxes(objects, match, masks[None], supervision)
    loss = gated_masks(matched)
    cross_entropy, dice = mask_losses(masks, wanted, matched.random_points, *points)
    assert loss.item() == pytest.approx(0.8 * (cross_entropy + dice)[0, 0].item() / 2, rel=1e-6)
