"""Hugging Face's Mask2FormerForUniversalSegmentation: its configuration and its folder, both ways.

Nothing here needs the package `transformers`; a folder written here loads in its versions 4 and 5.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sim_m2f.config import CfgNode, get_cfg, value_of
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write
from sim_m2f.weights.names import to_names, transformers_names
from sim_m2f.weights.swin import relative_position_indices

LEVELS = ["res3", "res4", "res5"]
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET_DEPTHS = {18: [2, 2, 2, 2], 34: [3, 4, 6, 3], 50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
ENCODER = "model.pixel_level_module.encoder."

# Keys whose values are the same in both configurations.
SAME = {
    "feature_size": "MODEL.SEM_SEG_HEAD.CONVS_DIM",
    "mask_feature_size": "MODEL.SEM_SEG_HEAD.MASK_DIM",
    "encoder_layers": "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS",
    "encoder_feedforward_dim": "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD",
    "common_stride": "MODEL.SEM_SEG_HEAD.COMMON_STRIDE",
    "num_attention_heads": "MODEL.MASK_FORMER.NHEADS",
    "decoder_layers": "MODEL.MASK_FORMER.DEC_LAYERS",
    "enforce_input_projection": "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ",
    "num_queries": "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
    **{
        name: f"MODEL.MASK_FORMER.{name.upper()}"
        for name in (
            *("hidden_dim", "dim_feedforward", "pre_norm", "dropout"),
            *("no_object_weight", "class_weight", "mask_weight", "dice_weight"),
            *("train_num_points", "oversample_ratio", "importance_sample_ratio"),
        )
    },
}
SWIN_SAME = {
    "image_size": "MODEL.SWIN.PRETRAIN_IMG_SIZE",
    **{
        name: f"MODEL.SWIN.{name.upper()}"
        for name in (
            *("patch_size", "embed_dim", "depths", "num_heads"),
            *("window_size", "mlp_ratio", "drop_path_rate"),
        )
    },
}


def transformers_config(cfg: CfgNode, class_names: Sequence[str]) -> dict[str, Any]:
    """The contents of ``config.json`` for the network of ``cfg``.

    Raises:
        UserError: transformers has no such network, or the names are not NUM_CLASSES many.
    """
    former, head = cfg.MODEL.MASK_FORMER, cfg.MODEL.SEM_SEG_HEAD
    backbone = _backbone_config(cfg)
    if former.NHEADS != head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS:
        raise UserError(
            "transformers has one number of heads; MODEL.MASK_FORMER.NHEADS and the encoder's differ"
        )
    if list(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES) != LEVELS:
        raise UserError(
            f"transformers' encoder has the levels {', '.join(LEVELS)}; "
            "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES differs"
        )
    if head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS != 4:
        raise UserError("transformers has 4 points per head; DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS differs")
    if len(class_names) != head.NUM_CLASSES:
        raise UserError(
            f"{len(class_names)} class names for MODEL.SEM_SEG_HEAD.NUM_CLASSES {head.NUM_CLASSES}"
        )
    return {
        "architectures": ["Mask2FormerForUniversalSegmentation"],
        "model_type": "mask2former",
        "activation_function": "relu",
        "backbone_config": backbone,
        **{theirs: value_of(cfg, ours) for theirs, ours in SAME.items()},
        "feature_strides": [4, 8, 16, 32],
        "ignore_value": 255,
        "init_std": 0.02,
        "init_xavier_std": 1.0,
        "use_auxiliary_loss": former.DEEP_SUPERVISION,
        "output_auxiliary_logits": None,
        "id2label": {str(index): name for index, name in enumerate(class_names)},
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


def _backbone_config(cfg: CfgNode) -> dict[str, Any]:
    name, resnet = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    if name == "D2SwinTransformer":
        same = {theirs: value_of(cfg, ours) for theirs, ours in SWIN_SAME.items()}
        return {"model_type": "swin", **same, "hidden_act": "gelu", "qkv_bias": True, "out_features": STAGES}
    if name != "build_resnet_backbone" or resnet.NORM == "GN":
        raise UserError(
            f"transformers' Mask2Former has ResNet with batch norm and Swin, not {name} with {resnet.NORM}; "
            "export to safetensors or onnx"
        )
    if resnet.DEPTH not in RESNET_DEPTHS:
        raise UserError(
            f"MODEL.RESNETS.DEPTH {resnet.DEPTH}: exported to transformers are the depths "
            f"{', '.join(map(str, RESNET_DEPTHS))}; export to safetensors or onnx"
        )
    return {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": [resnet.RES2_OUT_CHANNELS * 2**stage for stage in range(4)],
        "depths": RESNET_DEPTHS[resnet.DEPTH],
        "layer_type": "basic" if resnet.DEPTH < 50 else "bottleneck",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": resnet.STRIDE_IN_1X1,
        "out_features": STAGES,
    }


def image_processor_config(cfg: CfgNode) -> dict[str, Any]:
    """The contents of ``preprocessor_config.json``: sizes and pixel statistics of this configuration."""
    return {
        "image_processor_type": "Mask2FormerImageProcessor",
        "do_resize": cfg.INPUT.MIN_SIZE_TEST > 0,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "size_divisor": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [value / 255 for value in cfg.MODEL.PIXEL_STD],
        "ignore_index": 255,
        "do_reduce_labels": False,
        "num_labels": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    }


def cfg_from_transformers(
    config: Mapping[str, Any], processor: Mapping[str, Any] | None = None
) -> tuple[CfgNode, list[str]]:
    """Our configuration and the class names for ``config.json`` (and ``preprocessor_config.json``).

    Keys that the file leaves out have transformers' defaults, which are those of Mask2Former.

    Raises:
        UserError: it is the configuration of another kind of network.
    """
    if config.get("model_type") != "mask2former":
        raise UserError(
            f"a configuration of {config.get('model_type')!r}, not of Mask2Former ('mask2former')"
        )
    labels = _labels(_mapping(config, "id2label"))
    keys = {ours: config[theirs] for theirs, ours in SAME.items() if theirs in config}
    keys |= _backbone_keys(_mapping(config, "backbone_config")) | _pixel_keys(processor or {})
    if labels:
        keys["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = len(labels)
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    cfg.MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS = cfg.MODEL.MASK_FORMER.NHEADS
    return cfg, [labels[index] for index in sorted(labels)]


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json: {key} is an object, not {value!r}; take transformers' own file")
    return value


def _labels(names: Mapping[str, Any]) -> dict[int, str]:
    try:
        return {int(index): name for index, name in names.items()}
    except ValueError as error:
        raise UserError(f"config.json: id2label has a number for each class ({error}); correct it") from error


def _backbone_keys(backbone: Mapping[str, Any]) -> dict[str, Any]:
    kind = backbone.get("model_type", "swin")
    if kind == "swin":
        same = {ours: backbone[theirs] for theirs, ours in SWIN_SAME.items() if theirs in backbone}
        return {"MODEL.BACKBONE.NAME": "D2SwinTransformer", **same}
    depth = [
        depth
        for depth, blocks in RESNET_DEPTHS.items()
        if kind == "resnet"
        and list(backbone.get("depths", RESNET_DEPTHS[50])) == blocks
        and (depth < 50) == (backbone.get("layer_type") == "basic")
    ]
    if not depth:
        raise UserError(f"transformers' backbone {kind!r} {backbone.get('depths', '')} does not exist here")
    return {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.RESNETS.DEPTH": depth[0],
        "MODEL.RESNETS.RES2_OUT_CHANNELS": backbone.get("hidden_sizes", [256])[0],
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone.get("downsample_in_bottleneck", False),
    }


def _pixel_keys(processor: Mapping[str, Any]) -> dict[str, Any]:
    size = processor.get("size")
    size = size if isinstance(size, Mapping) else {}
    keys = {
        "INPUT.MIN_SIZE_TEST": size.get("shortest_edge"),
        "INPUT.MAX_SIZE_TEST": size.get("longest_edge"),
        "MODEL.PIXEL_MEAN": [round(value * 255, 6) for value in processor.get("image_mean") or []] or None,
        "MODEL.PIXEL_STD": [round(value * 255, 6) for value in processor.get("image_std") or []] or None,
    }
    return {key: value for key, value in keys.items() if value is not None}


def transformers_weights(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Our weights as the files of transformers hold them, with the buffers that it expects."""
    renamed = to_names(weights, transformers_names)
    for name, index in relative_position_indices(weights, cfg).items():
        prefix = transformers_names(f"{name}.relative_position_bias_table")[0].rpartition(".")[0]
        renamed[f"{prefix}.relative_position_index"] = index
    for name in list(renamed):
        if name.startswith(ENCODER) and name.endswith(".running_var"):
            renamed.setdefault(name.replace("running_var", "num_batches_tracked"), torch.tensor(0))
    renamed["criterion.empty_weight"] = class_weights(cfg)
    return renamed


def class_weights(cfg: CfgNode) -> Tensor:
    """(C+1,): the criterion's weight of every class, which the original keeps as a buffer."""
    weights = torch.ones(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES + 1)
    weights[-1] = cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT
    return weights


def write_transformers(
    folder: Path, weights: Mapping[str, Tensor], cfg: CfgNode, class_names: Sequence[str]
) -> None:
    """Write ``config.json``, ``preprocessor_config.json`` and ``model.safetensors`` into a folder.

    Raises:
        UserError: transformers has no such network, or the folder cannot be written to.
    """
    contents = {
        "config.json": transformers_config(cfg, class_names),
        "preprocessor_config.json": image_processor_config(cfg),
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as file:
            json.dump(content, file, indent=2)
    renamed = {name: weight.contiguous() for name, weight in transformers_weights(weights, cfg).items()}
    with atomic_write(folder / "model.safetensors", "wb") as file:
        file.write(save(renamed, metadata={"format": "pt"}))
