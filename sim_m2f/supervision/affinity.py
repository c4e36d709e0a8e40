"""Colour affinity of neighbouring pixels in CIELAB (BoxInst, section 3.3), on the device."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.structures import STRIDE

WHITE_D65 = (0.95047, 1.0, 1.08883)
RGB_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """sRGB (B, 3, H, W) of 0..1 to CIELAB (B, 3, H, W) under D65 light (IEC 61966-2-1, CIE 15)."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    matrix, white = _constants(rgb.dtype, rgb.device)
    xyz = torch.einsum("ij,bjhw->bihw", matrix, linear) / white
    cubic = xyz.clamp(min=0.008856) ** (1 / 3)
    x, y, z = torch.where(xyz > 0.008856, cubic, 7.787 * xyz + 16 / 116).unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


def lab_at(images: Tensor, stride: int) -> Tensor:
    """CIELAB (B, 3, H / stride, W / stride) of RGB images (B, 3, H, W) of 0..255, averaged over pixels."""
    return rgb_to_lab((F.avg_pool2d(images.float(), stride) / 255).clamp(0, 1))


@functools.cache
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """RGB_TO_XYZ and WHITE_D65 (3, 1, 1), copied to a device once."""
    matrix, white = (torch.tensor(values, dtype=dtype, device=device) for values in (RGB_TO_XYZ, WHITE_D65))
    return matrix, white.view(3, 1, 1)


def neighbour_offsets(dilation: int) -> list[tuple[int, int]]:
    """(dy, dx) of the four neighbours after a pixel; the other four are these edges from their other end."""
    return [(0, dilation), (dilation, -dilation), (dilation, 0), (dilation, dilation)]


def color_affinity(images: Tensor, dilation: int) -> Tensor:
    """exp(-|lab_i - lab_j| / 2) between each pixel at stride 4 and its four neighbours after it.

    Args:
        images: (B, 3, H, W) RGB of 0..255.
        dilation: distance of the neighbours in pixels at stride 4.

    Returns:
        (B, 4, h, w), 0 where the neighbour lies outside; the order is that of ``neighbour_offsets``.
    """
    lab = lab_at(images, STRIDE)
    distance = [(lab - _shifted(lab, offset)).norm(dim=1) for offset in neighbour_offsets(dilation)]
    inside = edge_mask(torch.ones_like(lab[:, 0], dtype=torch.bool), dilation)
    return torch.exp(-torch.stack(distance, dim=1) / 2) * inside


def feature_affinity(features: Tensor, dilation: int) -> Tensor:
    """exp(-|z_i - z_j|) of unit features between each pixel and its four neighbours after it (SIM).

    Args:
        features: (B, d, h, w) mask features of any length.
        dilation: distance of the neighbours in pixels at stride 4.

    Returns:
        (B, 4, h, w); without meaning where the neighbour lies outside.
    """
    unit = F.normalize(features.float(), dim=1)
    cosines = [(unit * _shifted(unit, offset)).sum(1) for offset in neighbour_offsets(dilation)]
    return torch.exp(-(2 - 2 * torch.stack(cosines, dim=1)).clamp(min=0).sqrt())


def alike_edges(images: Tensor, valid: Tensor, features: Tensor | None, keys: CfgNode) -> Tensor:
    """(B, 4, h, w) bool: the edges between alike and usable pixels, in the order of ``neighbour_offsets``.

    Args:
        images: (B, 3, H, W) RGB of 0..255.
        valid: (B, h, w) bool, usable pixels at stride 4.
        features: (B, d, h, w) the teacher's mask features, if there is a teacher.
        keys: MODEL.SIM.PAIRWISE.
    """
    affinity, threshold = color_affinity(images, keys.DILATION), keys.COLOR_THRESHOLD
    if keys.FEATURE_AFFINITY and features is not None:
        affinity = affinity * feature_affinity(features, keys.DILATION)
        threshold = keys.PRODUCT_THRESHOLD
    return (affinity >= threshold) & edge_mask(valid, keys.DILATION)


def edge_mask(valid: Tensor, dilation: int) -> Tensor:
    """(B, h, w) bool of usable pixels to (B, 4, h, w) bool: both ends are in the image and usable."""
    return torch.stack([valid & _shifted(valid, offset) for offset in neighbour_offsets(dilation)], dim=1)


def _shifted(maps: Tensor, offset: tuple[int, int]) -> Tensor:
    """At every pixel the value of the neighbour at ``offset`` (dy >= 0); zero where there is none."""
    dy, dx = offset
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (max(-dx, 0), max(dx, 0), 0, dy))
    left = max(dx, 0)
    return padded[..., dy : dy + height, left : left + width]
