"""Draws a run's losses and average precision over its steps, from OUTPUT_DIR/metrics.jsonl."""

import io
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sim_m2f.engine.logging import Series

PRECISION = {
    "segm/AP": ("masks", "#2f7fd6"),
    "bbox/AP": ("boxes", "#e08a1e"),
    "boxfill/AP": ("box fill", "#8a94a0"),
}
LOSS_COLOUR = "#2f7fd6"
SMOOTHED_PART = 1 / 25  # of the logged steps, over which the bold line is a mean
COLUMNS = 3


def draw_curves(series: Series, dark: bool = False) -> bytes | None:
    """A PNG with one panel for average precision and one per loss; None when the series hold neither.

    In a loss panel the faint line is what was logged, the bold one its running mean.
    """
    losses = [key for key in series if key == "total_loss" or key.startswith("loss_")]
    precision = {key: series[key] for key in PRECISION if key in series}
    panels = bool(precision) + len(losses)
    if not panels:
        return None
    rows, columns = math.ceil(panels / COLUMNS), min(COLUMNS, panels)
    with matplotlib.rc_context({**_STYLE, **(_DARK if dark else {})}):
        figure = Figure(figsize=(4 * columns, 2.7 * rows), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # inches
        axes = iter(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        if precision:
            _draw_precision(next(axes), precision)
        for name in losses:
            _draw_loss(next(axes), name, series[name])
        for unused in axes:
            unused.set_axis_off()
        figure.supxlabel("step", fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_precision(axes: Axes, series: Series) -> None:
    for key, values in series.items():
        name, colour = PRECISION[key]
        steps, precision = list(values), list(values.values())
        style = "o--" if key == "boxfill/AP" else "o-"
        label = f"{name} {precision[-1]:.1f}"
        axes.plot(steps, precision, style, color=colour, markersize=4, linewidth=2, label=label)
    axes.set_title("average precision, %")
    axes.set_ylim(bottom=0)
    axes.tick_params(labelbottom=True)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_loss(axes: Axes, name: str, values: dict[int, float]) -> None:
    steps, logged = list(values), list(values.values())
    axes.plot(steps, logged, color=LOSS_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(logged), color=LOSS_COLOUR, linewidth=2)
    axes.set_title(name)
    axes.set_ylim(0, 1.1 * float(np.percentile(logged, 99)) or 1)
    axes.tick_params(labelbottom=True)


def _running_mean(values: list[float]) -> np.ndarray:
    """Mean over a window centred on each value, cut at both ends."""
    reach = int(len(values) * SMOOTHED_PART / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(centre - reach, 0), np.minimum(centre + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#8a94a0",
    "grid.color": "#8a94a0",
    "grid.alpha": 0.25,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.dpi": 150,
}
_DARK = {
    "figure.facecolor": "#15191d",
    "axes.facecolor": "#15191d",
    **dict.fromkeys(("text.color", "axes.titlecolor", "xtick.color", "ytick.color"), "#d8dee4"),
}
