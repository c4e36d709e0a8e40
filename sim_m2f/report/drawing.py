"""Draws boxes and masks on images, and the contact sheet that sets them side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

PALETTE = (
    *("#ff5a5f", "#3fa9ff", "#ffd23f", "#4cdf7b", "#c08bff", "#ff9838"),
    *("#2ad9e0", "#ff79c9", "#b4ec3c", "#a8b4ff", "#e0a183", "#f2f2f2"),
)
INK, PAPER = "#1c2024", "#ffffff"
SCALE = 2  # everything is drawn this many times larger and then reduced, which smooths the edges
FILL_OPACITY, HALO_OPACITY = 0.35, 0.7  # of the tint in a mask; of the dark line around contours and boxes
LINE, HALO = 2 * SCALE, SCALE  # widths of a contour and of the dark line around it
TEXT_SIZE = 13
MIN_TEXT_EXTENT = 0.1  # a smaller shape, in units of the panel's longer side, has no text: it would be hidden
GAP, TITLE_SIZE = 6, 15  # of the contact sheet


@dataclass(frozen=True)
class Shape:
    """One object to draw; ``box`` (xyxy) and ``mask`` (H, W) bool are in pixels of the image."""

    colour: str
    text: str = ""
    box: Sequence[float] | None = None
    mask: np.ndarray | None = None


def draw(image: Image.Image, shapes: Sequence[Shape], side: int) -> Image.Image:
    """The image, enlarged or reduced to ``side`` pixels on its longer side, with the shapes on it.

    Masks are tinted and outlined, the largest first so that small ones stay visible; boxes are outlined.
    Texts are placed in the order of the shapes; one that has no room is left out.
    """
    zoom = SCALE * side / max(image.size)
    canvas = image.convert("RGB").resize(
        [max(SCALE, round(length * zoom)) for length in image.size], Image.Resampling.BICUBIC
    )
    masks = [(shape.mask, shape.colour) for shape in shapes if shape.mask is not None]
    for mask, colour in sorted(masks, key=lambda item: -np.count_nonzero(item[0])):
        _draw_mask(canvas, mask, colour)
    for shape in shapes:
        if shape.box is not None:
            _draw_box(canvas, [zoom * coordinate for coordinate in shape.box], shape.colour)
    _draw_texts(canvas, shapes, zoom)
    return canvas.reduce(SCALE)


def contact_sheet(titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Rows of panels under the titles of their columns, each with a caption; many rows stand in two blocks.

    Args:
        titles: one per column.
        rows: caption and panels of each row, as many panels as titles.
    """
    width = max(panel.width for _, panels in rows for panel in panels) + GAP
    half = len(rows) if len(rows) < 4 else (len(rows) + 1) // 2
    blocks = [_block(titles, rows[start : start + half], width) for start in range(0, len(rows), half)]
    margin = 3 * GAP
    size = (
        sum(block.width + margin for block in blocks) + margin,
        max(block.height for block in blocks) + 2 * margin,
    )
    sheet = Image.new("RGB", size, PAPER)
    for index, block in enumerate(blocks):
        sheet.paste(block, (margin + index * (blocks[0].width + margin), margin))
    return sheet


def _block(
    titles: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]], width: int
) -> Image.Image:
    line = 2 * TITLE_SIZE
    heights = [line + max(panel.height for panel in panels) for _, panels in rows]
    block = Image.new("RGB", (width * len(titles) - GAP, line + sum(heights)), PAPER)
    pen = ImageDraw.Draw(block)
    for column, title in enumerate(titles):
        pen.text((column * width, 0), title, INK, text_font(TITLE_SIZE, "bold"))
    top = line
    for (caption, panels), height in zip(rows, heights, strict=True):
        pen.text((0, top + line - GAP), caption, "#667078", text_font(TEXT_SIZE), anchor="ls")
        for column, panel in enumerate(panels):
            block.paste(panel, (column * width, top + line))
        top += height
    return block


def _draw_mask(canvas: Image.Image, mask: np.ndarray, colour: str) -> None:
    area = Image.fromarray(mask).convert("L").resize(canvas.size, Image.Resampling.BILINEAR)
    area = area.point(lambda value: 255 if value >= 128 else 0)
    found = area.getbbox()
    if found is None:
        return
    margin = LINE + HALO  # may reach beyond the image, so that contours also run along its edge
    corner = (found[0] - margin, found[1] - margin)
    area = area.crop((*corner, found[2] + margin, found[3] + margin))
    inside = area.filter(ImageFilter.BoxBlur(LINE)).point(lambda value: 255 if value == 255 else 0)
    around = area.filter(ImageFilter.BoxBlur(HALO)).point(lambda value: 255 if value > 0 else 0)
    contour, halo = ImageChops.subtract(area, inside), ImageChops.subtract(around, area)
    canvas.paste(colour, corner, area.point(lambda value: value * FILL_OPACITY))
    canvas.paste(INK, corner, halo.point(lambda value: value * HALO_OPACITY))
    canvas.paste(colour, corner, contour)


def _draw_box(canvas: Image.Image, box: Sequence[float], colour: str) -> None:
    pen = ImageDraw.Draw(canvas, "RGBA")
    left, top, right, bottom = box
    right, bottom = max(right, left + 2 * LINE), max(bottom, top + 2 * LINE)
    halo = (left - HALO, top - HALO, right + HALO, bottom + HALO)
    pen.rectangle(halo, outline=INK + f"{round(255 * HALO_OPACITY):02x}", width=HALO)
    pen.rectangle((left, top, right, bottom), outline=colour, width=LINE)


def _draw_texts(canvas: Image.Image, shapes: Sequence[Shape], zoom: float) -> None:
    pen = ImageDraw.Draw(canvas)
    font = text_font(TEXT_SIZE * SCALE)
    pad = 2 * SCALE
    taken: list[tuple[float, float, float, float]] = []
    for shape in shapes:
        left, top, right, bottom = (zoom * coordinate for coordinate in _extent(shape))
        if not shape.text or max(right - left, bottom - top) < MIN_TEXT_EXTENT * max(canvas.size):
            continue
        width, height = pen.textlength(shape.text, font) + 2 * pad, font.size + 2 * pad
        left = min(max(left, 0), canvas.width - width)
        for y in (top - height, bottom, top, bottom - height):
            label = (left, y, left + width, y + height)
            if (
                left >= 0
                and 0 <= y <= canvas.height - height
                and not any(_overlap(label, other) for other in taken)
            ):
                pen.rectangle(label, fill=shape.colour)
                pen.text((left + pad, y + height / 2), shape.text, INK, font, anchor="lm")
                taken.append(label)
                break


def _extent(shape: Shape) -> Sequence[float]:
    """The box of a shape, else the box around its mask; zeros for an empty mask."""
    if shape.box is not None:
        return shape.box
    if shape.mask is None or not shape.mask.any():
        return (0, 0, 0, 0)
    rows, columns = np.flatnonzero(shape.mask.any(1)), np.flatnonzero(shape.mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_font(size: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight)), size
    )
