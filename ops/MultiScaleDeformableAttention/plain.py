"""Multi-scale deformable attention in plain PyTorch, for every device that has no compiled kernel.

The definition in terms of `grid_sample` (Deformable DETR, https://arxiv.org/abs/2010.04159, equation 3).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Levels = Sequence[tuple[int, int, int]]
OUTSIDE = -3.0  # of any level, whose borders are at -1 and 1


def ms_deform_attn(value: Tensor, levels: Levels, locations: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of bilinear samples over levels and points, which are zero outside of a level and nowhere.

    Args:
        value: (N, S, M, D), M heads with D channels.
        levels: first position in S, height and width of every level.
        locations: (N, Q, M, L, P, 2), x and y from 0 to 1, border to border of a level.
        weights: (N, Q, M, L, P).

    Returns:
        (N, Q, M * D) in the type of ``value``.
    """
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    total = value.new_zeros(batch * heads, channels, queries)
    for level, (first, height, width) in enumerate(levels):
        maps = (
            value[:, first : first + height * width].permute(0, 2, 3, 1).reshape(-1, channels, height, width)
        )
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(-1, queries, points, 2)
        grid = grid.to(torch.promote_types(grid.dtype, torch.float32)).nan_to_num(OUTSIDE)
        grid = grid.clamp(OUTSIDE, -OUTSIDE)
        sampled = F.grid_sample(
            maps.to(grid.dtype), grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight = weights[:, :, :, level].transpose(1, 2).reshape(-1, 1, queries, points)
        total = total + (sampled * weight).sum(-1)
    return total.to(value.dtype).view(batch, heads * channels, queries).transpose(1, 2).contiguous()


def ms_deform_attn_fused(
    value: Tensor, levels: Levels, reference: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """`ms_deform_attn` at ``reference`` + ``offsets`` with the softmax of ``logits`` over levels and points.

    Args:
        value: (N, S, M, D).
        levels: first position in S, height and width of every level.
        reference: (N, Q, L, 2), x and y from 0 to 1.
        offsets: (N, Q, M, L, P, 2), x and y in pixels of the level.
        logits: (N, Q, M, L, P).

    Returns:
        (N, Q, M * D) in the type of ``value``.
    """
    wide = torch.promote_types(reference.dtype, offsets.dtype)
    sizes = torch.tensor([(width, height) for _, height, width in levels], dtype=wide, device=offsets.device)
    locations = reference[:, :, None, :, None] + offsets / sizes[:, None]
    weights = logits.flatten(3).softmax(-1, dtype=torch.promote_types(wide, logits.dtype)).view(logits.shape)
    return ms_deform_attn(value, levels, locations, weights)
