"""Draws how SIM gets from boxes to pseudo masks: from left to right what the poster of the paper shows.

Two figures for an image: the whole of it, and its largest objects one by one with their positive masks.
"""

import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch
from PIL import Image, UnidentifiedImageError

from sim_m2f.engine.method_maps import OUTSIDE, MethodMaps
from sim_m2f.errors import first_line
from sim_m2f.files import shortened
from sim_m2f.geometry import mask_extents
from sim_m2f.report import drawing
from sim_m2f.report.page import Evolution
from sim_m2f.structures import STRIDE
from sim_m2f.supervision.pseudo_masks import IGNORED

FOLDER = "method"  # in OUTPUT_DIR; below it one folder per step
MOST_STEPS = 12  # of an image that are shown
STEM_BYTES = 200  # of an image's name in the names of its figures, at most
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

Window = tuple[int, int, int, int]  # a part of an image, xyxy in its pixels


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
        name = f"{place + 1:02d}_{shortened(Path(one.name).stem, STEM_BYTES)}"
        for kind, figure in (("objects", object_figure(one, step)), ("whole", whole_figure(one, step))):
            image = drawing.rendered(figure)
            drawing.write_png(folder / f"{step:07d}" / f"{name}.{kind}.png", image)
            yield f"{name}/{kind}", image


def read_method(folder: Path, last: float = math.inf) -> list[Evolution]:
    """What ``write_method`` left in a folder, up to a step: of each image ``MOST_STEPS``, evenly spaced.

    The images are those of the last of these steps. A damaged figure is left out, and a note tells so.
    """
    steps = sorted(path for path in folder.glob("*") if path.name.isdecimal() and int(path.name) <= last)
    places = np.linspace(0, max(len(steps) - 1, 0), min(MOST_STEPS, len(steps))).round().astype(int)
    evolutions = []
    for newest in sorted(steps[-1].glob("*.whole.png"), key=_number) if steps else ():
        files = [steps[place] / newest.name for place in places]
        steps_drawn = [(f"step {int(file.parent.name):,}", _read(file)) for file in files if file.exists()]
        rows = [(step, figure) for step, figure in steps_drawn if figure]
        objects = _read(newest.with_name(newest.name.replace(".whole.", ".objects.")))
        if rows:
            name = newest.name.partition("_")[2].removesuffix(".whole.png")
            evolutions.append(Evolution(name, rows, objects))
    return evolutions


def _number(figure: Path) -> int:
    """Of its image; what is named otherwise comes first."""
    number = figure.name.partition("_")[0]
    return int(number) if number.isdecimal() else 0


def drop_later_steps(folder: Path, step: int) -> None:
    """Remove what an earlier run left of steps after ``step``."""
    for path in folder.glob("*"):
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)


def whole_figure(maps: MethodMaps, step: int) -> Figure:
    """One row: the panels of the whole image. Where boxes overlap, the largest value is drawn."""
    window = (0, 0, maps.image.shape[1], maps.image.shape[0])
    width, height = _size(window, SIDE)
    columns = [(*title, max(width, OBJECT_SIDE)) for title in TITLES.items()]
    figure, axes = _titled_grid(maps, step, columns, [height])
    _show_panels(axes[0], maps, drawing.colours(range(len(maps.boxes))), maps.classes, window)
    return figure


def object_figure(maps: MethodMaps, step: int) -> Figure:
    """One row for each of the largest objects: its own panels, and its positive masks with their weights."""
    chosen = np.argsort(-(maps.boxes[:, 2:] - maps.boxes[:, :2]).prod(1), kind="stable")[:OBJECTS]
    windows = [_window(maps, index) for index in chosen]
    columns = [(*title, OBJECT_SIDE) for title in TITLES.items()]
    columns.insert(2, (*POSITIVE_MASKS, max(POSITIVE_WIDTH, MASK_CELL * _per_line(maps))))
    heights = [2 * (_size(window, MASK_SIDE)[1] + SMALL_LINE) for window in windows]
    figure, axes = _titled_grid(maps, step, columns, heights, LINE)
    for row, index, window in zip(axes, chosen, windows, strict=True):
        own, (colour,) = maps.only(index), drawing.colours([index])
        drawing.write_above(row[0], _caption(own), bbox={"facecolor": colour, "edgecolor": "none", "pad": 2})
        _show_panels(np.delete(row, 2), own, [colour], [""], window)
        _show_positives(row[2], own, window)
    return figure


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


def _show_panels(
    row: np.ndarray, maps: MethodMaps, colours: Sequence[str], names: Iterable[str], window: Window
) -> None:
    """The six panels of ``TITLES``; names stand on the first."""
    named = [*map(drawing.Shape, colours, names, maps.boxes.tolist())]
    boxes = [replace(shape, text="") for shape in named]
    masks = [drawing.Shape(colour, mask=mask) for colour, mask in zip(colours, maps.student, strict=True)]
    pale = 255 * PALENESS + (1 - PALENESS) * maps.image.mean(-1)
    _show(row[0], maps.image, named, window)
    heats = (heat_cells(values) for values in (maps.semantic, maps.instance, maps.blend))
    for axes, cells in zip(row[1:5], (*heats, label_cells(maps.labels, colours)), strict=True):
        _show(axes, pale, boxes, window)
        height, width = cells.shape[:2]
        axes.imshow(cells, extent=(0, STRIDE * width, STRIDE * height, 0), interpolation="nearest")
    _show(row[5], maps.image, masks, window)


def _show(axes: Axes, image: np.ndarray, shapes: Sequence[drawing.Shape], window: Window) -> None:
    """A part of an image (H, W) or (H, W, 3), 0 to 255, with shapes."""
    height, width = image.shape[:2]
    axes.imshow(image, "gray", vmin=0, vmax=255, extent=(0, width, height, 0), interpolation="bicubic")
    axes.set(xlim=window[::2], ylim=window[:0:-2])
    drawing.draw_shapes(axes, shapes)


def _show_positives(axes: Axes, own: MethodMaps, window: Window) -> None:
    """The positive masks of a single object in two lines, under each its source and its weight."""
    left, top, right, bottom = (math.ceil(edge / STRIDE) for edge in window)
    width, height = _size(window, MASK_SIDE)
    for place in np.flatnonzero(own.weights[0]).tolist():
        line, column = divmod(place, _per_line(own))
        x, y = column * MASK_CELL, line * (height + SMALL_LINE)
        cells = heat_cells(own.positives[:, place])[top:bottom, left:right]
        axes.imshow(cells, extent=(x, x + width, y + height, y), interpolation="nearest")
        label = f"{own.sources[place]}  {own.weights[0, place]:.2f}"
        axes.text(x, y + height + 3, label, size=SMALL, va="top")
    frame = axes.get_window_extent()
    axes.set(xlim=(0, frame.width), ylim=(frame.height, 0))


def _per_line(maps: MethodMaps) -> int:
    """How many positive masks stand in each of the two lines."""
    return math.ceil(len(maps.sources) / 2)


def _window(maps: MethodMaps, index: int) -> Window:
    """The surroundings of an object, xyxy in pixels of the image."""
    height, width = maps.image.shape[:2]
    extent = mask_extents(torch.from_numpy(maps.labels[index] != OUTSIDE)).numpy()
    return tuple(np.clip(STRIDE * (extent + MARGIN * np.array([-1, -1, 1, 1])), 0, 2 * [width, height]))


def _size(window: Sequence[int], side: int) -> tuple[int, int]:
    """Width and height of a window whose longer side becomes ``side``."""
    width, height = window[2] - window[0], window[3] - window[1]
    return round(side * width / max(width, height)), round(side * height / max(width, height))


def _caption(own: MethodMaps) -> str:
    labels = own.labels[own.labels != OUTSIDE]
    positive, ignored = ((labels == value).mean() for value in (1, IGNORED))
    shares = f"{positive:.0%} of the box positive, {ignored:.0%} ignored"
    return f"{own.classes[0]}: positive from M = {own.thresholds[0]:.2f} on; {shares}"


def _titled_grid(
    maps: MethodMaps, step: int, columns: Sequence[tuple[str, str, int]], heights: list[int], above: int = 0
) -> tuple[Figure, np.ndarray]:
    """A grid of panels, below file, step and legend.

    Args:
        maps: the image.
        step: after how many steps.
        columns: title, note below it and width of each.
        heights: of the rows.
        above: room for a caption above each row.
    """
    figure, axes = drawing.panel_grid([width for *_, width in columns], heights, GAP, above, HEADER)
    width, height = figure.bbox.size
    name = Path(maps.name).name
    shown = name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}"
    style: dict[str, Any] = {"size": 14, "weight": "bold", "va": "top", "parse_math": False}
    figure.text(GAP / width, 1 - 8 / height, f"{shown}, step {step:,}", **style)
    for each, (title, note, _) in zip(axes[0], columns, strict=True):
        drawing.write_above(each, title, above + SMALL_LINE, weight="bold", parse_math=True)
        drawing.write_above(each, note, above, SMALL, color=drawing.SOFT, parse_math=True)
    _draw_legend(figure, drawing.colours(range(min(OBJECTS, len(maps.boxes)))))
    return figure, axes


def _draw_legend(figure: Figure, colours: Sequence[str]) -> None:
    """On the right: the scale of probabilities and the colours of labels, each before its text."""
    texts = "positive (the object's colour)", "ignored", "negative"
    positive = tuple(Patch(color=colour) for colour in colours)
    patches: list[Any] = [positive, Patch(color=IGNORED_COLOUR), Patch(color=NEGATIVE_COLOUR)]
    style: dict[str, Any] = {"loc": "upper right", "ncols": 3, "frameon": False, "fontsize": SMALL}
    style |= {"handlelength": 1.2, "handleheight": 1, "handler_map": {tuple: HandlerTuple(None, pad=0)}}
    figure.legend(patches, texts, **style)
    width, height = figure.bbox.size
    bar = figure.add_axes((1 - 580 / width, 1 - 21 / height, 90 / width, 11 / height))
    bar.set(xticks=(), yticks=(), frame_on=False)
    bar.imshow([np.linspace(0, 1, 256)], HEAT, aspect="auto")
    bar.text(1.05, 0.5, "probability, 0 to 1", transform=bar.transAxes, size=SMALL, va="center_baseline")


def _read(file: Path) -> Image.Image | None:
    """A figure; None, and a note, where it cannot be decoded."""
    try:
        return Image.open(file).convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else first_line(error)
        print(f"note: {file}: cannot be decoded ({reason}), and was left out", file=sys.stderr)
        return None
