"""Hugging Face's Mask2FormerForUniversalSegmentation: its configuration and its folder, both ways.

Nothing here needs the package `transformers`; a folder written here loads in its versions 4 and 5. What is
the same in every network, or in both configurations, is in ``transformers.yaml`` beside this file.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from sim_m2f.config import CfgNode, get_cfg, value_of
from sim_m2f.config.defaults import read_yaml
from sim_m2f.errors import UserError, is_line
from sim_m2f.files import write_file
from sim_m2f.weights.names import to_names, transformers_names
from sim_m2f.weights.swin import relative_position_indices

_KEYS = read_yaml(Path(__file__).with_suffix(".yaml"))
UNNAMED = {0: "LABEL_0", 1: "LABEL_1"}  # transformers' default of id2label, which it does not write


def _theirs(cfg: CfgNode, kind: str = "") -> dict[str, Any]:
    """Their keys that are constant or the same as ours; ``kind`` is "", "SWIN_" or "RESNET_"."""
    same = {theirs: value_of(cfg, ours) for theirs, ours in _KEYS[f"{kind}SAME"].items()}
    return {**_KEYS[f"{kind}CONSTANT"], **same}


def _ours(config: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """Our keys of those that are the same in a configuration of theirs."""
    return {ours: config[theirs] for theirs, ours in _KEYS[f"{kind}SAME"].items() if theirs in config}


def transformers_config(cfg: CfgNode, class_names: Sequence[str]) -> dict[str, Any]:
    """The contents of ``config.json`` for the network of ``cfg``.

    Raises:
        UserError: transformers has no such network, or the names are not NUM_CLASSES many.
    """
    backbone, classes = _backbone_config(cfg), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for key, only in _KEYS["ONLY"].items():
        if value_of(cfg, key) != (value_of(cfg, only) if isinstance(only, str) else only):
            raise UserError(f"{key}: in transformers it is {only}; export to safetensors or onnx")
    if len(class_names) != classes:
        raise UserError(f"{len(class_names)} class names for MODEL.SEM_SEG_HEAD.NUM_CLASSES {classes}")
    return {
        **_theirs(cfg),
        "backbone_config": backbone,
        "use_auxiliary_loss": cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION,
        "id2label": {str(index): name for index, name in enumerate(class_names)},
        "label2id": {name: index for index, name in enumerate(class_names)},
    }


def _backbone_config(cfg: CfgNode) -> dict[str, Any]:
    name, resnet = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    if name == "D2SwinTransformer":
        return _theirs(cfg, "SWIN_")
    blocks = _KEYS["RESNET_BLOCKS"]
    if name != "build_resnet_backbone" or resnet.NORM == "GN" or resnet.DEPTH not in blocks:
        wanted = f"MODEL.BACKBONE.NAME {name} (MODEL.RESNETS.DEPTH {resnet.DEPTH}, NORM {resnet.NORM})"
        known = f"Swin, and ResNets of {', '.join(map(str, blocks))} layers with batch norm"
        raise UserError(f"{wanted}: transformers has {known}; export to safetensors or onnx")
    return {
        **_theirs(cfg, "RESNET_"),
        "hidden_sizes": [resnet.RES2_OUT_CHANNELS * 2**stage for stage in range(4)],
        "depths": blocks[resnet.DEPTH],
        "layer_type": "basic" if resnet.DEPTH < 50 else "bottleneck",
    }


def image_processor_config(cfg: CfgNode) -> dict[str, Any]:
    """The contents of ``preprocessor_config.json``: sizes and pixel statistics of this configuration."""
    return {
        **_KEYS["PROCESSOR_CONSTANT"],
        "do_resize": cfg.INPUT.MIN_SIZE_TEST > 0,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "size_divisor": cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY,
        "image_mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN],
        "image_std": [value / 255 for value in cfg.MODEL.PIXEL_STD],
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
    kind = config.get("model_type")
    if kind != "mask2former":
        raise UserError(f"a configuration of {kind!r}, not of Mask2Former ('mask2former')")
    try:
        labels = {int(index): name for index, name in (_mapping(config, "id2label") or UNNAMED).items()}
    except ValueError as error:
        raise UserError(f"config.json: id2label has a number for each class ({error}); correct it") from error
    keys = _ours(config) | _backbone_keys(_mapping(config, "backbone_config")) | _pixel_keys(processor or {})
    if not all(map(is_line, labels.values())):
        raise UserError("config.json: id2label has a text of one line for each class; correct it")
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


def _backbone_keys(backbone: Mapping[str, Any]) -> dict[str, Any]:
    kind = backbone.get("model_type", "swin")
    if kind == "swin":
        return {"MODEL.BACKBONE.NAME": "D2SwinTransformer", **_ours(backbone, "SWIN_")}
    depths = _list(backbone, "depths", _KEYS["RESNET_BLOCKS"][50])
    theirs = depths, backbone.get("layer_type") == "basic"
    for depth, blocks in _KEYS["RESNET_BLOCKS"].items():
        if kind == "resnet" and theirs == (blocks, depth < 50):
            return {
                **_ours(backbone, "RESNET_"),
                "MODEL.BACKBONE.NAME": "build_resnet_backbone",
                "MODEL.RESNETS.DEPTH": depth,
                "MODEL.RESNETS.RES2_OUT_CHANNELS": _list(backbone, "hidden_sizes", [256])[0],
            }
    raise UserError(f"transformers' backbone {kind!r} {backbone.get('depths', '')} does not exist here")


def _list(backbone: Mapping[str, Any], key: str, default: list[int]) -> list[Any]:
    value = backbone.get(key, default)
    if not isinstance(value, list) or not value:
        fault = f"{key} of backbone_config is a list of numbers, not {value!r}"
        raise UserError(f"config.json: {fault}; take transformers' own file")
    return value


def _pixel_keys(processor: Mapping[str, Any]) -> dict[str, Any]:
    size = processor.get("size")
    theirs = dict(size) if isinstance(size, Mapping) else {}  # older ones have a number
    if processor.get("do_resize") is False:
        theirs["shortest_edge"] = 0
    for name in ("image_mean", "image_std"):
        theirs[name] = _scaled(processor, name)
    return _ours({name: value for name, value in theirs.items() if value is not None}, "PROCESSOR_")


def _scaled(processor: Mapping[str, Any], key: str) -> list[float] | None:
    """Statistics of pixels of 0 to 255, one for each channel; None where the file leaves them out."""
    value = processor.get(key) or []
    values = value if isinstance(value, list) else [value] * 3
    if not all(type(number) in (int, float) for number in values):
        fault = f"{key} is a number, or one for each channel, not {value!r}"
        raise UserError(f"preprocessor_config.json: {fault}; take transformers' own file")
    return [round(number * 255, 6) for number in values] or None


def transformers_weights(weights: Mapping[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """Our weights as the files of transformers hold them, with the buffers that it expects."""
    variances = [name for name in weights if name.endswith(".running_var")]
    counts = {name.replace("running_var", "num_batches_tracked"): torch.tensor(0) for name in variances}
    expected = {**counts, **weights, **relative_position_indices(weights, cfg)}
    return {**to_names(expected, transformers_names), "criterion.empty_weight": class_weights(cfg)}


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
    config, processor = transformers_config(cfg, class_names), image_processor_config(cfg)
    renamed = {name: weight.contiguous() for name, weight in transformers_weights(weights, cfg).items()}
    write_file(folder / "config.json", json.dumps(config, indent=2))
    write_file(folder / "preprocessor_config.json", json.dumps(processor, indent=2))
    write_file(folder / "model.safetensors", save(renamed, metadata={"format": "pt"}))
