"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3)."""

import math

import torch
from MultiScaleDeformableAttention import ms_deform_attn_fused
from torch import Tensor, nn

from sim_m2f.modeling.convolution import PixelLinear

Shapes = list[tuple[int, int]]


class MSDeformAttn(nn.Module):
    """The attention with its projections; the offsets start on ``heads`` rays, one step further per point."""

    def __init__(self, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = PixelLinear(width, heads * levels * points * 2)
        self.attention_weights = PixelLinear(width, heads * levels * points)
        self.value_proj = PixelLinear(width, width)
        self.output_proj = PixelLinear(width, width)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        angles = torch.arange(self.heads) * (2 * math.pi / self.heads)
        rays = torch.stack([angles.cos(), angles.sin()], -1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        bias = (rays.view(self.heads, 1, 1, 2) * steps).expand(-1, self.levels, -1, -1)
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(bias.flatten())
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, query: Tensor, reference: Tensor, source: Tensor, shapes: Shapes) -> Tensor:
        """
        Args:
            query: (B, Q, width), positions added.
            reference: (1, Q, 1, 2), x and y of every query, 0 to 1.
            source: (B, S, width), all levels flattened.
            shapes: height and width of every level.

        Returns:
            (B, Q, width).
        """
        batch, queries, _ = query.shape
        value = self.value_proj(source).view(batch, source.shape[1], self.heads, -1)
        samples = (batch, queries, self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).view(*samples, 2)
        logits = self.attention_weights(query).view(samples)
        return self.output_proj(ms_deform_attn_fused(value, shapes, None, reference, offsets, logits))
