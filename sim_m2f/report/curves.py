"""Draws a run's losses and average precision over its steps, from OUTPUT_DIR/metrics.jsonl."""

import math
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sim_m2f.engine.logging import Series
from sim_m2f.report.drawing import rendered

PRECISION = {
    "segm/AP": ("masks", "#2f7fd6", "o-"),
    "bbox/AP": ("boxes", "#e08a1e", "o-"),
    "boxfill/AP": ("box fill", "#8a94a0", "o--"),
}
LOSS_COLOUR = "#2f7fd6"
SMOOTHED_PART = 1 / 25  # of the logged steps, over which the bold line is a mean
COLUMNS = 3
WIDTH, HEIGHT = 4, 2.7  # of a panel with its margins, inches
LEFT, RIGHT, TOP, BOTTOM, STEP = 0.55, 0.3, 0.4, 0.35, 0.25  # margins of a panel, and the word below all
STYLE = Path(__file__).with_name("curves.mplstyle")


def draw_curves(series: Series) -> Image.Image | None:
    """One panel for average precision and one per loss.

    In a loss panel the faint line is what was logged, the bold one its running mean. None when the series
    hold neither average precision nor a loss.
    """
    shown = ("total_loss", "mask_fill", "mask_solidity")
    losses = {key: series[key] for key in series if key in shown or key.startswith("loss_")}
    precision = {key: series[key] for key in PRECISION if key in series}
    panels = bool(precision) + len(losses)
    if not panels:
        return None
    rows, columns = math.ceil(panels / COLUMNS), min(COLUMNS, panels)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + STEP))
        axes = iter(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        _set_margins(figure, rows, columns)
        for each in figure.axes:
            each.tick_params(labelbottom=True)
            each.locator_params(axis="x", nbins=5)  # steps of six digits have room
        if precision:
            _draw_precision(next(axes), precision)
        for name, values in losses.items():
            _draw_loss(next(axes), name, values)
        for unused in axes:
            unused.remove()
        figure.supxlabel("step", y=0.08 / figure.get_figheight(), va="bottom", fontsize=9)
        return rendered(figure)


def _set_margins(figure: Figure, rows: int, columns: int) -> None:
    """Fixed ones: matplotlib's layouts that fit them draw every panel several times over."""
    width, height = figure.get_size_inches()
    inner = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - RIGHT / width,
        bottom=(BOTTOM + STEP) / height,
        top=1 - TOP / height,
        wspace=(LEFT + RIGHT) / inner[0],
        hspace=(TOP + BOTTOM) / inner[1],
    )


def _draw_precision(axes: Axes, series: Series) -> None:
    for key, values in series.items():
        name, colour, style = PRECISION[key]
        label = f"{name} {[*values.values()][-1]:.1f}"
        axes.plot([*values], [*values.values()], style, color=colour, markersize=4, linewidth=2, label=label)
    axes.set(title="average precision, %", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_loss(axes: Axes, name: str, values: dict[int, float]) -> None:
    steps, logged = [*values], [*values.values()]
    axes.plot(steps, logged, color=LOSS_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(logged), color=LOSS_COLOUR, linewidth=2)
    axes.set(title=name, ylim=(0, 1.1 * float(np.percentile(logged, 99)) or 1))


def _running_mean(values: list[float]) -> np.ndarray:
    """Mean over a window centred on each value, cut at both ends."""
    window = np.ones(2 * int(len(values) * SMOOTHED_PART / 2) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
