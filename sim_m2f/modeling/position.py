"""Sine position embedding of a feature map (DETR, https://arxiv.org/abs/2005.12872, appendix A.4)."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def sine_positions(height: int, length: int, width: int, device: torch.device) -> Tensor:
    """Embedding of every pixel of a map; that of rows and columns is computed once per length.

    Args:
        height, length: size of the map in its own pixels.
        width: channels; the first half encodes y, the second x.

    Returns:
        (1, height * length, width), float32.
    """
    half = width // 2
    encoded = _encoded if torch.compiler.is_exporting() else _cached  # symbols: no cache can look them up
    y = encoded(height, half, device)[:, None].expand(height, length, half)
    x = encoded(length, half, device)[None].expand(height, length, half)
    return torch.cat([y, x], dim=-1).reshape(1, height * length, width)


def _encoded(size: int, width: int, device: torch.device) -> Tensor:
    """(size, width): of each place along one axis."""
    channel = torch.arange(width, device=device)
    frequency = 10000 ** (2 * (channel // 2) / width)
    position = torch.arange(1, size + 1, device=device) / (size + 1e-6) * (2 * math.pi)
    angle = position[:, None] / frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())


_cached = lru_cache(maxsize=128)(_encoded)
