"""Mask2Former's own configurations: they load unchanged, and build networks of the original's size."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import sim_m2f
from sim_m2f.commands.train import configuration
from sim_m2f.config import without_effect
from sim_m2f.errors import UserError

SWIN = {"PATCH_NORM": True, "APE": False, "DROP_PATH_RATE": 0.3}
WINDOW_12 = {"WINDOW_SIZE": 12, "PRETRAIN_IMG_SIZE": 384}
RESNET = {
    "DEPTH": 50,
    "STEM_TYPE": "basic",
    "STEM_OUT_CHANNELS": 64,
    "STRIDE_IN_1X1": False,
    "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "RES5_MULTI_GRID": [1, 1, 1],
}
# The keys that the original's files for instance segmentation set, and the values that its paper gives.
ORIGINAL = {
    "MODEL": {
        "META_ARCHITECTURE": "MaskFormer",
        "WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
        "BACKBONE": {"FREEZE_AT": 0, "NAME": "build_resnet_backbone"},
        "PIXEL_MEAN": [123.675, 116.28, 103.53],
        "PIXEL_STD": [58.395, 57.12, 57.375],
        "RESNETS": RESNET,
        "SEM_SEG_HEAD": {
            "NAME": "MaskFormerHead",
            "IGNORE_VALUE": 255,
            "NUM_CLASSES": 80,
            "LOSS_WEIGHT": 1.0,
            "CONVS_DIM": 256,
            "MASK_DIM": 256,
            "NORM": "GN",
            "PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
            "IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
            "COMMON_STRIDE": 4,
            "TRANSFORMER_ENC_LAYERS": 6,
        },
        "MASK_FORMER": {
            "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
            "TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
            "DEEP_SUPERVISION": True,
            "NO_OBJECT_WEIGHT": 0.1,
            "CLASS_WEIGHT": 2.0,
            "MASK_WEIGHT": 5.0,
            "DICE_WEIGHT": 5.0,
            "HIDDEN_DIM": 256,
            "NUM_OBJECT_QUERIES": 100,
            "NHEADS": 8,
            "DROPOUT": 0.0,
            "DIM_FEEDFORWARD": 2048,
            "ENC_LAYERS": 0,
            "PRE_NORM": False,
            "ENFORCE_INPUT_PROJ": False,
            "SIZE_DIVISIBILITY": 32,
            "DEC_LAYERS": 10,
            "TRAIN_NUM_POINTS": 12544,
            "OVERSAMPLE_RATIO": 3.0,
            "IMPORTANCE_SAMPLE_RATIO": 0.75,
            "TEST": {
                "SEMANTIC_ON": False,
                "INSTANCE_ON": True,
                "PANOPTIC_ON": False,
                "OVERLAP_THRESHOLD": 0.8,
                "OBJECT_MASK_THRESHOLD": 0.8,
            },
        },
    },
    "DATASETS": {"TRAIN": '("coco_2017_train",)', "TEST": '("coco_2017_val",)'},
    "SOLVER": {
        "IMS_PER_BATCH": 16,
        "BASE_LR": 0.0001,
        "STEPS": "(327778, 355092)",
        "MAX_ITER": 368750,
        "WARMUP_FACTOR": 1.0,
        "WARMUP_ITERS": 10,
        "WEIGHT_DECAY": 0.05,
        "OPTIMIZER": "ADAMW",
        "BACKBONE_MULTIPLIER": 0.1,
        "CLIP_GRADIENTS": {
            "ENABLED": True,
            "CLIP_TYPE": "full_model",
            "CLIP_VALUE": 0.01,
            "NORM_TYPE": 2.0,
        },
        "AMP": {"ENABLED": True},
    },
    "INPUT": {
        "IMAGE_SIZE": 1024,
        "MIN_SCALE": 0.1,
        "MAX_SCALE": 2.0,
        "FORMAT": "RGB",
        "DATASET_MAPPER_NAME": "coco_instance_lsj",
    },
    "TEST": {"EVAL_PERIOD": 5000},
    "DATALOADER": {"FILTER_EMPTY_ANNOTATIONS": True, "NUM_WORKERS": 4},
    "VERSION": 2,
}
# Keys that each network changes, its number of parameters (frozen batch norms have none), and ours for COCO.
NETWORKS = {
    "R50": ({}, 43_970_257, "sim_R50_bs16_50ep"),
    "R101": ({"RESNETS": {**RESNET, "DEPTH": 101}}, 62_910_161, "sim_R101_bs16_50ep"),
    "swin_tiny": (
        {"SWIN": {"EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24], **SWIN}},
        47_421_643,
        "sim_swin_tiny",
    ),
    "swin_small": (
        {"SWIN": {"EMBED_DIM": 96, "DEPTHS": [2, 2, 18, 2], "NUM_HEADS": [3, 6, 12, 24], **SWIN}},
        68_739_547,
        "sim_swin_small",
    ),
    "swin_base": (
        {
            "SWIN": {
                "EMBED_DIM": 128,
                "DEPTHS": [2, 2, 18, 2],
                "NUM_HEADS": [4, 8, 16, 32],
                **SWIN,
                **WINDOW_12,
            }
        },
        106_904_201,
        "sim_swin_base",
    ),
    "swin_large_IN21k": (
        {
            "SWIN": {
                "EMBED_DIM": 192,
                "DEPTHS": [2, 2, 18, 2],
                "NUM_HEADS": [6, 12, 24, 48],
                **SWIN,
                **WINDOW_12,
            },
            "MASK_FORMER": {"NUM_OBJECT_QUERIES": 200},
        },
        215_521_989,
        "sim_swin_large_IN21k",
    ),
}


def written(folder: Path, network: str) -> Path:
    """A configuration with the original's keys, in the original's way: one file based on another."""
    model = dict(NETWORKS[network][0])
    if "SWIN" in model:
        model["BACKBONE"] = {"NAME": "D2SwinTransformer"}
        model["WEIGHTS"] = "swin.pkl"
    (folder / "base.yaml").write_text(yaml.safe_dump(ORIGINAL))
    (folder / "swin").mkdir()
    (folder / "swin" / "network.yaml").write_text(yaml.safe_dump({"_BASE_": "../base.yaml", "MODEL": model}))
    return folder / "swin" / "network.yaml"


def parameters(cfg) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in sim_m2f.build_model(cfg).parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.slow
def test_the_originals_keys_build_the_originals_network(tmp_path, capsys, network):
    cfg = configuration(str(written(tmp_path, network)), [])
    assert cfg.MODEL.SIM.SUPERVISION == "mask"
    assert without_effect(cfg) == []
    assert capsys.readouterr().err == ""
    assert parameters(cfg) == NETWORKS[network][1]
    assert (
        configuration(str(tmp_path / "base.yaml"), ["MODEL.SIM.SUPERVISION", "box"]).MODEL.SIM.SUPERVISION
        == "box"
    )


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.slow
def test_our_configuration_of_a_network_has_its_size(network):
    _, number, name = NETWORKS[network]
    cfg = configuration(str(ROOT / f"configs/coco/{name}.yaml"), [])
    assert cfg.MODEL.SIM.SUPERVISION == "box"
    assert parameters(cfg) == number
    assert (737_500 if "large" in name else 368_750) == cfg.SOLVER.MAX_ITER


@pytest.mark.parametrize("network", NETWORKS)
def test_transformers_builds_a_network_of_the_same_size(network):
    transformers = pytest.importorskip("transformers")
    keys = NETWORKS[network][0]
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if "SWIN" in keys:
        swin = {key.lower(): keys["SWIN"][key] for key in ("EMBED_DIM", "DEPTHS", "NUM_HEADS")}
        window = keys["SWIN"].get("WINDOW_SIZE", 7)
        backbone = transformers.SwinConfig(**swin, window_size=window, out_features=stages)
    else:
        blocks = 23 if network == "R101" else 6
        backbone = transformers.ResNetConfig(depths=[3, 4, blocks, 3], out_features=stages)
    queries = keys.get("MASK_FORMER", {}).get("NUM_OBJECT_QUERIES", 100)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, num_queries=queries, num_labels=80)
    with torch.device("meta"):
        model = transformers.Mask2FormerForUniversalSegmentation(config)
    unused = ("encoder.layernorm.", "encoder.swin.layernorm.")  # behind Swin's last stage; nothing reads it
    encoder = "model.pixel_level_module."
    frozen = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    counted = sum(
        value.numel()
        for name, value in model.named_parameters()
        if not name.removeprefix(encoder).startswith(unused)
    )
    assert (
        counted - sum(value.numel() for module in frozen for value in module.parameters())
        == NETWORKS[network][1]
    )


@pytest.mark.parametrize(
    "name", ["boxinst_R50", "boxinst_R101", "mask_R50", "mask_R101", "sim_R50", "sim_R101"]
)
def test_the_rows_of_the_papers_table(name):
    cfg = configuration(str(ROOT / f"configs/coco/{name}_bs16_50ep.yaml"), [])
    method, backbone = name.split("_")
    sim = cfg.MODEL.SIM
    assert int(backbone[1:]) == cfg.MODEL.RESNETS.DEPTH
    assert ("mask" if method == "mask" else "box") == sim.SUPERVISION
    whole_method = (sim.TEACHER, sim.PSEUDO_SEMANTIC, sim.SELF_CORRECTION, sim.COPY_PASTE)
    assert all((method == "sim") == term.ENABLED for term in whole_method)


def test_keys_without_effect_are_named_once_in_one_line(capsys):
    asked = {
        "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": "True",
        "INPUT.COLOR_AUG_SSD": "True",
        "INPUT.DATASET_MAPPER_NAME": "mask_former_instance",
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "value",
    }
    configuration("", [word for pair in asked.items() for word in pair])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert all(key in lines[0] for key in asked)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("MODEL.SWIN.APE", "True"), ("MODEL.SWIN.PATCH_NORM", "False")],
        *[("MODEL.RESNETS.STEM_TYPE", "deeplab"), ("MODEL.RESNETS.OUT_FEATURES", "['res4']")],
        *[("MODEL.SWIN.OUT_FEATURES", "['res5']"), ("MODEL.SEM_SEG_HEAD.NORM", "")],
        *[("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "8"), ("INPUT.FORMAT", "BGR")],
    ],
)
def test_a_network_that_does_not_exist_here_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}.*the only choice"):
        sim_m2f.build_model(configuration("", [key, value]))


@pytest.mark.parametrize(("in_1x1", "strides"), [(False, (1, 2)), (True, (2, 1))])
def test_the_stride_of_a_stage_may_be_in_its_first_convolution(in_1x1, strides):
    cfg = configuration("", ["MODEL.RESNETS.STRIDE_IN_1X1", str(in_1x1)])
    with torch.device("meta"):
        body = sim_m2f.build_model(cfg).backbone.body
    first = body.layer3[0]
    assert (first.conv1.stride[0], first.conv2.stride[0]) == strides
    assert (body.layer3[1].conv1.stride[0], body.layer3[1].conv2.stride[0]) == (1, 1)


def original_files() -> list[Path]:
    repository = Path(os.environ.get("MASK2FORMER_REPO", "/nonexistent"))
    return sorted(repository.glob("configs/coco/instance-segmentation/**/*.yaml"))


@pytest.mark.skipif(not original_files(), reason="MASK2FORMER_REPO names no clone of the original")
@pytest.mark.parametrize("file", original_files(), ids=lambda file: file.stem)
def test_the_originals_files_load_and_build(file):
    cfg = configuration(str(file), [])
    assert cfg.MODEL.SIM.SUPERVISION == "mask"
    assert without_effect(cfg) == []
    kind = next((name for name in ("tiny", "small", "base", "large") if f"swin_{name}" in file.stem), None)
    network = {"large": "swin_large_IN21k", None: "R101" if "R101" in file.stem else "R50"}.get(
        kind, f"swin_{kind}"
    )
    assert parameters(cfg) == NETWORKS[network][1]
