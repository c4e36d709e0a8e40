"""Masks without specks and small holes, which colours leave where something small looks like the object."""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from sim_m2f.geometry import mask_extents

SMALL = 0.05  # of a mask's area


def without_specks(masks: Tensor) -> Tensor:
    """Masks (N, H, W) bool, where a part or a hole of less than SMALL of its mask's area is gone.

    Parts hang together by sides and corners, holes by sides; the largest part always stays.
    """
    tidy = masks.cpu().numpy().copy()
    for mask, (x0, y0, x1, y1) in zip(tidy, mask_extents(masks).tolist(), strict=True):
        if x1 > x0:
            own = mask[y0:y1, x0:x1]
            least = SMALL * own.sum()
            areas = _part_areas(own, np.ones((3, 3)))
            own &= areas >= min(least, areas.max())
            holes = _part_areas(ndimage.binary_fill_holes(own) & ~own)
            own |= (holes > 0) & (holes < least)
    return torch.from_numpy(tidy).to(masks.device)


def _part_areas(mask: np.ndarray, structure: np.ndarray | None = None) -> np.ndarray:
    """(H, W) int64: how many pixels the part has that a pixel is in; 0 outside of the mask."""
    parts, _ = ndimage.label(mask, structure)
    areas = np.bincount(parts.ravel())
    areas[0] = 0
    return areas[parts]
