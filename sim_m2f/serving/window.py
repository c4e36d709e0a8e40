"""The part of an image that a canvas shows, and the way from its pixels to the canvas and back."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDE = 500  # pixels of a canvas' longer side
MARGIN, LEAST = 0.75, 16  # on each side of an object, in units of its longer side; in pixels of the image
CORNERS = ("xmin", "ymin", "xmax", "ymax")  # as the canvas names them


@dataclass(frozen=True)
class Window:
    """Columns from left to right and rows from top to bottom of an image, their ends not included."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def scale(self) -> float:
        """Pixels of the canvas per pixel of the image."""
        return SIDE / max(self.right - self.left, self.bottom - self.top)

    def part(self, array: np.ndarray) -> np.ndarray:
        """What of an array (H, W, ...) lies in the window."""
        return array[self.top : self.bottom, self.left : self.right]

    def shown(self, pixels: np.ndarray) -> Image.Image:
        """The part of an image (H, W, 3) uint8 as the canvas shows it."""
        part = Image.fromarray(self.part(pixels))
        width, height = (max(1, round(side * self.scale)) for side in part.size)
        return part.resize((width, height), Image.Resampling.BICUBIC)

    def to_canvas(self, box: np.ndarray) -> dict[str, Any]:
        """A box (4,) xyxy in pixels of the image, in the canvas' form."""
        corners = (box - [self.left, self.top] * 2) * self.scale
        return dict(zip(CORNERS, corners.tolist(), strict=True))

    def to_image(self, boxes: Iterable[dict[str, Any]]) -> np.ndarray:
        """Boxes in the canvas' form as (N, 4) float64 xyxy in pixels of the image, within the window."""
        corners = np.array([[box[key] for key in CORNERS] for box in boxes], float).reshape(-1, 4)
        low, high = [self.left, self.top] * 2, [self.right, self.bottom] * 2
        return np.clip(corners / self.scale + low, low, high)


def whole(pixels: np.ndarray) -> Window:
    """All of an image (H, W, 3)."""
    return Window(0, 0, pixels.shape[1], pixels.shape[0])


def around(box: np.ndarray, height: int, width: int) -> Window:
    """A box (4,) xyxy with what surrounds it in its image."""
    margin = max(MARGIN * (box[2:] - box[:2]).max(), LEAST)
    left, top = np.maximum(box[:2] - margin, 0).astype(int)
    right, bottom = np.ceil(np.minimum(box[2:] + margin, [width, height])).astype(int)
    return Window(int(left), int(top), int(right), int(bottom))
