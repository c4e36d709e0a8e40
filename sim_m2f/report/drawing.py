"""Draws boxes and masks on images, and figures with panels of an exact size in pixels.

By matplotlib: torchvision's drawing has no contours, and lets texts cover each other.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox, IdentityTransform
from PIL import Image

from sim_m2f.geometry import mask_extents

PALETTE = (
    *("#ff5a5f", "#3fa9ff", "#ffd23f", "#4cdf7b", "#c08bff", "#ff9838"),
    *("#2ad9e0", "#ff79c9", "#b4ec3c", "#a8b4ff", "#e0a183", "#f2f2f2"),
)
INK, SOFT = "#1c2024", "#667078"
PANEL = {"frameon": False, "xticks": (), "yticks": (), "anchor": "NW"}
DPI = 72  # a point is a pixel
FILL_OPACITY, LINE, TEXT_SIZE = 0.35, 2, 13
HALO = (withStroke(linewidth=LINE + 2, foreground=INK, alpha=0.7),)  # the dark line around contours and boxes
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


def draw(image: Image.Image, shapes: Sequence[Shape], side: int) -> Image.Image:
    """The image, enlarged or reduced to ``side`` pixels on its longer side, with the shapes on it."""
    width, height = (max(1, round(length * side / max(image.size))) for length in image.size)
    figure, axes = panel_grid([width], [height])
    show(axes[0, 0], image, shapes)
    return rendered(figure)


def show(axes: Axes, image: Image.Image, shapes: Sequence[Shape] = ()) -> None:
    """Show an image with shapes on axes of a ``panel_grid``, in whose upper left corner it fits.

    Masks are tinted and outlined, the largest first so that small ones stay visible; boxes are outlined.
    Texts are placed in the order of the shapes; one that has no room is left out.
    """
    width, height = image.size
    axes.imshow(image.convert("RGB"), extent=(0, width, height, 0), interpolation="bicubic")
    axes.autoscale(False)
    axes.apply_aspect()
    masks = [(shape.mask, shape.colour) for shape in shapes if shape.mask is not None]
    for mask, colour in sorted(masks, key=lambda item: -np.count_nonzero(item[0])):
        _draw_mask(axes, mask, colour)
    for shape in shapes:
        if shape.box is not None:
            _draw_box(axes, shape.box, shape.colour)
    _draw_texts(axes, shapes)


def contact_sheet(rows: Sequence[tuple[str, Mapping[str, Image.Image]]]) -> Image.Image:
    """Rows of panels under the titles of their columns, each with a caption; many rows stand in two blocks.

    Args:
        rows: caption, and panels by title, of each row; the same titles in all of them.
    """
    lines = len(rows) if len(rows) < 4 else math.ceil(len(rows) / 2)
    columns = len(rows[0][1])
    width = max(panel.width for _, panels in rows for panel in panels.values())
    heights = [
        max(panel.height for _, panels in rows[line::lines] for panel in panels.values())
        for line in range(lines)
    ]
    widths = [width] * columns * math.ceil(len(rows) / lines)
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
    axes = figure.subplots(
        len(heights),
        len(widths),
        squeeze=False,
        subplot_kw=PANEL,
        gridspec_kw={
            "width_ratios": widths,
            "height_ratios": heights,
            "left": gap / width,
            "right": 1 - gap / width,
            "bottom": gap / height,
            "top": 1 - (top + above) / height,
            "wspace": gap / np.mean(widths),
            "hspace": above / np.mean(heights),
        },
    )
    return figure, axes


def write_above(axes: Axes, text: str, distance: float = 0, size: float = TEXT_SIZE, **style: Any) -> None:
    """Text ``distance`` pixels above the left end of a panel."""
    place = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (0, 1), (0, distance + 5), fontsize=size, **place, **style)


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
    style = {"fill": False, "edgecolor": colour, "linewidth": LINE, "path_effects": HALO}
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, **style))


def _draw_texts(axes: Axes, shapes: Sequence[Shape]) -> None:
    """Each on its shape's colour, above, below or inside the shape: where it is in the panel and free."""
    frame, taken = axes.get_window_extent(), []
    for shape in shapes:
        if not shape.text:
            continue
        (left, top), (right, bottom) = axes.transData.transform(np.reshape(shape.extent(), (2, 2)))
        if max(right - left, top - bottom) < MIN_TEXT_EXTENT * max(frame.size):
            continue
        label = {"facecolor": shape.colour, "edgecolor": "none", "boxstyle": f"square,pad={PAD / TEXT_SIZE}"}
        text = axes.text(0, 0, shape.text, color=INK, fontsize=TEXT_SIZE, va="bottom", bbox=label)
        text.set_transform(IdentityTransform())
        width, height = text.get_window_extent().padded(PAD).size
        left = max(min(left, frame.x1 - width), frame.x0)
        places = [
            Bbox.from_bounds(left, y, width, height) for y in (top, bottom - height, top - height, bottom)
        ]
        free = [
            place
            for place in places
            if frame.y0 <= place.y0
            and place.y1 <= frame.y1
            and place.x1 <= frame.x1
            and not place.count_overlaps(taken)
        ]
        if free:
            text.set_position(free[0].p0 + PAD)
            taken.append(free[0])
        else:
            text.remove()
