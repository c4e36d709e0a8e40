"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shapes = list[tuple[int, int]]


def ms_deform_attn(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples of every level; samples outside a level count as zero.

    Args:
        value: (N, S, M, D), the levels flattened one after the other, S = sum of height x width, M heads.
        shapes: height and width of every level.
        locations: (N, Q, M, L, P, 2), x and y, 0 to 1 from one border of a level to the other.
        weights: (N, Q, M, L, P).

    Returns:
        (N, Q, M * D).
    """
    n, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    grids = 2 * locations - 1
    sampled = []
    for level, level_value in enumerate(value.split([h * w for h, w in shapes], dim=1)):
        height, length = shapes[level]
        maps = level_value.permute(0, 2, 3, 1).reshape(n * heads, width, height, length)
        grid = grids[:, :, :, level].transpose(1, 2).reshape(n * heads, queries, points, 2)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(n * heads, 1, queries, -1)
    output = (torch.cat(sampled, dim=-1) * weights).sum(-1)
    return output.view(n, heads * width, queries).transpose(1, 2)


class MSDeformAttn(nn.Module):
    """The attention with its projections; the offsets start on ``heads`` rays, one step further per point."""

    def __init__(self, width: int, levels: int, heads: int, points: int) -> None:
        super().__init__()
        self.levels, self.heads, self.points = levels, heads, points
        self.sampling_offsets = nn.Linear(width, heads * levels * points * 2)
        self.attention_weights = nn.Linear(width, heads * levels * points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
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
        weights = self.attention_weights(query).view(batch, queries, self.heads, -1).softmax(-1).view(samples)
        sizes = torch.tensor(shapes, dtype=offsets.dtype, device=offsets.device).flip(-1).view(-1, 1, 2)
        locations = reference[:, :, None, None].to(offsets.dtype) + offsets / sizes
        return self.output_proj(ms_deform_attn(value, shapes, locations, weights.to(value.dtype)))
