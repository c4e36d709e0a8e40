"""Box prompts: what they see, that nobody else sees them, and that they learn with the same losses."""

import itertools
import math

import pytest
import torch

import sim_m2f
from sim_m2f.errors import UserError
from sim_m2f.modeling.mask_decoder import FAR, _attention_mask
from sim_m2f.modeling.prompts import box_sines, pixels_in_boxes
from sim_m2f.segmenter import Segmenter
from sim_m2f.structures import Prompts
from sim_m2f.supervision.base import normalised
from sim_m2f.supervision.box_fill import box_fill_loss
from sim_m2f.supervision.criterion import build_criterion
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.matched import per_object
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.projection import projection_loss
from sim_m2f.supervision.prompting import annotated_prompts, match_prompts
from sim_m2f.supervision.targets import flatten_targets

BOXES = [[8.0, 4.0, 40.0, 60.0], [30.0, 30.0, 64.0, 64.0], [2.0, 2.0, 3.0, 3.0]]
PROMPTED = ["MODEL.SIM.PROMPTS.ENABLED", "True"]


def targets_of(*images):
    return [
        {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.arange(len(boxes)) % 3}
        for boxes in images
    ]


def prompts_of(*images, size=(64, 64)):
    return annotated_prompts(targets_of(*images), size, torch.device("cpu"))


@pytest.fixture
def networks(small_cfg):
    """The same network without and with prompts."""
    plain = sim_m2f.build_model(small_cfg).eval()
    small_cfg.merge_from_list(PROMPTED)
    return plain, sim_m2f.build_model(small_cfg).eval()


def flattened(value):
    if isinstance(value, dict):
        return [tensor for key in sorted(value) if key != "prompted" for tensor in flattened(value[key])]
    return list(itertools.chain(*map(flattened, value))) if isinstance(value, list) else [value]


@torch.no_grad()
def test_ordinary_outputs_are_the_same_to_the_last_bit(networks):
    plain, prompted = networks
    images = torch.randn(2, 3, 64, 64)
    expected = flattened(plain(images))
    for outputs in (prompted(images), prompted(images, prompts=prompts_of(BOXES, BOXES[:1]))):
        assert all(torch.equal(a, b) for a, b in zip(flattened(outputs), expected, strict=True))


@torch.no_grad()
def test_one_prediction_per_box_and_layer(networks):
    outputs = networks[1](torch.randn(2, 3, 64, 64), prompts=prompts_of(BOXES, BOXES[:1]))["prompted"]
    assert outputs["pred_masks"].shape == (2, 3, 16, 16)
    assert outputs["pred_logits"].shape == (2, 3, 9)
    assert len(outputs["aux_outputs"]) == 1  # of two layers; none from the queries alone
    short = networks[1](torch.randn(1, 3, 64, 64), auxiliary=False, prompts=prompts_of(BOXES))["prompted"]
    assert short["aux_outputs"] == []


@torch.no_grad()
def test_a_prompt_is_answered_whatever_other_prompts_there_are(networks):
    images = torch.randn(1, 3, 64, 64)
    together = networks[1](images, prompts=prompts_of(BOXES))["prompted"]
    for n, box in enumerate(BOXES):
        prompts = Prompts(prompts_of([box]).boxes, torch.tensor([[n % 3]]))
        alone = networks[1](images, prompts=prompts)["prompted"]
        for name in ("pred_logits", "pred_masks"):
            torch.testing.assert_close(alone[name][:, 0], together[name][:, n])


@torch.no_grad()
def test_masks_end_where_training_may_have_moved_their_box(networks):
    prompts = prompts_of([[16.0, 20.0, 40.0, 36.0]])
    decoder = networks[1].sem_seg_head.predictor
    assert decoder.box_noise == pytest.approx(0.1)  # 2.4 and 1.6 pixels: 13.6 to 42.4 and 18.4 to 37.6
    outputs = networks[1](torch.randn(1, 3, 64, 64), prompts=prompts)["prompted"]
    for layer in (outputs, *outputs["aux_outputs"]):
        far = layer["pred_masks"][0, 0] == FAR
        expected = torch.ones(16, 16, dtype=torch.bool)
        expected[5:9, 3:11] = False
        assert torch.equal(far, expected)


@torch.no_grad()
def test_the_first_layer_looks_into_the_box_alone(networks):
    decoder = networks[1].sem_seg_head.predictor
    decoder.transformer_cross_attention_layers = decoder.transformer_cross_attention_layers[:1]
    decoder.transformer_self_attention_layers = decoder.transformer_self_attention_layers[:1]
    decoder.transformer_ffn_layers = decoder.transformer_ffn_layers[:1]
    encoded = [torch.randn(1, 32, side, side) for side in (4, 8, 16)]
    features, prompts = torch.randn(1, 32, 32, 32), prompts_of([[16.0, 0.0, 48.0, 32.0]])
    _, before = decoder(encoded, features, True, prompts)
    assert before["pred_logits"].shape[:3] == (1, 1, 1)
    inside = torch.zeros(4, 4, dtype=torch.bool)
    inside[:2, 1:3] = True
    for changed, same in ((~inside, True), (inside, False)):
        others = [torch.where(changed, torch.randn(1, 32, 4, 4), encoded[0]), *encoded[1:]]
        _, after = decoder(others, features, True, prompts)
        assert torch.equal(before["pred_logits"], after["pred_logits"]) == same


def test_later_layers_look_at_the_mask_within_the_box():
    embedding, features = torch.randn(2, 3, 5), torch.randn(2, 5, 12)
    box = torch.rand(2, 3, 12) < 0.5
    embedding[0, 0] = 0  # a mask of logits 0: all of the box
    box[1, 2] = False
    box[1, 2, (embedding[1, 2] @ features[1]).argmin()] = True  # no pixel of the mask in the box
    allowed = _attention_mask(embedding, features, box)
    for b, q in itertools.product(range(2), range(3)):
        mask = [box[b, q, p].item() and float(embedding[b, q] @ features[b, :, p]) >= 0 for p in range(12)]
        assert allowed[b, q].tolist() == (mask if any(mask) else box[b, q].tolist())


def test_pixels_of_a_box_are_those_with_their_centre_in_it():
    boxes = torch.tensor([[[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.31, 0.52, 0.32, 0.53]]])
    height, width = 5, 8
    owned = pixels_in_boxes(boxes, height, width).view(3, height, width)
    for n, (x0, y0, x1, y1) in enumerate(boxes[0].tolist()):
        for y, x in itertools.product(range(height), range(width)):
            in_x = x0 <= (x + 0.5) / width < x1 or int((x0 + x1) / 2 * width) == x
            in_y = y0 <= (y + 0.5) / height < y1 or int((y0 + y1) / 2 * height) == y
            assert owned[n, y, x].item() == (in_x and in_y)
    assert owned[2].sum() == 1


def test_sines_of_a_box():
    box = [0.1, 0.25, 0.5, 0.8]
    angles = [math.pi * 2**k * side for side in box for k in range(8)]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(box_sines(torch.tensor(box)), torch.tensor(expected), atol=1e-4, rtol=0)


def test_noise_moves_sides_and_changes_labels():
    images = targets_of(BOXES * 200)
    quiet = annotated_prompts(images, (64, 128), torch.device("cpu"))
    assert torch.equal(quiet.boxes[0], images[0]["boxes"] / torch.tensor([128, 64, 128, 64]))
    assert torch.equal(quiet.labels[0], images[0]["labels"])
    noisy = annotated_prompts(images, (64, 128), torch.device("cpu"), 8, 0.1, 0.5)
    sides = (quiet.boxes[..., 2:] - quiet.boxes[..., :2]).repeat(1, 1, 2)
    moved = (noisy.boxes - quiet.boxes) / sides
    assert moved.abs().max() <= 0.1 + 1e-5
    assert moved.abs().mean() == pytest.approx(0.05, abs=0.01)  # less where the image ends
    assert (noisy.labels != quiet.labels).float().mean() == pytest.approx(0.5 * 7 / 8, abs=0.06)
    assert noisy.labels.max() == 7


def prompted_outputs(layers=2):
    def one():
        return {
            "pred_logits": torch.randn(2, 3, 4, requires_grad=True),
            "pred_masks": torch.randn(2, 3, 16, 16, requires_grad=True),
        }

    def group():
        return {**one(), "aux_outputs": [one() for _ in range(layers - 1)]}

    return {**group(), "mask_features": torch.randn(2, 5, 16, 16), "prompted": group()}


def criterion_of(supervision):
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list(
        ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "MODEL.SIM.SUPERVISION", supervision, *PROMPTED]
    )
    cfg.merge_from_list(["MODEL.SIM.BOX_FILL.WEIGHT", 2.0, "MODEL.SIM.PROMPTS.WEIGHT", 0.5])
    cfg.merge_from_list(["MODEL.SIM.PAIRWISE.WARMUP", 0.0, "MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 64])
    return build_criterion(cfg)


def test_the_nth_prompt_learns_the_nth_object_with_the_same_losses():
    outputs, targets = prompted_outputs(), targets_of(BOXES, BOXES[:1])
    losses, _ = criterion_of("box")(outputs, targets, torch.randn(2, 3, 64, 64))
    objects = flatten_targets(targets, (16, 16), torch.device("cpu"))
    objects = normalised(objects, torch.tensor([2, 4, 0, 4]))
    groups = [*outputs["prompted"]["aux_outputs"], outputs["prompted"]]
    masks = torch.stack([torch.cat([layer["pred_masks"][0], layer["pred_masks"][1, :1]]) for layer in groups])
    whole = Match(torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool))
    profiles = masks.amax(-2), masks.amax(-1)
    projection = per_object(projection_loss(*profiles, *objects.projections), whole, objects)
    fill = per_object(box_fill_loss(masks, objects.box_masks), whole, objects)
    logits = [torch.cat([layer["pred_logits"][0], layer["pred_logits"][1, :1]]) for layer in groups]
    classes = sum(torch.nn.functional.cross_entropy(layer, objects.labels) for layer in logits)
    assert losses["loss_prompt_projection"].item() == pytest.approx(0.5 * 5 * projection.item(), rel=1e-5)
    assert losses["loss_prompt_box_fill"].item() == pytest.approx(0.5 * 2 * fill.item(), rel=1e-5)
    assert losses["loss_prompt_ce"].item() == pytest.approx(0.5 * 2 * classes.item(), rel=1e-5)
    assert {name.replace("prompt_", "") for name in losses} == {
        name for name in losses if not name.startswith("loss_prompt")
    }


@pytest.mark.parametrize("supervision", ["box", "mask"])
def test_places_without_an_object_learn_nothing(supervision):
    outputs, targets = prompted_outputs(), targets_of(BOXES, BOXES[:1])
    for target in targets:
        target["masks"] = torch.rand(len(target["labels"]), 64, 64) < 0.5
    losses, _ = criterion_of(supervision)(outputs, targets, torch.randn(2, 3, 64, 64))
    sum(losses.values()).backward()
    for layer in (outputs["prompted"], *outputs["prompted"]["aux_outputs"]):
        for name in ("pred_masks", "pred_logits"):
            gradient = layer[name].grad.flatten(2).abs().sum(2)
            assert (gradient[0] > 0).all()
            assert gradient[1].tolist()[1:] == [0, 0]
            assert gradient[1, 0] > 0


def test_images_without_an_object_have_a_prompt_that_does_not_count():
    prompts = annotated_prompts(targets_of([], []), (64, 64), torch.device("cpu"), 3, 0.1, 0.2)
    assert prompts.boxes.shape == (2, 1, 4)
    losses, _ = criterion_of("box")(prompted_outputs(), targets_of([], []), torch.randn(2, 3, 64, 64))
    assert all(loss.isfinite() for loss in losses.values())
    assert losses["loss_prompt_ce"] == 0


def test_the_match_of_prompts_is_their_order():
    objects = flatten_targets(targets_of(BOXES, [], BOXES[:2]), (16, 16), torch.device("cpu"))
    match = match_prompts(Layers(torch.zeros(4, 3, 3, 4), torch.zeros(3, 4, 3, 16, 16)), objects)
    assert match.query.tolist() == [[0, 1, 2, 0, 1]] * 4
    assert match.matched.all()


def test_predict_gives_a_mask_per_box_within_it(small_cfg):
    small_cfg.merge_from_list([*PROMPTED, "INPUT.MIN_SIZE_TEST", "100", "INPUT.MAX_SIZE_TEST", "150"])
    names = [f"class {n}" for n in range(8)]
    model = Segmenter(sim_m2f.build_model(small_cfg), small_cfg, names)
    image, boxes = torch.randint(256, (3, 50, 70), dtype=torch.uint8), [[3.2, 4, 30, 41], [40, 10, 66, 20.5]]
    found = model.predict(image, boxes=boxes, labels=[2, 5])
    assert found.names == ["class 2", "class 5"]
    assert found.boxes.tolist() == torch.tensor(boxes).tolist()
    for both, alone in zip(
        model.predict_both(image, boxes, [2, 5], False), (found, model.predict(image)), strict=True
    ):
        assert both.rles == alone.rles
        torch.testing.assert_close(both.scores, alone.scores)
    corrected = model.predict(image, boxes=boxes, labels=[2, 5], colors=True)
    assert corrected.masks.shape == found.masks.shape
    assert not corrected.masks[0, :, 31:].any()
    resized = model.resize(image)
    size = tuple(resized.shape[-2:])
    assert size == (100, 140)
    padded = torch.zeros(1, 3, 128, 160)
    padded[0, :, :100, :140] = model.pixels.normalise(resized)
    shares = torch.tensor(boxes) * 2 / torch.tensor([160.0, 128, 160, 128])
    with torch.no_grad():
        prompts = Prompts(shares[None], torch.tensor([[2, 5]]))
        logits = model.network(padded, prompts=prompts)["prompted"]["pred_masks"]
    full = torch.nn.functional.interpolate(logits, scale_factor=4, mode="bilinear")[..., :100, :140]
    full = torch.nn.functional.interpolate(full, size=(50, 70), mode="bilinear")[0]
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        for y, x in itertools.product(range(50), range(70)):
            inside = x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1
            if full[n, y, x].abs() > 1e-4:
                assert found.masks[n, y, x].item() == (inside and full[n, y, x].item() > 0)


def test_boxes_that_cannot_be_answered_are_refused_in_one_line(small_cfg):
    image, names = torch.zeros(3, 32, 32, dtype=torch.uint8), ["a"] * 8
    plain = Segmenter(sim_m2f.build_model(small_cfg), small_cfg, names)
    with pytest.raises(UserError, match="PROMPTS"):
        plain.predict(image, boxes=[[0, 0, 9, 9]])
    small_cfg.merge_from_list(PROMPTED)
    prompted = Segmenter(sim_m2f.build_model(small_cfg), small_cfg, names)
    with pytest.raises(UserError, match="from 0 to 7"):
        prompted.predict(image, boxes=[[0, 0, 9, 9]], labels=[8])
    for wrong in ([1, 2, 3], [[1, 2, 3], [4, 5, 6]], [[1, 2, 3, 4, 5, 6, 7, 8]], 7):
        with pytest.raises(UserError, match="N, 4"):
            prompted.predict(image, boxes=wrong)
    for wrong in ("boxes", [["a", 2, 3, 4]], [[1, 2], [3]]):
        with pytest.raises(UserError, match="boxes are no array of numbers"):
            prompted.predict(image, boxes=wrong)
    with pytest.raises(UserError, match="labels are no array of numbers"):
        prompted.predict(image, boxes=[[0, 0, 9, 9]], labels=["a"])
    with pytest.raises(UserError, match="as many labels, whole numbers from 0 to 7"):
        prompted.predict(image, boxes=[[0, 0, 9, 9]], labels=[1.7])
    for box in ([float("nan"), 0, 9, 9], [0, 0, float("inf"), 9], [30, 5, 10, 40], [5, 30, 40, 10]):
        with pytest.raises(UserError, match="finite numbers x0, y0, x1, y1"):
            prompted.predict(image, boxes=[box])
    assert len(prompted.predict(image, boxes=[])) == 0
    assert len(prompted.predict(image, boxes=[0, 0, 9, 9])) == 1
    with pytest.raises(UserError, match="one image"):
        prompted.predict([image], boxes=[[0, 0, 9, 9]])
