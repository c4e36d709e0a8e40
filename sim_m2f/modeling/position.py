"""Sine position embedding of a feature map (DETR, https://arxiv.org/abs/2005.12872, appendix A.4)."""

import math
from functools import lru_cache

import torch
from torch import Tensor


def sine_positions(height: int, length: int, width: int, device: torch.device) -> Tensor:
    """Embedding of every pixel of a map, computed once per size.

    Args:
        height, length: size of the map in its own pixels.
        width: channels; the first half encodes y, the second x.

    Returns:
        (1, height * length, width), float32.
    """
    if torch.compiler.is_exporting():  # sizes are symbols, which no cache can look up
        return _encoded(height, length, width, device)
    return _cached(height, length, width, device)


def _encoded(height: int, length: int, width: int, device: torch.device) -> Tensor:
    half = width // 2
    channel = torch.arange(half, device=device)
    frequency = 10000 ** (2 * (channel // 2) / half)

    def encode(size: int) -> Tensor:
        position = torch.arange(1, size + 1, device=device) / (size + 1e-6) * (2 * math.pi)
        angle = position[:, None] / frequency
        return torch.where(channel % 2 == 0, angle.sin(), angle.cos())

    y = encode(height)[:, None].expand(height, length, half)
    x = encode(length)[None].expand(height, length, half)
    return torch.cat([y, x], dim=-1).reshape(1, height * length, width)


_cached = lru_cache(maxsize=64)(_encoded)
