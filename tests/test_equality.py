"""Other implementations of Mask2Former with the same weights: Hugging Face's, and the original."""

import importlib.util

import pytest
import torch

import sim_m2f
from benchmarks import equality

TOLERANCE = 1e-4
HEADS = [
    *(
        "MODEL.SEM_SEG_HEAD.CONVS_DIM",
        64,
        "MODEL.SEM_SEG_HEAD.MASK_DIM",
        64,
        "MODEL.MASK_FORMER.HIDDEN_DIM",
        64,
    ),
    *("MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", 2, "MODEL.MASK_FORMER.DEC_LAYERS", 5),
    *("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 20, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7),
]
SMALL = {
    "ResNet": ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.RES2_OUT_CHANNELS", 32],
    "Swin": [
        *(
            "MODEL.BACKBONE.NAME",
            "D2SwinTransformer",
            "MODEL.SWIN.EMBED_DIM",
            24,
            "MODEL.SWIN.WINDOW_SIZE",
            4,
        ),
        *("MODEL.SWIN.DEPTHS", "[2, 2, 2, 2]", "MODEL.SWIN.NUM_HEADS", "[2, 2, 4, 4]"),
    ],
}
SIZES = [[(128, 160)], [(96, 64)], [(224, 180), (150, 192)]]
original = pytest.mark.skipif(
    importlib.util.find_spec("mask2former") is None or importlib.util.find_spec("detectron2") is None,
    reason="detectron2 and mask2former are not on the Python path",
)


def small_cfg(backbone: str) -> sim_m2f.config.CfgNode:
    cfg = sim_m2f.get_cfg()
    cfg.merge_from_list([*HEADS, *SMALL[backbone]])
    return cfg


def pair(backbone: str):
    pytest.importorskip("transformers")
    cfg = small_cfg(backbone)
    network = equality.random_network(cfg)
    return cfg, network, equality.transformers_model(network, cfg)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backbone", SMALL)
def test_every_layer_equals_that_of_transformers(backbone, sizes):
    """In float64, where no rounding moves a pixel across the threshold of the masked attention."""
    _, network, model = pair(backbone)
    network, model, images = network.double(), model.double(), equality.random_images(sizes).double()
    with equality.double_precision():
        layers = equality.output_differences(
            network, lambda x: equality.transformers_outputs(model, x), images
        )
    assert len(layers) == 5
    for layer in layers:
        for name in ("pred_logits", "pred_masks"):
            assert layer[name]["largest"] > 0.1
            assert layer[name]["difference"] < 1e-9 * max(1, layer[name]["largest"])


@pytest.mark.parametrize("backbone", SMALL)
def test_losses_and_gradients_equal_those_of_transformers(backbone):
    cfg, network, model = pair(backbone)
    images = equality.random_images([(128, 160), (128, 96)])
    with torch.no_grad():
        outputs = network(images)
    theirs = lambda layers, targets: equality.transformers_losses(model.criterion, layers, targets)  # noqa: E731
    differences = equality.loss_differences(cfg, theirs, outputs, images)
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


@pytest.mark.parametrize("network", equality.NETWORKS)
def test_full_size_networks_equal_those_of_transformers(network):
    pytest.importorskip("transformers")
    check(equality.compare(network, equality.SIZES[0], "transformers"))


@original
@pytest.mark.parametrize("sizes", equality.SIZES, ids=str)
@pytest.mark.parametrize("network", equality.NETWORKS)
def test_full_size_networks_equal_the_original(network, sizes):
    check(equality.compare(network, sizes, "the original"))
