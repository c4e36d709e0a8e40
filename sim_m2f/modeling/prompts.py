"""Box prompts: queries made of given boxes and labels, which answer with the mask of the object in each box.

Ideas of DN-DETR (https://arxiv.org/abs/2203.01305) and MP-Former (https://arxiv.org/abs/2303.07336).
"""

import math

import torch
from torch import Tensor, nn

from sim_m2f.structures import Prompts

FREQUENCIES = 8  # sines of half a period to 64 periods per image


class PromptEncoder(nn.Module):
    """A query per prompt: an embedding of the label as content, an MLP on sines of the box as position."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.label_embed = nn.Embedding(classes, width)
        self.box_embed = nn.Sequential(
            nn.Linear(4 * 2 * FREQUENCIES, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Contents and positions of the queries, (B, N, width) each."""
        return self.label_embed(prompts.labels), self.box_embed(box_sines(prompts.boxes))


def box_sines(boxes: Tensor) -> Tensor:
    """(..., 4) to (..., 64): sine and cosine of pi 2^k times every coordinate, k from 0 to 7."""
    frequencies = math.pi * 2 ** torch.arange(FREQUENCIES, device=boxes.device, dtype=boxes.dtype)
    angles = (boxes[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def grown(boxes: Tensor, share: float) -> Tensor:
    """(..., 4) xyxy boxes with every side moved out by a share of the box's width or height."""
    margin = share * (boxes[..., 2:] - boxes[..., :2])
    return torch.cat([boxes[..., :2] - margin, boxes[..., 2:] + margin], dim=-1)


def pixels_in_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Pixels of a map whose centres lie in the boxes; every box owns at least the pixel at its own centre.

    Args:
        boxes: (B, N, 4) xyxy in shares of the map.
        height, width: size of the map.

    Returns:
        (B, N, height * width) bool.
    """
    columns = _owned(boxes[..., 0], boxes[..., 2], width)
    rows = _owned(boxes[..., 1], boxes[..., 3], height)
    return (rows[..., :, None] & columns[..., None, :]).flatten(-2)


def _owned(start: Tensor, end: Tensor, length: int) -> Tensor:
    """(B, N, length) bool: pixels whose centre lies from ``start`` to ``end``, and the one in the middle."""
    pixels = torch.arange(length, device=start.device)
    centres = (pixels + 0.5) / length
    middle = ((start + end) / 2 * length).long().clamp(0, length - 1)
    inside = (centres >= start[..., None]) & (centres < end[..., None])
    return inside | (pixels == middle[..., None])
