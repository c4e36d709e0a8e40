"""Copy-paste against a painter that goes over every pixel, and the bank against lists."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import chisquare
from torch.nn.utils.rnn import pad_sequence

from sim_m2f.config import get_cfg
from sim_m2f.pixels import Pixels
from sim_m2f.supervision import pasted_targets
from sim_m2f.supervision.color_model import ColorLabels
from sim_m2f.supervision.copy_paste import Jitter, build_copy_paste, paste
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.matched import MatchedBoxes, Supervision
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.paste_bank import PasteBank
from sim_m2f.supervision.targets import box_pixels, flatten_targets
from sim_m2f.supervision.teacher import teacher_terms

HEIGHT, WIDTH = 32, 64
CPU = torch.device("cpu")
BYTES = get_cfg()
BYTES.MODEL.PIXEL_MEAN, BYTES.MODEL.PIXEL_STD = [0.0] * 3, [1.0] * 3
PLAIN = Pixels(BYTES)  # normalised pixels are the grey levels themselves


def make_target(boxes, first_label=0, **fields):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.arange(first_label, first_label + len(boxes)),
        **fields,
    }


def random_boxes(number, height=HEIGHT, width=WIDTH):
    """Boxes of all sizes, some between two pixel centres, some up to the border."""
    corners = torch.rand(number, 2, 2) * torch.tensor([width, height])
    low, high = corners.amin(1), corners.amax(1)
    thin = torch.rand(number, 1) < 0.2
    boxes = torch.cat([low, torch.where(thin, low + 0.05, high)], 1)
    on_border = torch.rand(number, 4) < 0.15
    return torch.where(on_border, torch.tensor([0.0, 0.0, width, height]), boxes).tolist()


def random_images(number, height=HEIGHT, width=WIDTH):
    """Grey levels."""
    return torch.randint(0, 256, (number, 3, height, width)).float()


def enter(bank, images, targets, masks, scores=None):
    """Put a batch in the bank; returns its objects."""
    size = images.shape[-2] // 4, images.shape[-1] // 4
    objects = flatten_targets(targets, size, CPU)
    scores = torch.ones(len(objects)) if scores is None else scores
    rgb = bank.pixels.undo(images).round().byte()
    bank.add(objects.counts, rgb, objects.boxes, objects.labels, masks > 0.5, scores)
    return objects


def random_bank(*sizes, capacity=50, objects=4, true=()):
    """A bank of images of the given sizes; every object has a label of its own, from 100 on.

    The masks of the labels in ``true`` are true ones.

    Returns:
        the bank, and by label (pixels (3, H, W), mask (h, w), box).
    """
    bank, by_label = PasteBank(capacity, PLAIN), {}
    for number, (height, width) in enumerate(sizes):
        image = random_images(1, height, width)
        target = make_target(random_boxes(objects, height, width), 100 + objects * number)
        masks = torch.rand(objects, height // 4, width // 4) < torch.rand(objects, 1, 1)
        labels = target["labels"].tolist()
        enter(bank, image, [target], masks, torch.tensor([2.0 if label in true else 0.5 for label in labels]))
        for i, label in enumerate(labels):
            by_label[label] = image[0].numpy(), masks[i].numpy(), target["boxes"][i].tolist()
    return bank, by_label


def owned_pixels(box, height, width):
    """First and last column and row of a box: a pixel is its own when its centre is, at least one."""
    columns = [k for k in range(width) if box[0] <= k + 0.5 < box[2]]
    rows = [k for k in range(height) if box[1] <= k + 0.5 < box[3]]
    columns = columns or [min(max(math.floor((box[0] + box[2]) / 2), 0), width - 1)]
    rows = rows or [min(max(math.floor((box[1] + box[3]) / 2), 0), height - 1)]
    return columns, rows


def painter(image, target, pasted, by_label):
    """Paint the objects with the labels ``pasted``, in order, pixel by pixel; then look what is left of each.

    Returns:
        the image, {label: box} of the annotated and of the pasted objects, {label: visible pixels}, and all
        painted pixels.
    """
    image, (height, width) = image.numpy().copy(), image.shape[1:]
    owner = np.full((height, width), -1)
    for label in pasted:
        pixels, mask, _ = by_label[label]
        for y, x in itertools.product(range(height), range(width)):
            if y // 4 < mask.shape[0] and x // 4 < mask.shape[1] and mask[y // 4, x // 4]:
                image[:, y, x] = pixels[:, y, x]
                owner[y, x] = label
    boxes = {}
    known = target.get("known", torch.zeros(len(target["labels"])))
    for i, (label, box) in enumerate(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)):
        own = list(itertools.product(*owned_pixels(box, height, width)))
        if known[i]:
            own = [(x, y) for y, x in target["masks"][i].nonzero().tolist()]
            if not own:
                boxes[label] = box
        left = [(x, y) for x, y in own if owner[y, x] < 0]
        if left:
            first, last, low, high = np.min(own, 0), np.max(own, 0), np.min(left, 0), np.max(left, 0)
            stays, cut = [*(low == first), *(high == last)], [*low, *(high + 1)]
            boxes[label] = [box[k] if stays[k] else cut[k] for k in range(4)]
    visible = {label: owner == label for label in pasted}
    for label, mask in visible.items():
        y, x = mask.nonzero()
        boxes[label] = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    return image, boxes, visible, owner >= 0


def assert_painted(image, target, new_image, new, by_label, true=()):
    """An image after pasting is what the painter makes of it; returns how many objects it received.

    Masks of the labels in ``true`` are known.
    """
    pasted = new["labels"][new["pasted"]].tolist()
    painted, boxes, visible, covered = painter(image, target, pasted, by_label)
    np.testing.assert_array_equal(new_image.numpy(), painted)
    assert new["labels"].tolist() == list(boxes)
    assert new["boxes"].tolist() == [[float(side) for side in box] for box in boxes.values()]
    for label, mask in zip(new["labels"].tolist(), new["pasted_masks"], strict=True):
        pixels = np.kron(mask.numpy(), np.ones((4, 4), dtype=bool))
        np.testing.assert_array_equal(pixels, visible.get(label, np.zeros_like(pixels)))
    if "valid" in target:
        np.testing.assert_array_equal(new["valid"].numpy(), target["valid"].numpy() | covered)
    if "known" in target:
        was_known = dict(zip(target["labels"].tolist(), target["known"].tolist(), strict=True))
        masks = dict(zip(target["labels"].tolist(), target["masks"].numpy() & ~covered, strict=True))
        masks |= {label: visible[label] if label in true else np.zeros_like(covered) for label in pasted}
        known = was_known | {label: label in true for label in pasted}
        assert new["known"].tolist() == [known[label] for label in boxes]
        assert [mask.tolist() for mask in new["masks"]] == [masks[label].tolist() for label in boxes]
    if "proposals" in target:
        own, theirs = new["labels"][~new["pasted"]], new["pasted"]
        left = target["proposals"] & torch.from_numpy(~covered)
        assert torch.equal(new["proposals"][~theirs], left[own])
        assert torch.equal(new["proposal_scores"][~theirs], target["proposal_scores"][own])
        assert not new["proposals"][theirs].any()
        assert not new["proposal_scores"][theirs].any()
    return len(pasted)


@pytest.mark.parametrize("seed", range(6))
def test_paste_is_what_a_painter_makes(seed):
    torch.manual_seed(seed)
    bank, by_label = random_bank((32, 64), (32, 32), (64, 32))
    images = random_images(4)
    targets = [
        make_target(random_boxes(number), valid=torch.rand(HEIGHT, WIDTH) < 0.5) for number in (5, 0, 1, 8)
    ]
    new_images, new_targets = paste(images, targets, bank, 0.8, 3)
    received = [
        assert_painted(*image, by_label)
        for image in zip(images, targets, new_images, new_targets, strict=True)
    ]
    assert 0 < max(received) <= 3


def with_masks(target):
    """The target with a mask in the box of every second object, one of them empty, and proposals for all."""
    number = len(target["labels"])
    masks = torch.zeros(number, HEIGHT, WIDTH, dtype=torch.bool)
    known = torch.arange(number) % 2 == 1
    for i in known.nonzero().flatten().tolist()[:-1]:
        columns, rows = owned_pixels(target["boxes"][i].tolist(), HEIGHT, WIDTH)
        part = torch.rand(len(rows), len(columns)) < torch.rand(())
        masks[i, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = part
    proposals, scores = torch.rand(number, HEIGHT, WIDTH) < 0.5, torch.rand(number)
    return {**target, "masks": masks, "known": known, "proposals": proposals, "proposal_scores": scores}


@pytest.mark.parametrize("seed", range(6))
def test_known_masks_are_cut_and_pasted_true_ones_stay_known(seed):
    torch.manual_seed(seed)
    true = {101, 102, 106, 111}
    bank, by_label = random_bank((32, 64), (32, 32), (64, 32), true=true)
    images = random_images(4)
    targets = [with_masks(make_target(random_boxes(number))) for number in (5, 0, 1, 8)]
    new_images, new_targets = paste(images, targets, bank, 0.8, 6)
    received = [
        assert_painted(*image, by_label, true)
        for image in zip(images, targets, new_images, new_targets, strict=True)
    ]
    assert 0 < max(received) <= 6
    for target in new_targets:
        objects = flatten_targets([target], (HEIGHT // 4, WIDTH // 4), CPU)
        assert objects.pasted_index.tolist() == [
            i for i, label in enumerate(target["labels"].tolist()) if label >= 100 and label not in true
        ]
        _, annotated, pasted, _ = build_criterion(get_cfg()).own_numbers(objects).tolist()
        assert annotated + pasted == len(objects)


def test_a_image_that_receives_nothing_stays_as_it_is():
    bank, _ = random_bank((32, 64))
    images, targets = random_images(8), [make_target(random_boxes(3)) for _ in range(8)]
    new_images, new = paste(images, targets, bank, 0.5, 3)
    spared = [i for i in range(8) if not new[i]["pasted"].any()]
    assert 0 < len(spared) < 8
    for i in spared:
        assert torch.equal(new_images[i], images[i])
        assert torch.equal(new[i]["boxes"], targets[i]["boxes"])
        assert torch.equal(new[i]["labels"], targets[i]["labels"])


@pytest.mark.parametrize(("probability", "filled"), [(0.0, True), (1.0, False)])
def test_without_receiver_or_bank_nothing_changes(probability, filled):
    bank = random_bank((32, 64))[0] if filled else PasteBank(50, PLAIN)
    images = torch.randn(2, 3, HEIGHT, WIDTH)
    targets = [make_target(random_boxes(3), valid=torch.rand(HEIGHT, WIDTH) < 0.5), make_target([])]
    new_images, new = paste(images, targets, bank, probability, 3)
    assert torch.equal(new_images, images)
    for old, target in zip(targets, new, strict=True):
        assert target.keys() == old.keys()
        assert all(torch.equal(target[name], old[name]) for name in old)
    objects = flatten_targets(new, (HEIGHT // 4, WIDTH // 4), CPU)
    assert objects.pasted.tolist() == [False] * 3
    assert objects.pasted_masks.shape == (0, HEIGHT // 4, WIDTH // 4)


def bank_of(*masks, scores=None):
    """A bank of one image of nines, an object with labels 100, 101, ... for each mask."""
    bank = PasteBank(50, PLAIN)
    target = make_target([[0.0, 0.0, WIDTH, HEIGHT]] * len(masks), 100)
    enter(bank, torch.full((1, 3, HEIGHT, WIDTH), 9.0), [target], torch.stack(masks), scores)
    return bank


def cells(rows, columns):
    mask = torch.zeros(HEIGHT // 4, WIDTH // 4, dtype=torch.bool)
    mask[rows, columns] = True
    return mask


def test_boxes_are_refitted_or_dropped():
    left_half = bank_of(cells(slice(None), slice(0, 8)))
    boxes = {
        "on the right": [40.3, 3.1, 60.2, 20.7],
        "cut": [20.4, 3.1, 60.2, 20.7],
        "a column remains": [20.0, 0.0, 33.0, 32.0],
        "no pixel centre remains": [20.0, 0.0, 32.4, 32.0],
        "covered": [1.0, 1.0, 31.0, 31.0],
        "covered on three sides": [0.0, 0.0, 64.0, 32.0],
    }
    image, target = torch.zeros(1, 3, HEIGHT, WIDTH), make_target(list(boxes.values()))
    _, (new,) = paste(image, [target], left_half, 1.0, 3)
    assert new["labels"].tolist() == [0, 1, 2, 5, 100]
    expected = [
        [40.3, 3.1, 60.2, 20.7],
        [32, 3.1, 60.2, 20.7],
        [32, 0, 33, 32],
        [32, 0, 64, 32],
        [0, 0, 32, 32],
    ]
    assert torch.equal(new["boxes"], torch.tensor(expected))
    assert new["pasted"].tolist() == [False] * 4 + [True]


@pytest.mark.parametrize("seed", range(3))
def test_targets_settled_with_the_costs_are_those_that_one_reads(seed):
    """And the costs that remain are those of the objects that do, image by image."""
    torch.manual_seed(seed)
    bank, _ = random_bank((32, 64), (32, 32))
    targets = [make_target(random_boxes(number)) for number in (6, 0, 3)]
    state = torch.get_rng_state()
    read, settled = (
        paste(random_images(3), targets, bank, 1.0, 3)[1]
        for _ in range(2)
        if torch.set_rng_state(state) is None
    )
    size, everything = (HEIGHT // 4, WIDTH // 4), []

    def cost(boxes):
        """Of a query, that names the object; the place of a box in its image tells nobody else."""
        everything.append(boxes)
        corners = pad_sequence(boxes.boxes.split(boxes.counts), batch_first=True)
        return corners.transpose(1, 2)[None]

    objects, costs = pasted_targets.settled(settled, size, CPU, cost)
    assert objects.counts == [len(target["labels"]) for target in read]
    assert sum(everything[0].counts) > len(objects)
    assert torch.equal(torch.cat(costs, dim=-1)[0].T, objects.boxes)
    for one, other in zip(read, settled, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_image_covered_wholly_has_the_pasted_object_alone():
    bank = bank_of(cells(slice(None), slice(None)))
    targets = [make_target(random_boxes(5)), make_target([])]
    images, new = paste(random_images(2), targets, bank, 1.0, 3)
    assert images.unique().tolist() == [9.0]
    for target in new:
        assert target["labels"].tolist() == [100]
        assert target["boxes"].tolist() == [[0, 0, WIDTH, HEIGHT]]


def test_a_pasted_object_covers_earlier_ones():
    same = cells(slice(2, 5), slice(3, 9))
    bank = bank_of(same, same)
    seen = set()
    for _ in range(20):
        _, (new,) = paste(torch.zeros(1, 3, HEIGHT, WIDTH), [make_target([])], bank, 1.0, 2)
        assert new["boxes"].tolist() == [[12, 8, 36, 20]]
        seen.update(new["labels"].tolist())
    assert seen == {100, 101}


def test_an_object_outside_a_smaller_image_is_dropped_and_one_on_its_border_cut():
    bank = bank_of(cells(slice(0, 2), slice(14, 16)), cells(slice(1, 8), slice(6, 16)))
    for _ in range(10):
        images, (new,) = paste(torch.zeros(1, 3, 16, 32), [make_target([])], bank, 1.0, 2)
        assert new["labels"].tolist() in ([], [101])
        assert all(box == [24, 4, 32, 16] for box in new["boxes"].tolist())
        assert (images == 9).sum() == len(new["labels"]) * 3 * 8 * 12


def test_as_many_objects_of_each_number():
    bank = bank_of(*(cells(slice(None), k) for k in range(6)))
    images = torch.zeros(900, 3, HEIGHT, WIDTH)
    _, new = paste(images, [make_target([])] * 900, bank, 0.5, 3)
    numbers = np.bincount([len(target["labels"]) for target in new], minlength=4)
    assert chisquare(numbers, [450, 150, 150, 150]).pvalue > 0.01
    assert all(len(target["labels"].unique()) == len(target["labels"]) for target in new)


@pytest.mark.slow
def test_objects_are_drawn_by_the_cube_of_their_score():
    scores = torch.tensor([0.9, 0.3, 0.0, 0.6, 0.7, 1.0])
    masks = [cells(0, 0)] * 5 + [cells([], [])]
    bank = bank_of(*masks, scores=scores)
    drawn, exist = bank.draw([(0, 0, slot) for slot in range(20000)], 6)
    assert exist.all(0).tolist() == exist.any(0).tolist() == [True] * 4 + [False] * 2
    share = scores[[0, 1, 3, 4]].double().numpy() ** 3
    share /= share.sum()
    first, second = (np.array([(drawn[:, k] == i).sum() for i in (0, 1, 3, 4)]) for k in (0, 1))
    after = [sum(share[j] * share[i] / (1 - share[j]) for j in range(4) if j != i) for i in range(4)]
    assert chisquare(first, 20000 * share).pvalue > 0.01
    assert chisquare(second, 20000 * np.array(after)).pvalue > 0.01
    assert all(len(set(row)) == 4 for row in drawn[:100, :4].tolist())


def test_without_a_power_all_objects_with_a_score_are_as_likely():
    bank = bank_of(*[cells(0, 0)] * 4, cells([], []), scores=torch.tensor([0.9, 0.0, 0.1, 0.4, 1.0]))
    bank.power = 0.0
    drawn, exist = bank.draw([(0, 0, slot) for slot in range(6000)], 5)
    assert exist.all(0).tolist() == exist.any(0).tolist() == [True] * 3 + [False] * 2
    assert chisquare(np.bincount(drawn[:, 0], minlength=5)[[0, 2, 3]]).pvalue > 0.01


def test_true_masks_are_drawn_before_all_others():
    bank = bank_of(*[cells(0, 0)] * 5, cells([], []), scores=torch.tensor([0.9, 2.0, 0.5, 2.0, 0.0, 2.0]))
    assert bank.known.tolist() == [False, True, False, True, False, False]
    drawn, exist = bank.draw([(0, 0, slot) for slot in range(8000)], 6)
    assert exist.all(0).tolist() == exist.any(0).tolist() == [True] * 4 + [False] * 2
    assert set(drawn[:, :2].flatten().tolist()) == {1, 3}
    assert chisquare([(drawn[:, 0] == 1).sum(), (drawn[:, 0] == 3).sum()]).pvalue > 0.01
    thirds = 8000 * np.array([0.9**3, 0.5**3]) / (0.9**3 + 0.5**3)
    assert chisquare([(drawn[:, 2] == 0).sum(), (drawn[:, 2] == 2).sum()], thirds).pvalue > 0.01


def contents(bank):
    """Per object, in order: (a pixel of its image, label, score, box, mask)."""
    columns = bank.images[bank.slots, 0, 0, 0], bank.labels, bank.scores, bank.boxes, bank.masks
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("batch", [1, 3, 7])
def test_bank_holds_the_last_images_with_objects_each_once(batch):
    bank, expected, number = PasteBank(4, PLAIN), [], 0
    for _ in range(10):
        counts = torch.randint(0, 3, (batch,)).tolist()
        images = torch.arange(number, number + batch).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).float()
        targets = [make_target(random_boxes(count, 8, 8), 10 * k) for k, count in enumerate(counts)]
        scores, masks = torch.rand(sum(counts)), torch.rand(sum(counts), 2, 2) < 0.5
        masks[:, 0, 0] = True
        objects = enter(bank, images, targets, masks, scores)
        columns = number + objects.image_index, objects.labels, scores, objects.boxes, masks
        new = list(zip(*(column.tolist() for column in columns), strict=True))
        expected += [[row for row in new if row[0] == number + k] for k in range(batch) if counts[k]]
        number += batch
        assert contents(bank) == list(itertools.chain(*expected[-4:]))
        assert len(bank) == len(expected[-4:])
    assert len(expected) > 4


def test_pixels_come_back_as_they_were(small_cfg):
    pixels = Pixels(small_cfg)
    images = pixels.normalise(torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16))
    bank = PasteBank(1, pixels)
    enter(bank, images, [make_target(random_boxes(1))], torch.ones(1, 4, 4))
    assert torch.equal(bank.pictures(torch.tensor([0])), images)


def save_and_load(bank, capacity):
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    loaded = PasteBank(capacity, PLAIN)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return loaded


def test_a_loaded_bank_goes_on_bit_for_bit():
    bank, _ = random_bank((32, 64), (64, 32), (32, 32), (32, 32), capacity=3)
    loaded = save_and_load(bank, capacity=3)
    image, target, masks = random_images(1), make_target(random_boxes(2)), torch.rand(2, 8, 16)
    for one in (bank, loaded):
        enter(one, image, [target], masks)
    assert contents(loaded) == contents(bank)
    target["seed"] = 0, 7, 0
    results = [paste(image, [target], one, 1.0, 3) for one in (bank, loaded)]
    (first, (old,)), (second, (new,)) = results
    assert torch.equal(first, second)
    assert old["pasted"].any()
    assert old.pop("seed") == new.pop("seed")
    assert all(torch.equal(old[name], new[name]) for name in old)
    for name, value in bank.state_dict().items():
        other = loaded.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_a_loaded_bank_shares_nothing():
    bank, _ = random_bank((32, 64), (64, 32), capacity=2)
    loaded = PasteBank(2, PLAIN)
    loaded.load_state_dict(bank.state_dict())
    before = contents(loaded)
    enter(bank, random_images(1), [make_target(random_boxes(2))], torch.ones(2, 8, 16))
    assert contents(loaded) == before != contents(bank)


def test_an_empty_bank_can_be_saved_and_filled():
    loaded = save_and_load(PasteBank(3, PLAIN), capacity=3)
    enter(loaded, random_images(1), [make_target(random_boxes(2))], torch.ones(2, 8, 16))
    assert len(loaded) == 1


@pytest.mark.parametrize("entered", [1, 4, 5])
@pytest.mark.parametrize("capacity", [2, 7])
def test_a_bank_of_another_capacity_goes_on_with_the_newest_images(entered, capacity):
    bank, _ = random_bank(*[(32, 64)] * entered, capacity=3)
    loaded = save_and_load(bank, capacity)
    newest = 4 * min(entered, capacity, 3)
    assert contents(loaded) == contents(bank)[-newest:]
    for _ in range(3):
        image, target = random_images(1), make_target(random_boxes(1))
        for one in (bank, loaded):
            enter(one, image, [target], torch.ones(1, 8, 16))
    assert contents(loaded)[-2:] == contents(bank)[-2:]
    assert len(loaded) == min(capacity, min(entered, 3) + 3)


@pytest.mark.parametrize("jitter", [None, Jitter(0.3, (0.5, 2.0))])
def test_what_an_image_receives_depends_on_its_seed_alone(jitter):
    bank, _ = random_bank((32, 64), (64, 64))
    images = random_images(5)
    targets = [make_target(random_boxes(3), seed=(0, 3, slot)) for slot in range(5)]
    together, new = paste(images, targets, bank, 0.7, 3, jitter)
    received = {len(target["labels"][target["pasted"]]) for target in new}
    assert len(received) > 1
    for i in range(5):
        alone, (other,) = paste(images[i : i + 1], targets[i : i + 1], bank, 0.7, 3, jitter)
        assert torch.equal(alone[0], together[i])
        assert other.pop("seed") == new[i].pop("seed") == (0, 3, i)
        assert all(torch.equal(other[name], new[i][name]) for name in other)


def test_paste_depends_on_the_random_state_alone_and_leaves_its_arguments():
    bank, _ = random_bank((32, 64), (64, 64))
    images = random_images(3).to(memory_format=torch.channels_last)
    targets = [make_target(random_boxes(3), valid=torch.rand(HEIGHT, WIDTH) < 0.5) for _ in range(3)]
    before = [images.clone(), *(value.clone() for target in targets for value in target.values())]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(paste(images, targets, bank, 1.0, 3)[0])
    after = [images, *(value for target in targets for value in target.values())]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert results[0].is_contiguous(memory_format=torch.channels_last)


def test_jitter_of_nothing_changes_nothing():
    bank, by_label = random_bank((32, 64), (64, 32))
    images, targets = random_images(3), [make_target(random_boxes(3)) for _ in range(3)]
    new_images, new_targets = paste(images, targets, bank, 1.0, 3, Jitter())
    plain = new_images.round()
    assert torch.allclose(plain, new_images, atol=1e-2)
    for image in zip(images, targets, plain, new_targets, strict=True):
        assert assert_painted(*image, by_label)


def test_jitter_moves_an_object_by_whole_cells():
    source, mask = random_images(1), cells(slice(2, 5), slice(6, 10))
    bank = PasteBank(50, PLAIN)
    enter(bank, source, [make_target([[24.0, 8.0, 40.0, 20.0]])], mask[None])
    images, targets = torch.zeros(40, 3, HEIGHT, WIDTH), [make_target([])] * 40
    images, new = paste(images, targets, bank, 1.0, 1, Jitter(shift=0.1))
    moves = set()
    for image, target in zip(images, new, strict=True):
        left, top, right, bottom = (int(side) for side in target["boxes"][0])
        assert (right - left, bottom - top) == (16, 12)
        moves.add((left - 24, top - 8))
        expected = torch.zeros(3, HEIGHT, WIDTH)
        expected[:, top:bottom, left:right] = source[0, :, 8:20, 24:40]
        assert torch.allclose(image, expected, atol=0.1)
    assert moves <= set(itertools.product((-8, -4, 0, 4, 8), (-4, 0, 4)))
    assert len(moves) > 5


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_jitter_scales_an_object_around_its_box(scale):
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    mask = (rows - 6) ** 2 + (columns - 8) ** 2 < 16
    image = (128 + torch.randn(1, 3, 64, 64).cumsum(2).cumsum(3) / 2).clamp(0, 255).round()
    bank = PasteBank(50, PLAIN)
    enter(bank, image, [make_target([[20.0, 12.0, 48.0, 40.0]])], mask[None])
    new_image, (new,) = paste(
        torch.full((1, 3, 64, 64), 99.0), [make_target([])], bank, 1.0, 1, Jitter(scale=(scale, scale))
    )

    def resampled(source, stride):
        y, x = np.mgrid[: 64 // stride, : 64 // stride] * stride + stride / 2
        source_y, source_x = 26 + (y - 26) / scale, 34 + (x - 34) / scale
        where = [source_y / stride - 0.5, source_x / stride - 0.5]
        return map_coordinates(source, where, order=1, mode="grid-constant")

    soft = resampled(mask.double().numpy(), 4)
    sure = abs(soft - 0.5) > 1e-4
    visible = new["pasted_masks"][0].numpy()
    np.testing.assert_array_equal(visible[sure], soft[sure] > 0.5)
    inside = np.kron(visible, np.ones((4, 4), dtype=bool))
    for channel in range(3):
        expected = resampled(bank.images[0, channel].double().numpy(), 1)
        np.testing.assert_allclose(new_image[0, channel].numpy()[inside], expected[inside], atol=1e-4)
    assert (new_image[0].numpy()[:, ~inside] == 99).all()


def test_true_masks_enter_the_bank_in_whole_cells(small_cfg):
    """Two objects of the image's own, of which one is known, and two pasted ones, of which one is known."""
    sim = small_cfg.MODEL.SIM
    sim.SUPERVISION, sim.COPY_PASTE.ENABLED, sim.COLOR_MODEL.ENABLED = "mixed", True, True
    copying = build_copy_paste(small_cfg, CPU)
    images, masks = random_images(1), torch.rand(4, HEIGHT, WIDTH) < torch.rand(4, 1, WIDTH)
    known = torch.tensor([False, True, True, False])
    pasted = torch.tensor([False, False, True, True])
    target = make_target([[0, 0, WIDTH, HEIGHT]] * 4, known=known, pasted=pasted)
    target["pasted_masks"] = torch.zeros(4, 8, 16, dtype=torch.bool)
    objects = flatten_targets([target], (8, 16), CPU)
    colors = ColorLabels(torch.rand(4, 8, 16), torch.tensor([0.9, 0.4, 0.7, 0.6]), torch.ones(4))
    valid = torch.ones(1, 8, 16, dtype=torch.bool)
    pixels = box_pixels(objects)
    made = Supervision(sim, (1, 1.0, 0.0), 0, 1, images, valid, pixels, None, None, colors, masks[known])
    match = Match(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))
    copying.remember(images, [MatchedBoxes(objects, match, torch.zeros(1, 1, 4, 8, 16), made)], copying.start)
    assert copying.bank.scores.tolist() == pytest.approx([0.9, 2.0, 0, 0])
    assert torch.equal(copying.bank.masks[0], colors.masks[0] > 0.5)
    for y, x in itertools.product(range(8), range(16)):
        cell = masks[1, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert copying.bank.masks[1, y, x] == (cell.sum() > 8)


def test_masks_corrected_by_colour_are_pasted_where_they_are_made(small_cfg):
    sim = small_cfg.MODEL.SIM
    sim.SUPERVISION, sim.COPY_PASTE.ENABLED, sim.COLOR_MODEL.ENABLED = "box", True, True
    assert teacher_terms(small_cfg) == []
    copying = build_copy_paste(small_cfg, CPU)
    images = random_images(1)
    objects = flatten_targets([make_target([[0, 0, 32, 32], [32, 0, 64, 32]])], (8, 16), CPU)
    masks = torch.rand(2, 8, 16)
    colors = ColorLabels(masks, torch.tensor([0.9, 0.4]), torch.ones(2))
    valid = torch.ones(1, 8, 16, dtype=torch.bool)
    pixels = box_pixels(objects)
    made = Supervision(sim, (1, 1.0, 0.0), 0, 1, images, valid, pixels, None, None, colors)
    match = Match(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool))
    matched = [MatchedBoxes(objects, match, torch.zeros(1, 1, 2, 8, 16), made)]
    copying.remember(images, matched, copying.start - 2 * sim.COPY_PASTE.PICTURES - 1)
    assert copying.bank.entered == 0, "long before anything is pasted nothing is kept"
    copying.remember(images, matched, copying.start - 2 * sim.COPY_PASTE.PICTURES)
    assert copying.bank.entered == 1
    assert torch.equal(copying.bank.masks, masks > 0.5)
    assert torch.equal(copying.bank.scores, colors.quality)
