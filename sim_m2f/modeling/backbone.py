"""Backbones: timm's models as feature pyramids of strides 4, 8, 16 and 32."""

import itertools
from collections.abc import Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath, Format, GroupNorm, freeze_batch_norm_2d
from timm.models import FeatureInfo
from timm.models.resnet import Bottleneck
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.draws import Seed, uniform
from sim_m2f.errors import UserError, first_line
from sim_m2f.modeling.frozen_norm import fold_frozen_norms
from sim_m2f.modeling.recompute import recompute_blocks

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
GROUPS = 32  # of a group norm, in timm as in detectron2
BASIC_DEPTHS = (18, 34)  # ResNets of basic blocks; deeper ones widen each stage by 4
SWIN_KEYS = ("PATCH_SIZE", "EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE", "MLP_RATIO", "DROP_PATH_RATE")
ANY_SIZE: dict[str, Any] = {"strict_img_size": False, "dynamic_img_size": True}  # of timm's Swins
LEARNING_NORMS = (nn.GroupNorm, nn.LayerNorm)  # those without statistics
NORMS: dict[str, type[nn.Module]] = {"SyncBN": nn.SyncBatchNorm, "GN": GroupNorm}  # all others: BatchNorm2d


class TimmBackbone(nn.Module):
    """Any timm model; (B, 3, H, W) in, {"res2": (B, c, H/4, W/4), ..., "res5": stride 32} out.

    Args:
        name: timm's name of the model.
        options: further arguments of ``timm.create_model``.

    Raises:
        UserError: timm does not know the name, or the model has no maps of strides 4 to 32, or takes no
            images of any size.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"MODEL.BACKBONE.NAME: timm has no model {name!r}; timm.list_models() lists them")
        with torch.device("meta"):
            reductions = feature_info(timm.create_model(name, features_only=True)).reduction()
        missing = [stride for stride in STRIDES.values() if stride not in reductions]
        if missing:
            fault = f"{name} has no map of stride {missing[0]}"
            raise UserError(f"MODEL.BACKBONE.NAME: {fault}; take a pyramid model")
        options = _of_any_size(name, options)
        indices = tuple(reductions.index(stride) for stride in STRIDES.values())
        self.body = timm.create_model(name, features_only=True, out_indices=indices, **options)
        self.channels = dict(zip(STRIDES, feature_info(self.body).channels(), strict=True))
        self.name = name
        self.channels_last = getattr(self.body, "output_fmt", None) == Format.NHWC
        for module in self.body.modules():
            if type(module) is DropPath:
                module.__class__ = SeededDropPath

    def draw_paths(self, seeds: Sequence[Seed]) -> None:
        """Decide by the seeds of the next images which paths they take where stochastic depth drops some."""
        paths = [module for module in self.body.modules() if isinstance(module, SeededDropPath)]
        if paths:
            drawn = uniform(seeds, "paths", len(paths))
            for path, numbers in zip(paths, drawn.unbind(1), strict=True):
                path.kept = (numbers >= path.drop_prob) / (1 - path.drop_prob)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.body(images.contiguous(memory_format=torch.channels_last))
        if self.channels_last:
            maps = [feature.permute(0, 3, 1, 2) for feature in maps]
        return dict(zip(STRIDES, maps, strict=True))


def _of_any_size(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options with which a model takes an image of a size of ours; nothing is computed.

    Raises:
        UserError: it takes none.
    """
    faults = []
    for own in (options, options | ANY_SIZE):
        with torch.device("meta"), torch.no_grad():
            try:
                timm.create_model(name, features_only=True, **own).eval()(torch.empty(1, 3, 64, 96))
                return own
            except Exception as error:  # models refuse other sizes by anything
                faults.append(error)
    fault = f"{name} does not take images of any size ({first_line(faults[0])})"
    raise UserError(f"MODEL.BACKBONE.NAME: {fault}; take another model") from faults[0]


class SeededDropPath(DropPath):
    """Stochastic depth; which images of the next batch keep the path is decided before it."""

    kept: Tensor | None = None  # (B,), 0 or 1 / probability to keep it; drawn anew where None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or not self.training:
            return super().forward(x)
        return x * self.kept.to(x, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


def feature_info(body: nn.Module) -> FeatureInfo:
    """What timm knows of the feature maps of a model."""
    info = body.feature_info
    assert isinstance(info, FeatureInfo)
    return info


class PaddedSwinBlock(SwinTransformerBlock):
    """A block that pads maps to whole windows before it shifts them, as the original; timm's shifts first."""

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        padded = F.pad(x, (0, 0, 0, -width % self.window_size[1], 0, -height % self.window_size[0]))
        return super()._attn(padded)[:, :height, :width]


class SwinBackbone(TimmBackbone):
    """Swin with a layer norm on each of its four outputs, as detection networks use it."""

    def __init__(self, **options: Any) -> None:
        name = "swin_tiny_patch4_window7_224"  # whatever its size: the options say that
        super().__init__(name, dynamic_img_size=True, always_partition=True, **options)
        for block in self.body.modules():
            if isinstance(block, SwinTransformerBlock):
                block.__class__ = PaddedSwinBlock
        for i, channels in enumerate(self.channels.values()):
            self.add_module(f"norm{i}", nn.LayerNorm(channels))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = (getattr(self, f"norm{i}")(feature) for i, feature in enumerate(self.body(images)))
        return {name: feature.permute(0, 3, 1, 2) for name, feature in zip(STRIDES, maps, strict=True)}


def build_backbone(cfg: CfgNode) -> TimmBackbone:
    """The backbone that MODEL.BACKBONE, MODEL.RESNETS and MODEL.SWIN describe."""
    name = cfg.MODEL.BACKBONE.NAME
    if name == "build_resnet_backbone":
        backbone = _resnet(cfg)
    elif name == "D2SwinTransformer":
        backbone = SwinBackbone(**{key.lower(): cfg.MODEL.SWIN[key] for key in SWIN_KEYS})
    else:
        backbone = TimmBackbone(name)
    if cfg.MODEL.BACKBONE.USE_CHECKPOINT or cfg.MODEL.SWIN.USE_CHECKPOINT:
        recompute_blocks(backbone.body)
    if cfg.MODEL.BACKBONE.FREEZE_NORMS:
        freeze_batch_norm_2d(backbone.body)
        fold_frozen_norms(backbone.body)
        for module in backbone.modules():
            if isinstance(module, LEARNING_NORMS):
                module.requires_grad_(False)
    return backbone


def _resnet(cfg: CfgNode) -> TimmBackbone:
    norm, depth = cfg.MODEL.RESNETS.NORM, cfg.MODEL.RESNETS.DEPTH
    wide, factor = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, 1 if depth in BASIC_DEPTHS else 4
    divisor = factor * (GROUPS if norm == "GN" else 1)
    if wide % divisor:
        where = f"with MODEL.RESNETS.DEPTH {depth} and NORM {norm}"
        raise UserError(f"MODEL.RESNETS.RES2_OUT_CHANNELS is {wide}; {where} use a multiple of {divisor}")
    width = wide // factor
    channels = tuple(width * 2**stage for stage in range(4))
    backbone = TimmBackbone(f"resnet{depth}", norm_layer=NORMS.get(norm, nn.BatchNorm2d), channels=channels)
    if norm == "FrozenBN":
        freeze_batch_norm_2d(backbone.body)
    if cfg.MODEL.RESNETS.STRIDE_IN_1X1:
        _stride_in_1x1(backbone.body)
    stages = ["conv1", "bn1"], ["layer1"], ["layer2"], ["layer3"], ["layer4"]
    for name in itertools.chain(*stages[: cfg.MODEL.BACKBONE.FREEZE_AT]):
        module = getattr(backbone.body, name).requires_grad_(False)
        setattr(backbone.body, name, freeze_batch_norm_2d(module))
    fold_frozen_norms(backbone.body)
    return backbone


def _stride_in_1x1(body: nn.Module) -> None:
    """Move the stride of every bottleneck to its first convolution, where MSRA's ResNets have it."""
    for block in body.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
