"""Other implementations of Mask2Former with the same weights: Hugging Face's, and the original."""

from functools import partial

import pytest
import torch
from conftest import SMALL_FILE
from torch.nn import functional

import sim_m2f
from benchmarks import equality

TOLERANCE = 1e-4
HEAD = [
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2, "MODEL.MASK_FORMER.DEC_LAYERS", 5),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7),
]
BACKBONES = {
    "ResNet": ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.RES2_OUT_CHANNELS", 32],
    "Swin": [
        *("MODEL.BACKBONE.NAME", "D2SwinTransformer", "MODEL.SWIN.EMBED_DIM", 24),
        *("MODEL.SWIN.WINDOW_SIZE", 4, "MODEL.SWIN.DEPTHS", "[2, 2, 2, 2]"),
        *("MODEL.SWIN.NUM_HEADS", "[2, 2, 4, 4]"),
    ],
}
SIZES = [[(128, 160)], [(96, 64)], [(224, 180), (150, 192)]]


def small_cfg(backbone: str) -> sim_m2f.config.CfgNode:
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_file(SMALL_FILE)
    cfg.merge_from_list([*HEAD, *BACKBONES[backbone]])
    return cfg


def pair(backbone: str):
    pytest.importorskip("transformers")
    cfg = small_cfg(backbone)
    network = equality.random_network(cfg)
    return cfg, network, equality.transformers_model(network, cfg)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.slow
def test_every_layer_equals_that_of_transformers(backbone, sizes):
    """In float64, where no rounding moves a pixel across the threshold of the masked attention."""
    _, network, model = pair(backbone)
    network, model, images = network.double(), model.double(), equality.random_images(sizes).double()
    with equality.double_precision(), torch.no_grad():
        own, other = network(images), equality.transformers_outputs(model, images)
    layers = equality.output_differences(equality.as_layers(own), equality.as_layers(other))
    assert len(layers) == 5
    for layer in layers:
        for name in ("pred_logits", "pred_masks"):
            assert layer[name]["largest"] > 0.1
            assert layer[name]["difference"] < 1e-9 * max(1, layer[name]["largest"])


def random_outputs(layers: int, batch: int, cfg: sim_m2f.config.CfgNode) -> dict:
    """Outputs of no network: normal class logits, mask logits with some shape."""
    queries, classes = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    each = [
        {
            "pred_logits": torch.randn(batch, queries, classes + 1),
            "pred_masks": 4
            * functional.interpolate(torch.randn(batch, queries, 4, 5), (32, 40), mode="bicubic"),
        }
        for _ in range(layers)
    ]
    return {**each[-1], "aux_outputs": each[:-1]}


def transformers_criterion(cfg: sim_m2f.config.CfgNode):
    transformers = pytest.importorskip("transformers")
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    config = transformers.Mask2FormerConfig(num_labels=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    return Mask2FormerLoss(config, weights), equality.transformers_losses


def original_criterion(cfg: sim_m2f.config.CfgNode):
    pytest.importorskip("detectron2")
    mask2former = pytest.importorskip("mask2former.modeling.criterion")
    from mask2former.modeling.matcher import HungarianMatcher

    weights = {"loss_ce": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    every = weights | {f"{name}_{layer}": value for name, value in weights.items() for layer in range(9)}
    points = cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS
    matcher = HungarianMatcher(2.0, 5.0, 5.0, points)
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    criterion = mask2former.SetCriterion(classes, matcher, every, 0.1, ["labels", "masks"], points, 3.0, 0.75)
    return criterion, equality.original_losses


@pytest.mark.parametrize("build", [transformers_criterion, original_criterion])
def test_assignment_losses_and_gradients_of_mask_supervision(build):
    """Gradients are equal for every query after every layer only if the assignments are."""
    cfg = small_cfg("ResNet")
    criterion, losses = build(cfg)
    theirs = partial(losses, criterion)
    differences = equality.loss_differences(
        cfg, theirs, random_outputs(4, 2, cfg), equality.random_images([(128, 160)] * 2)
    )
    assert differences["loss"] < TOLERANCE
    assert differences["gradient"] < TOLERANCE


def check(row: dict) -> None:
    for layer in row["layers"]:
        assert layer["pred_logits"]["difference"] < TOLERANCE
        assert layer["pred_masks"]["difference"] < TOLERANCE * max(1, layer["pred_masks"]["largest"])
    assert row["instances"]["scores"] < TOLERANCE
    assert row["instances"]["labels"] == 0
    assert row["instances"]["pixels"] < TOLERANCE
    assert max(row["losses"].values()) < TOLERANCE
    assert row["attention"]["different"] < 1e-3 * row["attention"]["pixels"]


@pytest.mark.parametrize("sizes", equality.SIZES, ids=str)
@pytest.mark.parametrize("network", equality.NETWORKS)
@pytest.mark.slow
def test_full_size_networks_equal_those_of_transformers(network, sizes):
    """In float32, attending to the same pixels; a rounding at the threshold may move one in a thousand."""
    pytest.importorskip("transformers")
    check(equality.compare(network, sizes, "transformers"))
