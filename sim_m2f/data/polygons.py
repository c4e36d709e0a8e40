"""Masks as polygons, for tools that know no other shape; by contourpy, which matplotlib brings.

A polygon runs along the edges of the pixels, in pixels of the image. Holes, and for tools with one polygon
per object also further parts, are tied to the rest by a seam: a line that is walked there and back.
"""

from typing import cast

import numpy as np
from contourpy import FillType, contour_generator

FINE = 2  # half pixels: where the contour cuts a corner of a pixel, both its ends round to the corner


def mask_polygons(mask: np.ndarray) -> list[np.ndarray]:
    """One polygon (n, 2) of x and y per connected part of a mask (H, W) bool; none for an empty one."""
    if not mask.any():
        return []
    left, top, right, bottom = around_mask(mask)
    part = mask[top:bottom, left:right]
    fine = np.pad(np.kron(part, np.ones((FINE, FINE), np.uint8)), 1).astype(np.float32)
    x, y = ((np.arange(length) - 0.5) / FINE for length in fine.shape[::-1])
    contours = contour_generator(x, y, fine, fill_type=FillType.OuterOffset)
    shapes, offsets = cast(tuple[list[np.ndarray], list[np.ndarray]], contours.filled(0.5, 2.0))
    polygons = []
    for points, ends in zip(shapes, offsets, strict=True):
        rings = [_straightened(ring) + np.array([left, top]) for ring in np.split(points, ends[1:-1])]
        polygons.append(joined(rings))
    return polygons


def around_mask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box xyxy around a mask (H, W) bool that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def joined(rings: list[np.ndarray]) -> np.ndarray:
    """Closed rings (n, 2) as one polygon: each is tied to what is there by its nearest points."""
    whole = rings[0]
    for ring in rings[1:]:
        apart = np.abs(whole[:, None] - ring).sum(-1)
        here, there = np.unravel_index(apart.argmin(), apart.shape)
        tour = np.concatenate([ring[there:], ring[: there + 1]])
        whole = np.concatenate([whole[: here + 1], tour, whole[here:]])
    return whole


def _straightened(ring: np.ndarray) -> np.ndarray:
    """A closed ring without its repeated end, at whole pixels, and only where it turns."""
    corners = np.rint(ring[:-1])
    corners = corners[(corners != np.roll(corners, 1, 0)).any(1)]
    before, after = corners - np.roll(corners, 1, 0), np.roll(corners, -1, 0) - corners
    return corners[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
