"""Parameter names of other implementations. Each naming maps one of our names to theirs, one to one.

Where another implementation keeps queries, keys and values apart, one of our names has three of theirs, whose
tensors follow each other along the first dimension in ours. The way back needs the names of our network only.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Naming = Callable[[str], tuple[str, ...]]
Rules = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

BODY = "backbone.body."  # what timm calls by its own names
_PARTS = re.compile(r"\[(\S+?)\]")

RESNET_TO_DETECTRON2: Rules = (
    (r"^body\.conv1\.", "stem.conv1."),
    (r"^body\.bn1\.", "stem.conv1.norm."),
    (r"^body\.layer(\d)\.", lambda match: f"res{int(match[1]) + 1}."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)
# timm's patch merging opens a stage, everybody else's closes the one before.
SWIN_TO_DETECTRON2: Rules = (
    (r"^body\.patch_embed\.", "patch_embed."),
    (r"^body\.layers_(\d+)\.downsample\.", lambda match: f"layers.{int(match[1]) - 1}.downsample."),
    (r"^body\.layers_(\d+)\.", r"layers.\1."),
)
RESNET_TO_TRANSFORMERS: Rules = (
    (r"^body\.conv1\.", "embedder.embedder.convolution."),
    (r"^body\.bn1\.", "embedder.embedder.normalization."),
    (r"^body\.layer(\d)\.(\d+)\.", lambda match: f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}."),
    (r"\.conv(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda match: f".layer.{int(match[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)
SWIN_TO_TRANSFORMERS: Rules = (
    (r"^body\.patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^body\.patch_embed\.norm\.", "embeddings.norm."),
    (r"^norm(\d)\.", lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}."),
    (r"^body\.layers_(\d+)\.downsample\.", lambda match: f"encoder.layers.{int(match[1]) - 1}.downsample."),
    (r"^body\.layers_(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.self.[query|key|value]."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
PIXEL_DECODER_TO_TRANSFORMERS: Rules = (
    (r"^input_proj\.", "input_projections."),
    (r"^transformer\.", ""),
    (r"^(adapter|layer)_1\.norm\.", r"\1_1.1."),
    (r"^(adapter|layer)_1\.weight", r"\1_1.0.weight"),
    (r"^mask_features\.", "mask_projection."),
    (r"\.linear(\d)\.", r".fc\1."),
    (r"\.norm1\.", ".self_attn_layer_norm."),
    (r"\.norm2\.", ".final_layer_norm."),
)
MASK_DECODER_TO_TRANSFORMERS: Rules = (
    (r"^transformer_self_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.self_attn_layer_norm."),
    (r"^transformer_cross_attention_layers\.(\d+)\.norm\.", r"decoder.layers.\1.cross_attn_layer_norm."),
    (r"^transformer_ffn_layers\.(\d+)\.norm\.", r"decoder.layers.\1.final_layer_norm."),
    (r"^transformer_\w+_layers\.(\d+)\.", r"decoder.layers.\1."),
    (r"\.self_attn\.in_proj_(\w+)$", r".self_attn.[q_proj|k_proj|v_proj].\1"),
    (r"\.multihead_attn\.", ".cross_attn."),
    (r"\.linear(\d)\.", r".fc\1."),
    (r"^decoder_norm\.", "decoder.layernorm."),
    (r"^mask_embed\.layers\.(\d)\.", r"decoder.mask_predictor.mask_embedder.\1.0."),
    (r"^query_feat\.", "queries_features."),
    (r"^query_embed\.", "queries_embedder."),
    (r"^input_proj\.", "input_projections."),
)


def _applied(rules: Rules, name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def own_names(name: str) -> tuple[str, ...]:
    return (name,)


def detectron2_names(name: str) -> tuple[str, ...]:
    """Names of the original Mask2Former; only its backbones differ from ours."""
    prefix, _, rest = name.partition(".")
    if prefix != "backbone":
        return (name,)
    return (f"backbone.{_applied(_swin_or_resnet(rest, SWIN_TO_DETECTRON2, RESNET_TO_DETECTRON2), rest)}",)


def transformers_names(name: str) -> tuple[str, ...]:
    """Names in the files of Mask2FormerForUniversalSegmentation; three for queries, keys and values."""
    pixel_decoder, mask_decoder = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
    if name.startswith("backbone."):
        rest = name.removeprefix("backbone.")
        rules = _swin_or_resnet(rest, SWIN_TO_TRANSFORMERS, RESNET_TO_TRANSFORMERS)
        theirs = f"model.pixel_level_module.encoder.{_applied(rules, rest)}"
    elif name.startswith(pixel_decoder):
        rest = name.removeprefix(pixel_decoder)
        theirs = f"model.pixel_level_module.decoder.{_applied(PIXEL_DECODER_TO_TRANSFORMERS, rest)}"
    elif name.startswith(f"{mask_decoder}class_embed."):
        theirs = name.replace(f"{mask_decoder}class_embed", "class_predictor")
    else:
        rest = name.removeprefix(mask_decoder)
        theirs = f"model.transformer_module.{_applied(MASK_DECODER_TO_TRANSFORMERS, rest)}"
    parts = _PARTS.search(theirs)
    return tuple(_PARTS.sub(part, theirs) for part in parts[1].split("|")) if parts else (theirs,)


# transformers 5 calls Swin's modules in memory otherwise than its files do.
SWIN_IN_MEMORY: Rules = (
    (r"\.encoder\.swin\.", ".encoder."),
    (r"\.attention\.q_proj\.", ".attention.self.query."),
    (r"\.attention\.k_proj\.", ".attention.self.key."),
    (r"\.attention\.v_proj\.", ".attention.self.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.attention\.relative_position_bias\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


def stored_transformers_name(name: str) -> str:
    """The name that a weight, called ``name`` in memory, has in transformers' files; others as they are."""
    return _applied(SWIN_IN_MEMORY, name) if name.startswith("model.pixel_level_module.encoder.") else name


def _swin_or_resnet(name: str, swin: Rules, resnet: Rules) -> Rules:
    return swin if re.match(r"body\.(patch_embed|layers_)|norm\d", name) else resnet


def to_names(weights: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Our weights under the names of another implementation."""
    renamed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        theirs = naming(name)
        parts = weight.chunk(len(theirs)) if len(theirs) > 1 else (weight,)
        renamed.update(zip(theirs, parts, strict=True))
    return renamed


def from_names(weights: Mapping[str, Any], names: Iterable[str], naming: Naming) -> dict[str, Any]:
    """What another implementation has for our ``names``, and whatever else it has under its own names."""
    rest, restored = dict(weights), {}
    for name in names:
        theirs = naming(name)
        if all(part in rest for part in theirs):
            parts = [rest.pop(part) for part in theirs]
            restored[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return {**rest, **restored}
