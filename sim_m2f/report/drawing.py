"""Draws boxes and masks on images, and figures with panels of an exact size in pixels.

By matplotlib: torchvision's drawing has no contours, and lets texts cover each other.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.transforms import Bbox, IdentityTransform
from PIL import Image

from sim_m2f.data.image import to_rgb
from sim_m2f.files import atomic_write
from sim_m2f.geometry import mask_extents

PALETTE = (
    *("#ff5a5f", "#3fa9ff", "#ffd23f", "#4cdf7b", "#c08bff", "#ff9838"),
    *("#2ad9e0", "#ff79c9", "#b4ec3c", "#a8b4ff", "#e0a183", "#f2f2f2"),
)
INK, SOFT = "#1c2024", "#667078"
PANEL = {"frameon": False, "xticks": (), "yticks": (), "anchor": "NW"}
DPI = 72  # a point is a pixel
FILL_OPACITY, LINE, TEXT_SIZE = 0.35, 2, 13
# The dark line around contours and boxes.
HALO: list[AbstractPathEffect] = [withStroke(linewidth=LINE + 2, foreground=INK, alpha=0.7)]
MIN_TEXT_EXTENT = 0.1  # a smaller shape, in units of the panel's longer side, has no text: it would be hidden
PAD = 2  # pixels around a text
GAP, CAPTION = 8, 26  # pixels of the contact sheet: between panels, for a line of text


@dataclass(frozen=True)
class Shape:
    """One object to draw; ``box`` (xyxy) and ``mask`` (H, W) bool are in pixels of the image."""

    colour: str
    text: str = ""
    box: Sequence[float] | None = None
    mask: np.ndarray | None = None

    def extent(self) -> Sequence[float]:
        """The box, else the one around the mask, xyxy; zeros for an empty mask."""
        return mask_extents(torch.from_numpy(self.mask)).tolist() if self.box is None else self.box


def colours(places: Iterable[int]) -> list[str]:
    """The colour of each object, by its place in the palette."""
    return [PALETTE[place % len(PALETTE)] for place in places]


def draw(image: Image.Image, shapes: Sequence[Shape], side: int) -> Image.Image:
    """The image, enlarged or reduced to ``side`` pixels on its longer side, with the shapes on it."""
    width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
    figure, ((axes,),) = panel_grid([width], [height])
    pixels = Image.fromarray(to_rgb(image)).resize((width, height), Image.Resampling.BICUBIC)
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), aspect="auto")
    draw_shapes(axes, shapes)
    return rendered(figure)


def draw_shapes(axes: Axes, shapes: Sequence[Shape]) -> None:
    """Draw shapes in a panel of a ``panel_grid`` that shows an image, of which a unit is a pixel.

    Masks are tinted and outlined, the largest first so that small ones stay visible; boxes are outlined.
    Texts are placed in the order of the shapes; one that has no room is left out.
    """
    axes.autoscale(False)
    axes.apply_aspect()
    for shape in sorted(shapes, key=lambda shape: 0 if shape.mask is None else -shape.mask.sum()):
        if shape.mask is not None:
            _draw_mask(axes, shape.mask, shape.colour)
        if shape.box is not None:
            _draw_box(axes, shape.box, shape.colour)
    _draw_texts(axes, shapes)


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, Image.Image]]]) -> Image.Image:
    """Rows of panels under the titles of their columns, each with a caption; many rows stand in two blocks.

    Args:
        rows: caption, and panels by title, of each row: the same titles in all of them, one size in a row.
    """
    lines = len(rows) if len(rows) < 4 else math.ceil(len(rows) / 2)
    columns = len(rows[0][1])
    sizes = [next(iter(panels.values())).size for _, panels in rows]
    widths = [max(width for width, _ in sizes)] * columns * math.ceil(len(rows) / lines)
    heights = [max(height for _, height in sizes[line::lines]) for line in range(lines)]
    figure, grid = panel_grid(widths, heights, GAP, above=CAPTION, top=CAPTION)
    for number, (caption, panels) in enumerate(rows):
        block, line = divmod(number, lines)
        row = grid[line, block * columns : (block + 1) * columns]
        write_above(row[0], caption, color=SOFT)
        for axes, (title, panel) in zip(row, panels.items(), strict=True):
            axes.imshow(panel, interpolation="nearest")
            if line == 0:
                write_above(axes, title, CAPTION, weight="bold")
    return rendered(figure)


def panel_grid(
    widths: Sequence[int], heights: Sequence[int], gap: int = 0, above: int = 0, top: int = 0
) -> tuple[Figure, np.ndarray]:
    """A figure with panels of a given size.

    Args:
        widths, heights: of the columns and the rows, in pixels.
        gap: between columns, and at the edges.
        above: room for text above each row.
        top: room for more above the first one.

    Returns:
        the figure, and its axes (rows, columns).
    """
    width = sum(widths) + gap * (len(widths) + 1)
    height = top + sum(heights) + above * len(heights) + gap
    figure = Figure((width / DPI, height / DPI), DPI)
    edges = {"left": gap / width, "right": 1 - gap / width}
    edges |= {"bottom": gap / height, "top": 1 - (top + above) / height}
    gaps = {"wspace": gap / np.mean(widths), "hspace": above / np.mean(heights)}
    ratios = {"width_ratios": widths, "height_ratios": heights}
    size = len(heights), len(widths)
    return figure, figure.subplots(*size, squeeze=False, subplot_kw=PANEL, gridspec_kw=edges | gaps | ratios)


def write_above(axes: Axes, text: str, distance: float = 0, size: float = TEXT_SIZE, **style: Any) -> None:
    """Text ``distance`` pixels above the left end of a panel; dollars stay dollars unless ``parse_math``."""
    style = {"size": size, "parse_math": False, **style}
    axes.annotate(text, (0, 1), (0, distance + 5), "axes fraction", "offset points", **style)


def write_png(path: Path, image: Image.Image) -> None:
    with atomic_write(path, "wb") as file:
        image.save(file, "PNG")


def rendered(figure: Figure) -> Image.Image:
    """The figure's pixels, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw_mask(axes: Axes, mask: np.ndarray, colour: str) -> None:
    left, top, right, bottom = mask_extents(torch.from_numpy(mask)).tolist()
    if right == 0:
        return
    area = np.pad(mask[top:bottom, left:right].astype(float), 1)
    centres = np.arange(left, right + 2) - 0.5, np.arange(top, bottom + 2) - 0.5
    axes.contourf(*centres, area, [0.5, 1], colors=colour, alpha=FILL_OPACITY)
    axes.contour(*centres, area, [0.5], colors=colour, linewidths=LINE).set_path_effects(HALO)


def _draw_box(axes: Axes, box: Sequence[float], colour: str) -> None:
    """Its outline; half a line inside the panel, so that one along the edge is seen as well."""
    corners = axes.transData.transform(np.reshape(box, (2, 2)))
    frame = axes.get_window_extent().padded(-LINE / 2)
    (left, top), (right, bottom) = axes.transData.inverted().transform(np.clip(corners, frame.min, frame.max))
    style: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": LINE, "path_effects": HALO}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _draw_texts(axes: Axes, shapes: Sequence[Shape]) -> None:
    """Each on its shape's colour, above, below or inside the shape: where it is in the panel and free."""
    frame = axes.get_window_extent()
    taken: list[Bbox] = []
    inside = frame.padded(1).contains
    for shape in shapes:
        (left, top), (right, bottom) = axes.transData.transform(np.reshape(shape.extent(), (2, 2)))
        if not shape.text or max(right - left, top - bottom) < MIN_TEXT_EXTENT * max(frame.size):
            continue
        label = {"facecolor": shape.colour, "edgecolor": "none", "boxstyle": f"square,pad={PAD / TEXT_SIZE}"}
        style: dict[str, Any] = {"color": INK, "size": TEXT_SIZE, "va": "bottom", "parse_math": False}
        text = axes.text(0, 0, shape.text, bbox=label, **style)
        text.set_transform(IdentityTransform())  # pixels of the figure
        width, height = text.get_window_extent().padded(PAD).size
        left = max(min(left, frame.x1 - width), frame.x0)
        for y in (top, bottom - height, top - height, bottom):
            place = Bbox.from_bounds(left, y, width, height)
            if inside(*place.p0) and inside(*place.p1) and not place.count_overlaps(taken):
                text.set_position(place.p0 + PAD)
                taken.append(place)
                break
        else:
            text.remove()
