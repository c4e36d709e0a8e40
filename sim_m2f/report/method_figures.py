"""Draws how SIM gets from boxes to pseudo masks: from left to right what the poster of the paper shows.

Two figures for an image: the whole of it, and its largest objects one by one with their positive masks.
"""

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from PIL import Image

from sim_m2f.engine.method_maps import OUTSIDE, MethodMaps
from sim_m2f.files import atomic_write
from sim_m2f.geometry import mask_extents
from sim_m2f.report.drawing import INK, PALETTE, SOFT, Shape, panel_grid, rendered, show, write_above
from sim_m2f.report.page import Evolution
from sim_m2f.supervision.pseudo_masks import IGNORED
from sim_m2f.supervision.targets import STRIDE

FOLDER = "method"  # in OUTPUT_DIR; below it one folder per step
OBJECTS = 3  # objects of an image, the largest, that are drawn one by one
SIDE, OBJECT_SIDE, MASK_SIDE = 230, 156, 64  # longer sides of panels: image, object, positive mask
MASK_CELL = 72  # pixels, width of a positive mask and the gap beside it
MARGIN = 2  # cells at stride 4 that are shown around an object's box
GAP, HEADER, LINE = 16, 70, 26  # pixels: between panels, of header and titles, of a caption
SMALL, SMALL_LINE = 11, 17  # size of small text, and height of its line
HEAT, NEGATIVE_COLOUR, IGNORED_COLOUR = "viridis", "#2b2350", "#d3d7db"
PALENESS = 0.7  # of the image outside the boxes
TITLES = {
    "boxes": "all that is annotated",
    r"semantic mask $\mathbf{M_S}$": "prototypes of the class",
    r"instance mask $\mathbf{M_I}$": "weighted positive masks",
    "blend M": "α $M_S$ + (1 − α) $M_I$",
    "pseudo labels": "M against two thresholds",
    "student": "the masks learned so far",
}
POSITIVE_MASKS = "positive masks of the teacher, and their weights", "their weighted mean is $M_I$"
POSITIVE_WIDTH = 360  # pixels, least width of their column: that of its title


def write_method(folder: Path, step: int, maps: Iterable[MethodMaps]) -> Iterator[tuple[str, Image.Image]]:
    """Draw images after ``step`` steps and write them to ``folder``/<step>/, two PNG files for each.

    What was in that folder goes. A file of the whole image is there only after that of its objects.

    Yields:
        (name, figure) of every file that was written.

    Raises:
        UserError: a file cannot be written.
    """
    shutil.rmtree(folder / f"{step:07d}", ignore_errors=True)
    for place, one in enumerate(maps):
        name = f"{place + 1:02d}_{Path(one.name).stem}"
        for kind, figure in (("objects", object_figure(one, step)), ("whole", whole_figure(one, step))):
            image = rendered(figure)
            with atomic_write(folder / f"{step:07d}" / f"{name}.{kind}.png", "wb") as file:
                image.save(file, "PNG")
            yield f"{name}/{kind}", image


def read_method(folder: Path, most: int = 12) -> list[Evolution]:
    """What ``write_method`` left in a folder: of each image at most so many steps, evenly spaced."""
    steps = sorted(path for path in folder.glob("*") if path.name.isdecimal())
    if not steps:
        return []
    chosen = np.unique(np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int))
    evolutions = []
    for last in sorted(steps[-1].glob("*.whole.png")):
        files = [steps[index] / last.name for index in chosen]
        rows = [(f"step {int(file.parent.name):,}", _read(file)) for file in files if file.exists()]
        objects = last.with_name(last.name.replace(".whole.", ".objects."))
        evolutions.append(Evolution(last.name[3 : -len(".whole.png")], rows, _read(objects)))
    return evolutions


def drop_later_steps(folder: Path, step: int) -> None:
    """Remove what an earlier run left of steps after ``step``."""
    for path in folder.glob("*"):
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)


def whole_figure(maps: MethodMaps, step: int) -> Figure:
    """One row: the panels of the whole image. Where boxes overlap, the largest value is drawn."""
    width, height = _size(maps, SIDE)
    widths = [max(width, OBJECT_SIDE)] * len(TITLES)
    figure, axes = _titled_grid(maps, step, list(TITLES.items()), widths, [height])
    _show_panels(axes[0], maps, object_colours(maps), maps.classes)
    return figure


def object_figure(maps: MethodMaps, step: int) -> Figure:
    """One row for each of the largest objects: its own panels, and its positive masks with their weights."""
    chosen = np.argsort(-(maps.boxes[:, 2:] - maps.boxes[:, :2]).prod(1), kind="stable")[:OBJECTS]
    objects = [cut_out(maps, index) for index in chosen]
    titles, widths = list(TITLES.items()), [OBJECT_SIDE] * len(TITLES)
    titles.insert(2, POSITIVE_MASKS)
    widths.insert(2, max(POSITIVE_WIDTH, *(MASK_CELL * _columns(own) for own in objects)))
    heights = [2 * (_size(own, MASK_SIDE)[1] + SMALL_LINE) for own in objects]
    figure, axes = _titled_grid(maps, step, titles, widths, heights, LINE)
    for row, own, index in zip(axes, objects, chosen, strict=True):
        colour = object_colours(maps)[index]
        write_above(row[0], _caption(own), bbox={"facecolor": colour, "edgecolor": "none", "pad": 2})
        _show_panels(np.delete(row, 2), own, [colour], [""])
        _show_positives(row[2], own)
    return figure


def object_colours(maps: MethodMaps) -> list[str]:
    """The colour of each object."""
    return [PALETTE[index % len(PALETTE)] for index in range(len(maps.boxes))]


def heat_cells(maps: np.ndarray) -> np.ndarray:
    """(h, w, 4) RGBA: in colour the largest of the probabilities (T, h, w), transparent outside all boxes."""
    return matplotlib.colormaps[HEAT](np.ma.masked_invalid(np.fmax.reduce(maps)))


def label_cells(labels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """(h, w, 4) RGBA of labels (T, h, w): positive, in the object's colour, hides ignored hides negative."""
    cells = np.zeros((*labels.shape[1:], 4))
    cells[(labels == 0).any(0)] = to_rgba(NEGATIVE_COLOUR)
    cells[(labels == IGNORED).any(0)] = to_rgba(IGNORED_COLOUR)
    for own, colour in zip(labels, colours, strict=True):
        cells[own == 1] = to_rgba(colour)
    return cells


def cut_out(maps: MethodMaps, index: int) -> MethodMaps:
    """The surroundings of one object, with its own maps alone."""
    height, width = maps.labels.shape[1:]
    extent = mask_extents(torch.from_numpy(maps.labels[index] != OUTSIDE)).numpy()
    left, top, right, bottom = np.clip(extent + [-MARGIN, -MARGIN, MARGIN, MARGIN], 0, 2 * [width, height])
    cells = slice(top, bottom), slice(left, right)
    pixels = slice(STRIDE * top, STRIDE * bottom), slice(STRIDE * left, STRIDE * right)
    own = slice(index, index + 1)
    return replace(
        maps,
        image=maps.image[pixels],
        boxes=maps.boxes[own] - STRIDE * np.array([left, top, left, top], np.float32),
        classes=maps.classes[own],
        **{name: getattr(maps, name)[(own, *cells)] for name in ("semantic", "instance", "blend", "labels")},
        thresholds=maps.thresholds[own],
        positives=maps.positives[(slice(None), own, *cells)],
        weights=maps.weights[:, own],
        student=maps.student[(own, *pixels)],
    )


def _show_panels(row: Sequence[Axes], maps: MethodMaps, colours: Sequence[str], names: Sequence[str]) -> None:
    """The six panels of ``TITLES``; names stand on the first."""
    boxes = [Shape(colour, box=box) for colour, box in zip(colours, maps.boxes.tolist(), strict=True)]
    named = [replace(shape, text=name) for shape, name in zip(boxes, names, strict=True)]
    masks = [Shape(colour, mask=mask) for colour, mask in zip(colours, maps.student, strict=True)]
    show(row[0], Image.fromarray(maps.image), named)
    heats = (heat_cells(values) for values in (maps.semantic, maps.instance, maps.blend))
    for axes, cells in zip(row[1:5], (*heats, label_cells(maps.labels, colours)), strict=True):
        show(axes, Image.fromarray(maps.image), boxes)
        _show_cells(axes, maps, cells)
    show(row[5], Image.fromarray(maps.image), masks)


def _show_positives(axes: Axes, own: MethodMaps) -> None:
    """The positive masks of a single object in two lines, under each its source and its weight."""
    width, height = axes.get_window_extent().size
    axes.set(xlim=(0, width), ylim=(height, 0), autoscale_on=False)
    for number, place in enumerate(np.flatnonzero(own.weights[:, 0])):
        line, column = divmod(number, _columns(own))
        corner = np.array([MASK_CELL * column, line * height / 2])
        _show_cells(axes, own, heat_cells(own.positives[place]), corner, MASK_SIDE / max(own.image.shape))
        label = f"{own.sources[place]}  {own.weights[place, 0]:.2f}"
        axes.text(*corner + [0, _size(own, MASK_SIDE)[1] + 3], label, size=SMALL, va="top")


def _show_cells(
    axes: Axes, maps: MethodMaps, cells: np.ndarray, corner: Sequence[float] = (0, 0), zoom: float = 1
) -> None:
    """Cells (h, w, 4) at stride 4 over the image, which is grey and pale."""
    pale = 255 * PALENESS + (1 - PALENESS) * maps.image.mean(-1)
    for pixels, stride, interpolation in ((pale, 1, "bicubic"), (cells, STRIDE, "nearest")):
        right, bottom = corner + zoom * stride * np.array(pixels.shape[1::-1])
        axes.imshow(
            pixels,
            "gray",
            vmin=0,
            vmax=255,
            extent=(corner[0], right, bottom, corner[1]),
            interpolation=interpolation,
        )


def _columns(own: MethodMaps) -> int:
    """How many of the positive masks stand in a line."""
    return math.ceil(np.count_nonzero(own.weights) / 2)


def _size(maps: MethodMaps, side: int) -> tuple[int, int]:
    """Width and height of the image if its longer side is ``side``."""
    height, width = maps.image.shape[:2]
    return round(side * width / max(height, width)), round(side * height / max(height, width))


def _caption(own: MethodMaps) -> str:
    labels = own.labels[own.labels != OUTSIDE]
    positive, ignored = ((labels == value).mean() for value in (1, IGNORED))
    return (
        f"{own.classes[0]}: positive from M = {own.thresholds[0]:.2f} on; "
        f"{positive:.0%} of the box positive, {ignored:.0%} ignored"
    )


def _titled_grid(
    maps: MethodMaps,
    step: int,
    titles: Sequence[tuple[str, str]],
    widths: Sequence[int],
    heights: Sequence[int],
    above: int = 0,
) -> tuple[Figure, np.ndarray]:
    """A grid of panels with ``above`` pixels for a row's caption; above it file, step, legend and titles."""
    figure, axes = panel_grid(widths, heights, GAP, above, HEADER)
    width, height = figure.bbox.size
    name = Path(maps.name).name
    shown = name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}"
    figure.text(GAP / width, 1 - 8 / height, f"{shown}, step {step:,}", size=14, weight="bold", va="top")
    for each, (title, note) in zip(axes[0], titles, strict=True):
        write_above(each, title, above + SMALL_LINE, weight="bold")
        write_above(each, note, above, SMALL, color=SOFT)
    _draw_legend(figure, object_colours(maps)[:OBJECTS])
    return figure, axes


def _draw_legend(figure: Figure, colours: Sequence[str]) -> None:
    """On the right: the scale of probabilities and the colours of labels, each before its text."""
    entries = {
        "positive (the object's colour)": tuple(Patch(color=colour) for colour in colours),
        "ignored": Patch(color=IGNORED_COLOUR),
        "negative": Patch(color=NEGATIVE_COLOUR),
    }
    squares = {"handlelength": 1.2, "handleheight": 1, "handler_map": {tuple: HandlerTuple(None, pad=0)}}
    style = {"loc": "upper right", "ncols": len(entries), "frameon": False, "fontsize": SMALL}
    figure.legend(entries.values(), entries, **style, **squares)
    width, height = figure.bbox.size
    bar = figure.add_axes((1 - 580 / width, 1 - 21 / height, 90 / width, 11 / height))
    figure.colorbar(ScalarMappable(cmap=HEAT), bar, orientation="horizontal", ticks=()).outline.set_visible(
        False
    )
    bar.text(1.05, 0.5, "probability, 0 to 1", transform=bar.transAxes, size=SMALL, va="center_baseline")


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
