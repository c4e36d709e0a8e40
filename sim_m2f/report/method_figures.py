"""Draws how SIM gets from boxes to pseudo masks: from left to right what the poster of the paper shows.

Two figures for an image: the whole of it, and its largest objects one by one with their positive masks.
"""

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from sim_m2f.engine.method_maps import OUTSIDE, MethodMaps
from sim_m2f.files import atomic_write
from sim_m2f.report.drawing import INK, PALETTE, PAPER, Shape, draw, text_font
from sim_m2f.report.page import Evolution
from sim_m2f.supervision.pseudo_masks import IGNORED
from sim_m2f.supervision.targets import STRIDE

FOLDER = "method"  # in OUTPUT_DIR; below it one folder per step
OBJECTS = 3  # objects of an image, the largest, that are drawn one by one
SIDE, OBJECT_SIDE, MASK_SIDE = 230, 156, 64  # longer sides of panels: image, object, positive mask
MARGIN = 2  # cells at stride 4 that are shown around an object's box
GAP, LINE = 8, 17
SOFT, NEGATIVE_COLOUR, IGNORED_COLOUR = "#667078", "#2b2350", "#d3d7db"
PALENESS = 0.7  # of the image outside the boxes
HEAT = (255 * matplotlib.colormaps["viridis"](np.linspace(0, 1, 256))[:, :3]).round().astype(np.uint8)
TITLES = {
    "boxes": "all that is annotated",
    "semantic mask M_S": "prototypes of the class",
    "instance mask M_I": "weighted positive masks",
    "blend M": "α M_S + (1 − α) M_I",
    "pseudo labels": "M against two thresholds",
    "student": "the masks learned so far",
}
POSITIVE_MASKS = ("positive masks of the teacher, and their weights", "their weighted mean is M_I")


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
            with atomic_write(folder / f"{step:07d}" / f"{name}.{kind}.png", "wb") as file:
                figure.save(file, "PNG")
            yield f"{name}/{kind}", figure


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
    """Remove what a former run left of steps after ``step``."""
    for path in folder.glob("*"):
        if path.name.isdecimal() and int(path.name) > step:
            shutil.rmtree(path)


def whole_figure(maps: MethodMaps, step: int) -> Image.Image:
    """One row: the panels of the whole image. Where boxes overlap, the largest value is drawn."""
    colours = object_colours(maps)
    row = panels(maps, colours, maps.classes, SIDE)
    return _sheet(_header(maps, step), list(TITLES.items()), [("", INK, row)], colours)


def object_figure(maps: MethodMaps, step: int) -> Image.Image:
    """One row for each of the largest objects: its own panels, and its positive masks with their weights."""
    colours = object_colours(maps)
    sides = maps.boxes[:, 2:] - maps.boxes[:, :2]
    rows = []
    for index in np.argsort(-sides.prod(1), kind="stable")[:OBJECTS]:
        own = cut_out(maps, int(index))
        row = panels(own, [colours[index]], [""], OBJECT_SIDE)
        row.insert(2, positive_panel(own))
        rows.append((_caption(own), colours[index], row))
    titles = list(TITLES.items())
    titles.insert(2, POSITIVE_MASKS)
    return _sheet(_header(maps, step), titles, rows, colours)


def object_colours(maps: MethodMaps) -> list[str]:
    """The colour of each object."""
    return [PALETTE[index % len(PALETTE)] for index in range(len(maps.boxes))]


def panels(maps: MethodMaps, colours: Sequence[str], names: Sequence[str], side: int) -> list[Image.Image]:
    """The six panels of ``TITLES``, ``side`` pixels on the longer side; names stand on the first."""
    boxes = [Shape(colour, box=box) for colour, box in zip(colours, maps.boxes.tolist(), strict=True)]
    named = [replace(shape, text=name) for shape, name in zip(boxes, names, strict=True)]
    masks = [Shape(colour, mask=mask) for colour, mask in zip(colours, maps.student, strict=True)]
    heats = [heat_image(maps.image, each) for each in (maps.semantic, maps.instance, maps.blend)]
    labels = label_image(maps.image, maps.labels, colours)
    image = Image.fromarray(maps.image)
    return [
        draw(image, named, side),
        *(draw(Image.fromarray(pixels), boxes, side) for pixels in (*heats, labels)),
        draw(image, masks, side),
    ]


def heat_image(image: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: in colour the largest of the probabilities (T, h, w), else the image, pale."""
    value = np.fmax.reduce(maps)
    heat = HEAT[np.nan_to_num(255 * value).round().astype(np.uint8)]
    return _over_pale(image, heat, ~np.isnan(value))


def label_image(image: np.ndarray, labels: np.ndarray, colours: Sequence[str]) -> np.ndarray:
    """(H, W, 3) uint8: labels (T, h, w); positive, in the object's colour, hides ignored hides negative."""
    cells = np.zeros((*labels.shape[1:], 3), np.uint8)
    cells[(labels == 0).any(0)] = _rgb(NEGATIVE_COLOUR)
    cells[(labels == IGNORED).any(0)] = _rgb(IGNORED_COLOUR)
    for own, colour in zip(labels, colours, strict=True):
        cells[own == 1] = _rgb(colour)
    return _over_pale(image, cells, (labels != OUTSIDE).any(0))


def positive_panel(maps: MethodMaps) -> Image.Image:
    """The positive masks of a single object in two lines, under each its source and its weight."""
    kept = [place for place, weight in enumerate(maps.weights[:, 0]) if weight > 0]
    columns = -(-len(kept) // 2)
    masks = [
        draw(Image.fromarray(heat_image(maps.image, maps.positives[place])), [], MASK_SIDE) for place in kept
    ]
    cell = MASK_SIDE + GAP, masks[0].height + LINE
    panel = Image.new("RGB", (columns * cell[0] - GAP, cell[1] * (1 + (len(kept) > 1))), PAPER)
    pen = ImageDraw.Draw(panel)
    for number, (place, mask) in enumerate(zip(kept, masks, strict=True)):
        left, top = number % columns * cell[0], number // columns * cell[1]
        panel.paste(mask, (left, top))
        text = f"{maps.sources[place]}  {maps.weights[place, 0]:.2f}"
        pen.text((left, top + mask.height + LINE / 2), text, INK, text_font(11), anchor="lm")
    return panel


def cut_out(maps: MethodMaps, index: int) -> MethodMaps:
    """The surroundings of one object, with its own maps alone."""
    height, width = maps.labels.shape[1:]
    rows, columns = (np.flatnonzero((maps.labels[index] != OUTSIDE).any(axis)) for axis in (1, 0))
    top, left = max(rows[0] - MARGIN, 0), max(columns[0] - MARGIN, 0)
    cells = slice(top, min(rows[-1] + 1 + MARGIN, height)), slice(left, min(columns[-1] + 1 + MARGIN, width))
    pixels = tuple(slice(STRIDE * part.start, STRIDE * part.stop) for part in cells)
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


def _header(maps: MethodMaps, step: int) -> str:
    name = Path(maps.name).name
    shown = name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}"
    return f"{shown}, step {step:,}"


def _caption(own: MethodMaps) -> str:
    labels = own.labels[own.labels != OUTSIDE]
    positive, ignored = ((labels == value).mean() for value in (1, IGNORED))
    return (
        f"{own.classes[0]}: positive from M = {own.thresholds[0]:.2f} on; "
        f"{positive:.0%} of the box positive, {ignored:.0%} ignored"
    )


def _over_pale(image: np.ndarray, cells: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """The cells (h, w, 3) where they are to be shown, else the pale image (H, W, 3) in grey."""
    height, width = image.shape[:2]
    grey = image.mean(-1, keepdims=True).repeat(3, axis=-1)
    pale = (PALENESS * 255 + (1 - PALENESS) * grey).round().astype(np.uint8)
    cells, shown = (
        part.repeat(STRIDE, axis=0).repeat(STRIDE, axis=1)[:height, :width] for part in (cells, shown)
    )
    return np.where(shown[..., None], cells, pale)


def _sheet(
    header: str,
    titles: Sequence[tuple[str, str]],
    rows: Sequence[tuple[str, str, Sequence[Image.Image]]],
    colours: Sequence[str],
) -> Image.Image:
    """Header and legend, the columns' titles, and rows of panels, each with a caption in a colour."""
    bold, plain = text_font(13, "bold"), text_font(11)
    widths = [
        max(*(panel.width for panel in column), round(bold.getlength(title)), round(plain.getlength(note)))
        for (title, note), column in zip(titles, zip(*(row for _, _, row in rows), strict=True), strict=True)
    ]
    lefts = [2 * GAP + sum(widths[:column]) + 2 * GAP * column for column in range(len(widths))]
    captions = [LINE if caption else 0 for caption, _, _ in rows]
    heights = [max(panel.height for panel in row) for _, _, row in rows]
    top = 2 * GAP + 4 * LINE
    size = lefts[-1] + widths[-1] + 2 * GAP, top + sum(captions) + sum(heights) + 2 * GAP * len(rows)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((2 * GAP, GAP), header, INK, text_font(14, "bold"))
    _draw_legend(pen, size[0] - 2 * GAP, GAP, colours)
    for left, (title, note) in zip(lefts, titles, strict=True):
        _write(pen, (left, top - 2.4 * LINE), title, INK, 13, "bold")
        _write(pen, (left, top - 1.3 * LINE), note, SOFT, 11)
    for (caption, colour, row), height, above in zip(rows, heights, captions, strict=True):
        if caption:
            pen.rectangle((2 * GAP, top + 3, 2 * GAP + 9, top + 12), fill=colour, outline=INK)
            pen.text((4 * GAP, top), caption, INK, text_font(12))
        for left, panel in zip(lefts, row, strict=True):
            sheet.paste(panel, (left, top + above))
        top += above + height + 2 * GAP
    return sheet


def _draw_legend(pen: ImageDraw.ImageDraw, right: float, top: float, colours: Sequence[str]) -> None:
    """Right-aligned: the scale of probabilities and the colours of labels, each before its text."""
    font = text_font(11)
    entries = [
        ([tuple(colour) for colour in HEAT[::3]], 1, "probability, 0 to 1"),
        (list(dict.fromkeys(colours))[:OBJECTS], 4, "positive (the object's colour)"),
        ([IGNORED_COLOUR], 12, "ignored"),
        ([NEGATIVE_COLOUR], 12, "negative"),
    ]
    left = right + 2 * GAP
    left -= sum(len(fills) * width + pen.textlength(text, font) + 3 * GAP for fills, width, text in entries)
    for fills, width, text in entries:
        for fill in fills:
            pen.rectangle((left, top + 3, left + width - 1, top + 14), fill)
            left += width
        pen.text((left + GAP, top + LINE / 2), text, INK, font, anchor="lm")
        left += pen.textlength(text, font) + 3 * GAP


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    colour: str,
    size: int,
    weight: str = "normal",
) -> None:
    """Text in which the letter after an underscore is set lower and smaller."""
    left, top = place
    for part in re.split(r"(_\w)", text):
        low = part.startswith("_")
        font = text_font(round(0.75 * size) if low else size, weight)
        pen.text((left, top + (0.4 * size if low else 0)), part.lstrip("_"), colour, font)
        left += pen.textlength(part.lstrip("_"), font)


def _rgb(colour: str) -> list[int]:
    return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]


def _read(file: Path) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")
