"""Names of parameters in the original and in transformers: one to one, for every published network."""

import pytest
import torch
from conftest import ROOT
from other_networks import small_network

from sim_m2f.config import get_cfg
from sim_m2f.errors import UserError
from sim_m2f.modeling import build_model
from sim_m2f.weights.load import COMPUTED
from sim_m2f.weights.names import (
    detectron2_names,
    from_names,
    own_names,
    stored_transformers_name,
    to_names,
    transformers_names,
)
from sim_m2f.weights.transformers import cfg_from_transformers, transformers_config

ZOO = [
    *("sim_R50_bs16_50ep", "sim_R101_bs16_50ep", "sim_swin_tiny", "sim_swin_small", "sim_swin_base"),
    *("sim_swin_base_IN21k", "sim_swin_large_IN21k"),
]


def zoo(name):
    """(cfg, shapes by name) of a published network; no weight is allocated."""
    cfg = get_cfg()
    cfg.merge_from_file(ROOT / f"configs/coco/{name}.yaml")
    with torch.device("meta"):
        return cfg, build_model(cfg).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_namings_of_the_zoo_are_one_to_one(name):
    _, weights = zoo(name)
    for naming in (detectron2_names, transformers_names):
        theirs = [part for own in weights for part in naming(own)]
        assert len(theirs) == len(set(theirs))
        restored = from_names(to_names(weights, naming), weights, naming)
        assert {key: value.shape for key, value in restored.items()} == {
            key: value.shape for key, value in weights.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_transformers_has_exactly_these_names_and_shapes(name):
    library = pytest.importorskip("transformers")
    cfg, weights = zoo(name)
    config = library.Mask2FormerConfig.from_dict(transformers_config(cfg, [str(i) for i in range(80)]))
    with torch.device("meta"):
        theirs = library.Mask2FormerForUniversalSegmentation(config).state_dict()
    stored = {stored_transformers_name(key): value.shape for key, value in theirs.items()}
    ours = {key: value.shape for key, value in to_names(weights, transformers_names).items()}
    assert ours.items() <= stored.items()
    assert all(COMPUTED.search(key) for key in stored.keys() - ours.keys())


def test_pixels_of_transformers_images():
    """One number may stand for all channels; images that are not resized keep their size."""
    processor = {"image_mean": 0.5, "image_std": [0.1, 0.2, 0.4], "do_resize": False}
    sizes = {"size": {"shortest_edge": 800, "longest_edge": 1333}}
    cfg, _ = cfg_from_transformers({"model_type": "mask2former"}, {**processor, **sizes})
    assert cfg.MODEL.PIXEL_MEAN == [127.5] * 3
    assert cfg.MODEL.PIXEL_STD == [25.5, 51, 102]
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (0, 1333)


@pytest.mark.parametrize(
    ("backbone", "processor", "message"),
    [
        ({"model_type": "resnet", "depths": 5}, {}, "depths of backbone_config is a list of numbers, not 5"),
        ({"model_type": "resnet", "hidden_sizes": []}, {}, r"hidden_sizes of backbone_config .* not \[\]"),
        ({"model_type": "swin", "depths": 5}, {}, "MODEL.SWIN.DEPTHS takes a list"),
        ({}, {"image_mean": "half"}, "preprocessor_config.json: image_mean is a number"),
        ({}, {"image_std": [0.5, None, 0.5]}, "preprocessor_config.json: image_std is a number"),
    ],
)
def test_damaged_configurations_of_transformers_are_refused(backbone, processor, message):
    with pytest.raises(UserError, match=message):
        cfg_from_transformers({"model_type": "mask2former", "backbone_config": backbone}, processor)


@pytest.mark.parametrize("name", ["sim_R50_bs16_50ep", "sim_swin_large_IN21k"])
@pytest.mark.slow
def test_a_configuration_returns_from_transformers(name):
    cfg, _ = zoo(name)
    names = [f"thing {index}" for index in range(80)]
    returned, classes = cfg_from_transformers(transformers_config(cfg, names))
    assert classes == names
    assert returned.MODEL.MASK_FORMER == cfg.MODEL.MASK_FORMER
    assert returned.MODEL.SEM_SEG_HEAD == cfg.MODEL.SEM_SEG_HEAD
    kind = "SWIN" if "swin" in name else "RESNETS"
    assert returned.MODEL[kind] == cfg.MODEL[kind]


# Names as the published files of Mask2Former and of the Hugging Face Hub have them.
PUBLISHED = {
    "backbone.body.bn1.running_var": (
        ["backbone.stem.conv1.norm.running_var"],
        ["model.pixel_level_module.encoder.embedder.embedder.normalization.running_var"],
    ),
    "backbone.body.layer3.5.conv2.weight": (
        ["backbone.res4.5.conv2.weight"],
        ["model.pixel_level_module.encoder.encoder.stages.2.layers.5.layer.1.convolution.weight"],
    ),
    "backbone.body.layer1.0.downsample.1.bias": (
        ["backbone.res2.0.shortcut.norm.bias"],
        ["model.pixel_level_module.encoder.encoder.stages.0.layers.0.shortcut.normalization.bias"],
    ),
    "backbone.body.layers_1.downsample.reduction.weight": (
        ["backbone.layers.0.downsample.reduction.weight"],
        ["model.pixel_level_module.encoder.encoder.layers.0.downsample.reduction.weight"],
    ),
    "backbone.body.layers_2.blocks.4.attn.qkv.bias": (
        ["backbone.layers.2.blocks.4.attn.qkv.bias"],
        [
            f"model.pixel_level_module.encoder.encoder.layers.2.blocks.4.attention.self.{part}.bias"
            for part in ("query", "key", "value")
        ],
    ),
    "backbone.norm3.weight": (
        ["backbone.norm3.weight"],
        ["model.pixel_level_module.encoder.hidden_states_norms.stage4.weight"],
    ),
    "sem_seg_head.pixel_decoder.adapter_1.norm.weight": (
        ["sem_seg_head.pixel_decoder.adapter_1.norm.weight"],
        ["model.pixel_level_module.decoder.adapter_1.1.weight"],
    ),
    "sem_seg_head.predictor.query_feat.weight": (
        ["sem_seg_head.predictor.query_feat.weight"],
        ["model.transformer_module.queries_features.weight"],
    ),
    "sem_seg_head.predictor.class_embed.weight": (
        ["sem_seg_head.predictor.class_embed.weight"],
        ["class_predictor.weight"],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    original, hub = PUBLISHED[name]
    assert list(detectron2_names(name)) == original
    assert list(transformers_names(name)) == hub


@pytest.mark.parametrize("backbone", ["ResNet-50", "ResNet-18", "Swin"])
@pytest.mark.parametrize("naming", [own_names, detectron2_names, transformers_names])
def test_weights_return_bit_for_bit(backbone, naming):
    weights = small_network(backbone)[1].state_dict()
    restored = from_names(to_names(weights, naming), weights, naming)
    assert restored.keys() == weights.keys()
    assert all(torch.equal(restored[name], weights[name]) for name in weights)
