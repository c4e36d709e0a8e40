"""The network's shortcuts against what they stand for."""

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL_FILE
from memory_peak import MemoryPeak
from scipy import ndimage
from skimage import measure
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from sim_m2f import build_model, get_cfg
from sim_m2f.errors import UserError
from sim_m2f.modeling import mask2former
from sim_m2f.modeling.backbone import TimmBackbone, build_backbone
from sim_m2f.modeling.convolution import PixelLinear, convolution, mask_product
from sim_m2f.modeling.frozen_norm import fold_frozen_norms
from sim_m2f.modeling.position import sine_positions
from sim_m2f.modeling.postprocess import instances, masks_in_boxes
from sim_m2f.modeling.specks import SMALL, without_specks

RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", "18"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5"),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", "12", "MODEL.MASK_FORMER.DEC_LAYERS", "10"),
]


@pytest.fixture
def network():
    cfg = get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list(RESNET)
    return build_model(cfg).eval()


@pytest.mark.parametrize(
    ("depth", "norm", "width", "divisor"),
    [
        (18, "GN", 48, 32),
        (50, "GN", 64, 128),
        (18, "FrozenBN", 5, 1),
        (50, "FrozenBN", 62, 4),
        (50, "GN", 256, 128),
    ],
)
def test_a_resnet_has_whole_groups_and_bottlenecks(depth, norm, width, divisor):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", str(depth)])
    cfg.merge_from_list(["MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.RES2_OUT_CHANNELS", str(width)])
    if width % divisor:
        with pytest.raises(UserError, match=f"RES2_OUT_CHANNELS is {width}; .*a multiple of {divisor}$"):
            build_backbone(cfg)
    else:
        (maps, *_) = build_backbone(cfg)(torch.zeros(1, 3, 32, 32)).values()
        assert maps.shape[1] == width


@pytest.mark.parametrize("name", ["maxvit_tiny_tf_224", "coat_lite_tiny", "hiera_tiny_224"])
def test_a_backbone_of_one_size_of_images_is_told(name):
    with pytest.raises(UserError, match=f"MODEL.BACKBONE.NAME: {name} does not take images") as error:
        TimmBackbone(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "convnext_atto"])
def test_a_backbone_of_images_of_any_size(name):
    maps = TimmBackbone(name)(torch.zeros(1, 3, 64, 96))
    assert [tuple(each.shape[2:]) for each in maps.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]
)
def test_timms_swins_take_images_of_any_size(name):
    """And give what timm's model made for that size gives, channels first."""
    small = {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 1, 1, 1), "window_size": 2}
    backbone = TimmBackbone(name, img_size=64, **small).eval()
    made_for_it = timm.create_model(name, features_only=True, img_size=(64, 96), **small).eval()
    made_for_it.load_state_dict(backbone.body.state_dict())
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps, expected = backbone(image), made_for_it(image)
    first = name.startswith("swinv2_cr")  # which has the channels first in timm too
    for given, wanted, side in zip(maps.values(), expected, (4, 8, 16, 32), strict=True):
        assert given.shape[1:] == (2 * side, 64 // side, 96 // side)
        torch.testing.assert_close(given, wanted if first else wanted.permute(0, 3, 1, 2))


def test_images_of_one_pixel_of_the_coarsest_map(network):
    for training in (False, True):
        outputs = network.train(training)(torch.zeros(1, 3, 32, 32))
        assert outputs["pred_masks"].shape == (1, 12, 8, 8)
        assert outputs["pred_masks"].isfinite().all()


def encoded_by_definition(height, length, width):
    """Vaswani et al., sine and cosine of 10000^(-2i/d) times the place, 1 to 2 pi; y before x."""
    channel = np.arange(width // 2)
    frequency = 10000.0 ** -(channel // 2 * 4 / width)
    y, x = (2 * np.pi * np.arange(1, size + 1)[:, None] / size * frequency for size in (height, length))
    y, x = (np.where(channel % 2, np.cos(axis), np.sin(axis)) for axis in (y, x))
    grid = np.concatenate([np.repeat(y, length, 0), np.tile(x, (height, 1))], 1)
    return torch.from_numpy(grid)[None].float()


def test_positions_are_their_definition_and_few_are_kept():
    torch.testing.assert_close(
        sine_positions(5, 7, 32, torch.device("cpu")), encoded_by_definition(5, 7, 32), rtol=0, atol=1e-5
    )
    with MemoryPeak() as kept:
        for side in range(30):
            sine_positions(300, 300 + side, 64, torch.device("cpu"))
    assert kept.bytes > 23e6 > 10 * kept.now > 0  # one map has 23 MB; rows and columns stay


def resized(tensor, size):
    return F.interpolate(tensor[None], size=size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("original", [(37, 50), (150, 203)])
def test_instances_are_those_of_two_resizings(original):
    """To the network's input, without its padding, to the image, then the threshold."""
    image_size, padded = (75, 101), (96, 128)
    logits = F.interpolate(torch.randn(1, 9, 6, 8), size=(24, 32), mode="bicubic") * 4
    logits[:, 4] = -1
    outputs = {"pred_logits": 3 * torch.randn(1, 9, 6), "pred_masks": logits}
    (found,) = instances(outputs, [image_size], [original], top_k=20)

    full = resized(logits[0].double(), padded)[:, : image_size[0], : image_size[1]]
    full = resized(full, original)
    mask_scores = torch.stack([x[x > 0].sigmoid().mean() if (x > 0).any() else x.new_tensor(0) for x in full])
    scores = outputs["pred_logits"][0].double().softmax(-1)[:, :-1]
    pairs = scores.flatten().topk(20).indices
    query, label = pairs // 5, pairs % 5
    expected = scores[query, label] * mask_scores[query]
    order = expected.sort(descending=True, stable=True).indices
    torch.testing.assert_close(found["scores"].double(), expected[order], rtol=1e-5, atol=1e-6)
    assert torch.equal(found["labels"][expected[order] > 0], label[order][expected[order] > 0])
    certain = full[query[order]].abs() > 1e-4
    assert certain.float().mean() > 0.99
    assert torch.equal(found["masks"][certain], (full[query[order]] > 0)[certain])
    for mask, box in zip(found["masks"], found["boxes"].tolist(), strict=True):
        rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
        assert box == ([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if rows else [0, 0, 0, 0])


def test_attention_masks_are_the_resized_predictions(network):
    """The decoder resizes features, not masks; the queries attend where the earlier prediction says."""
    seen = []
    decoder = network.sem_seg_head.predictor
    for layer in decoder.transformer_cross_attention_layers:
        layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[4]))
    with torch.no_grad():
        outputs = network(torch.randn(2, 3, 96, 160))
    sizes = [(3, 5), (6, 10), (12, 20)]
    assert len(seen) == len(outputs["aux_outputs"]) == 9
    for i, (allowed, prediction) in enumerate(zip(seen, outputs["aux_outputs"], strict=True)):
        logits = F.interpolate(prediction["pred_masks"], size=sizes[i % 3], mode="bilinear").flatten(2)
        expected = (logits >= 0) | (logits < 0).all(-1, keepdim=True)
        certain = logits.abs() > 1e-5 * logits.abs().max()
        certain |= (logits < 0).all(-1, keepdim=True)
        assert torch.equal(allowed[certain], expected[certain])
        assert allowed.any(-1).all()


def test_without_auxiliary_outputs_the_result_is_the_same(network):
    images = torch.randn(1, 3, 96, 160)
    with torch.no_grad():
        full, short = network(images), network(images, auxiliary=False)
    assert short["aux_outputs"] == []
    for name in ("pred_logits", "pred_masks", "mask_features"):
        assert torch.equal(full[name], short[name])


def test_folded_norms_change_nothing():
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )
    for norm in body.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    body = freeze_batch_norm_2d(body).double()
    folded = copy.deepcopy(body)
    fold_frozen_norms(folded)
    folded = copy.deepcopy(folded)
    body[0].weight.data *= 2
    body[1].weight *= 3
    folded.load_state_dict(body.state_dict())
    assert list(folded.state_dict()) == list(body.state_dict())
    images = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    torch.testing.assert_close(folded(images), body(images))
    grads = [
        torch.autograd.grad(net(images).square().sum(), list(net.parameters())) for net in (folded, body)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.slow
def test_compiled_maps_are_those_of_the_network_itself(network):
    compiled = copy.deepcopy(network)
    mask2former.compile_maps(compiled, "aot_eager")
    assert list(compiled.state_dict()) == list(network.state_dict())
    images, results = torch.randn(1, 3, 64, 64), []
    for one in (network, compiled):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = one(images)
        outputs["layers"]["pred_masks"].float().square().mean().backward()
        gradients = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
        results.append((outputs["pred_logits"], outputs["pred_masks"], gradients))
    torch.testing.assert_close(*results, rtol=0.02, atol=0.02)


def test_weights_cast_together_are_those_that_autocast_casts(monkeypatch):
    cfg = get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([*RESNET[:6], "MODEL.BACKBONE.FREEZE_AT", "2"])
    network = build_model(cfg).train()
    for norm in network.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.load_state_dict(
                {name: torch.rand_like(value) + 0.5 for name, value in norm.state_dict().items()}
            )
    images, weights = torch.randn(1, 3, 64, 64), dict(network.named_parameters())
    results = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = network(images)
        outputs["pred_masks"].float().square().mean().backward()
        gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
        results.append((outputs["pred_logits"], outputs["pred_masks"], gradients))
        assert all(weight is weights[name] for name, weight in network.named_parameters())
        network.zero_grad()
        monkeypatch.setattr(mask2former, "lowered_weights", nullcontext)
    assert results[0][1].dtype == torch.bfloat16
    torch.testing.assert_close(*(result[:2] for result in results), rtol=0, atol=0)
    together, autocast = (result[2] for result in results)
    assert together.keys() == autocast.keys()
    assert all(gradient.dtype == torch.float32 for gradient in together.values())
    for name, gradient in autocast.items():
        assert (together[name] - gradient).norm() <= 0.02 * gradient.norm(), name


def test_linear_layers_of_pixels_are_linear_layers():
    layer = PixelLinear(24, 40)
    pixels = torch.randn(2, 77, 24)
    expected = F.linear(pixels.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        result = layer(pixels)
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(pixels).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_convolutions_and_their_gradients(memory_format):
    conv = nn.Conv2d(5, 7, 3, padding=1)
    maps = torch.randn(2, 5, 6, 9).to(memory_format=memory_format).requires_grad_()
    gradient = torch.randn(2, 7, 6, 9).to(memory_format=memory_format)
    inputs = maps, conv.weight, conv.bias
    result = convolution(conv, *inputs)
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = F.conv2d(*exact, padding=1)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(result, inputs, gradient)
    for found, right in zip(gradients, torch.autograd.grad(expected, exact, gradient.double()), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("read", [[], [(0, 3), (1, 0), (1, 5)]])
def test_gradients_of_masks_that_few_losses_read(read):
    embedding = torch.randn(2, 6, 4, requires_grad=True)
    features = torch.randn(2, 3, 5, 4).permute(0, 3, 1, 2).flatten(2).requires_grad_()
    gradient = torch.zeros(2, 6, 15)
    for place in read:
        gradient[place] = torch.randn(15)
    masks = mask_product(embedding, features)
    assert torch.equal(masks, embedding @ features)
    found = torch.autograd.grad(masks, (embedding, features), gradient)
    expected = gradient @ features.transpose(1, 2), embedding.transpose(1, 2) @ gradient
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "convnext_atto", "resnet10t"])
@pytest.mark.slow
def test_frozen_norms_of_any_backbone_never_change(name):
    cfg = get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", name])
    images = torch.randn(2, 3, 64, 64)
    expected = build_model(cfg).eval().backbone(images)
    cfg.merge_from_list(["MODEL.BACKBONE.FREEZE_NORMS", "True"])
    backbone = build_model(cfg).train().backbone
    found = backbone(images)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-3, atol=1e-4)
    assert not any(
        parameter.requires_grad
        for module in backbone.modules()
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))
        for parameter in module.parameters()
    )
    before = {key: value.clone() for key, value in backbone.state_dict().items() if "running" in key}
    backbone(images + 3)
    assert all(torch.equal(backbone.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "GN", "FrozenBN"])
def test_stages_that_are_kept_fixed_neither_learn_nor_count(norm):
    """Not by gradients, and not by statistics: in training they give what they give in tests."""
    cfg = get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([*RESNET[:4], "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.NORM", norm])
    fixed, seen = ("conv1", "bn1", "layer1"), []
    images = torch.randn(2, 3, 64, 64)
    for stages in (0, 2):
        cfg.MODEL.BACKBONE.FREEZE_AT = stages
        torch.manual_seed(0)
        backbone = build_backbone(cfg)
        seen.append(backbone.eval()(images)["res2"])
    torch.testing.assert_close(seen[0], seen[1])
    before = {name: value.clone() for name, value in backbone.body.state_dict().items()}
    (found := backbone.train()(images))["res5"].square().mean().backward()
    torch.testing.assert_close(found["res2"], seen[1])
    learning = {
        name.split(".")[0] for name, weight in backbone.body.named_parameters() if weight.grad is not None
    }
    assert learning == {"layer2", "layer3", "layer4"}
    changed = {
        name.split(".")[0]
        for name, value in before.items()
        if not torch.equal(value, backbone.body.state_dict()[name])
    }
    assert not changed.intersection(fixed)
    assert bool(changed) == (norm in ("BN", "SyncBN"))


@pytest.mark.parametrize("ellipse", [0.0, 2.0])
def test_masks_of_given_boxes_span_them(ellipse):
    """Against interpolation of whole maps and a search over all rises; the last mask is too low for any."""
    logits = 3 * torch.randn(6, 12, 16, generator=torch.Generator().manual_seed(1)) - 4
    logits[5] = -20
    boxes = torch.tensor([[3.0, 5, 60, 40]] * 3 + [[10.2, 0, 30.7, 22.4]] * 2 + [[0.0, 0, 64, 48]])
    masks, scores = masks_in_boxes(logits, boxes, (48, 64), (48, 64), 0.9, ellipse)
    full = F.interpolate(logits[None], scale_factor=4, mode="bilinear")[0].double()
    y, x = np.mgrid[:48, :64] + 0.5
    for mask, score, map_, (x0, y0, x1, y1) in zip(masks, scores, full, boxes.tolist(), strict=True):
        away = (2 * (x - x0) / (x1 - x0) - 1) ** 2 + (2 * (y - y0) / (y1 - y0) - 1) ** 2
        own = map_ + ellipse * torch.from_numpy(1 - away)
        x0, y0, x1, y1 = (math.ceil(side - 0.5) for side in (x0, y0, x1, y1))
        inside = torch.zeros(48, 64, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        for rise in np.arange(0, 8.01, 0.25):
            expected = (own + rise > 0) & inside
            rows, columns = np.nonzero(expected.numpy())
            if len(rows) and (np.ptp(rows) + 1) * (np.ptp(columns) + 1) >= 0.9 * inside.sum():
                break
        assert torch.equal(mask, expected)
        if mask.any():
            assert score.item() == pytest.approx(map_.sigmoid()[expected].mean().item(), abs=1e-4)
    assert not masks[5].any()
    assert masks[:5].flatten(1).any(1).all()


def test_specks_and_small_holes_go():
    """Against scikit-image, on noise with parts and holes of all sizes, and on masks without any."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(6, 60, 70)), (0, 2, 2)) > 0.01
    noise[4], noise[5] = False, True
    for mask, found in zip(noise, without_specks(torch.from_numpy(noise)).numpy(), strict=True):
        expected, least = np.pad(mask, 1), SMALL * mask.sum()
        for part in measure.regionprops(measure.label(expected, connectivity=2)):
            expected[tuple(part.coords.T)] = part.area >= least
        for hole in measure.regionprops(measure.label(~expected, connectivity=1)):
            expected[tuple(hole.coords.T)] = hole.area < least and [0, 0] not in hole.coords.tolist()
        assert np.array_equal(found, expected[1:-1, 1:-1])
    dust = torch.zeros(1, 30, 30, dtype=torch.bool)
    dust[:, ::3, ::3] = True
    dust[0, 0, 1] = True
    assert without_specks(dust)[0].nonzero().tolist() == [[0, 0], [0, 1]]
