"""Mask2Former's pixel decoder: a deformable encoder over strides 8 to 32, then one FPN step to stride 4.

Parameter names are those of the published checkpoints (``sem_seg_head.pixel_decoder.*``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.modeling.convolution import PixelLinear, convolution
from sim_m2f.modeling.deformable_attention import MSDeformAttn, Shapes
from sim_m2f.modeling.position import sine_positions
from sim_m2f.modeling.recompute import recomputed

CHUNK = 4096  # pixels that go through an MLP together on a CPU, so that the hidden layer stays in the caches


class Norm(nn.GroupNorm):
    """GroupNorm (32 groups), which also takes a map of one pixel with one channel per group: to its bias."""

    def __init__(self, width: int) -> None:
        super().__init__(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, followed by a norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        self.norm = Norm(outputs)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(convolution(self, x, self.weight, self.bias))


class EncoderLayer(nn.Module):
    """Deformable self-attention and MLP, each with a residual and a layer norm after it."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        head = cfg.MODEL.SEM_SEG_HEAD
        width, hidden = head.CONVS_DIM, head.TRANSFORMER_ENC_DIM_FEEDFORWARD
        levels = len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES)
        heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
        points = head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
        self.self_attn = MSDeformAttn(width, levels, heads, points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = PixelLinear(width, hidden)
        self.linear2 = PixelLinear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(cfg.MODEL.MASK_FORMER.DROPOUT)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, source: Tensor, positions: Tensor, reference: Tensor, shapes: Shapes) -> Tensor:
        attended = self.self_attn(source + positions, reference, source, shapes)
        source = self.norm1(source + self.dropout(attended))
        if source.device.type != "cpu" or torch.compiler.is_compiling():
            return self._mlp(source)
        return torch.cat([self._mlp(part) for part in source.split(CHUNK, dim=1)], dim=1)

    def _mlp(self, source: Tensor) -> Tensor:
        hidden = self.dropout(F.relu_(self.linear1(source)))
        return self.norm2(source + self.dropout(self.linear2(hidden)))


class Transformer(nn.Module):
    """A stack of encoder layers over all levels at once, and an embedding per level."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        head = cfg.MODEL.SEM_SEG_HEAD
        levels = len(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES)
        self.level_embed = nn.Parameter(torch.randn(levels, head.CONVS_DIM))
        layers = nn.ModuleList(EncoderLayer(cfg) for _ in range(head.TRANSFORMER_ENC_LAYERS))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.recompute = head.USE_CHECKPOINT

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """(B, width, h, w) per level in, the same out."""
        shapes = [(feature.shape[2], feature.shape[3]) for feature in features]
        width = features[0].shape[1]
        source = torch.cat([feature.flatten(2).transpose(1, 2) for feature in features], dim=1)
        places = [sine_positions(*shape, width, source.device) for shape in shapes]
        positions = torch.cat([place + self.level_embed[i] for i, place in enumerate(places)], dim=1)
        reference = _pixel_centres(shapes, source.device)
        for layer in self.encoder["layers"].children():
            inputs = source, positions, reference, shapes
            source = recomputed(layer, *inputs) if self.recompute else layer(*inputs)
        encoded = source.split([h * w for h, w in shapes], dim=1)
        maps = [level.unflatten(1, shape) for level, shape in zip(encoded, shapes, strict=True)]
        return [level.permute(0, 3, 1, 2) for level in maps]


def _pixel_centres(shapes: Shapes, device: torch.device) -> Tensor:
    """(1, S, 1, 2): x and y of every pixel's centre, 0 to 1."""
    centres = []
    for h, w in shapes:
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        centres.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1).reshape(-1, 2))
    return torch.cat(centres)[None, :, None]


class PixelDecoder(nn.Module):
    """Backbone features in; three encoded maps (strides 32, 16, 8) and the mask features (stride 4) out."""

    def __init__(self, cfg: CfgNode, channels: dict[str, int]) -> None:
        super().__init__()
        head = cfg.MODEL.SEM_SEG_HEAD
        width = head.CONVS_DIM
        self.encoded_features = list(head.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES)[::-1]
        self.fine_feature = head.IN_FEATURES[0]
        projections = [nn.Conv2d(channels[name], width, 1) for name in self.encoded_features]
        for projection in projections:
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
        normed = (nn.Sequential(projection, Norm(width)) for projection in projections)
        self.input_proj = nn.ModuleList(normed)
        self.transformer = Transformer(cfg)
        self.adapter_1 = ConvNorm(channels[self.fine_feature], width, 1)
        self.layer_1 = ConvNorm(width, width, 3)
        self.mask_features = nn.Conv2d(width, head.MASK_DIM, 1)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)  # type: ignore[arg-type]

    def forward(self, features: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        inputs = zip(self.input_proj, self.encoded_features, strict=True)
        encoded = self.transformer([projection(features[name]) for projection, name in inputs])
        fine = self.adapter_1(features[self.fine_feature])
        fine += F.interpolate(encoded[-1], size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return encoded, self.mask_features(F.relu_(self.layer_1(fine)))
