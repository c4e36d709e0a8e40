"""What a network predicts after each of its decoder layers."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layers:
    """The predictions of L layers.

    Attributes:
        logits: (L, B, Q, C+1) float32 class logits.
        masks: (B, L, Q, h, w) mask logits at stride 4, in the network's precision.
    """

    logits: Tensor
    masks: Tensor

    @property
    def last(self) -> "Layers":
        """The last layer alone."""
        return Layers(self.logits[-1:], self.masks[:, -1:])

    @cached_property
    def seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a query costs depends on: the class logits and the masks' projections."""
        return self.logits, *mask_projections(self.masks)


@torch.no_grad()
def mask_projections(masks: Tensor) -> tuple[Tensor, Tensor]:
    """(L, B, Q, w) and (L, B, Q, h): the largest probability of every column and row.

    ``masks`` are logits (B, L, Q, h, w).
    """
    along_x, along_y = masks.amax(-2), masks.amax(-1)
    return along_x.transpose(0, 1).float().sigmoid(), along_y.transpose(0, 1).float().sigmoid()
