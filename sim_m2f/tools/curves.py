"""Draws a run's losses and average precision over its steps, from OUTPUT_DIR/metrics.jsonl."""

import json
import math
import re
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PRECISION = {
    "segm/AP": ("masks", "#2f7fd6"),
    "bbox/AP": ("boxes", "#e08a1e"),
    "boxfill/AP": ("box fill", "#8a94a0"),
}
LOSS_COLOUR, LAYER_COLOUR = "#2f7fd6", "#8a94a0"
SMOOTHED_PART = 1 / 15  # of the logged steps, over which the bold line is a mean
COLUMNS = 3

Series = dict[str, dict[int, float]]


def read_series(metrics_file: Path) -> Series:
    """Every finite number of a metrics.jsonl, as {key: {iteration: value}} in the order of the iterations.

    Of an iteration that was logged twice the later value holds; a line that a killed process left unfinished
    is passed over.
    """
    series: Series = {}
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, value in record.items():
            if isinstance(value, (int, float)) and math.isfinite(value) and "iteration" in record:
                series.setdefault(key, {})[record["iteration"]] = value
    return {key: dict(sorted(values.items())) for key, values in series.items()}


def draw_curves(series: Series, dark: bool = False) -> Figure | None:
    """One panel for average precision and one per loss; None when the series hold neither.

    In a loss panel the faint line is what was logged, the bold one its running mean; thin grey lines are the
    running means of the same loss after the earlier decoder layers (``<name>_<layer>``).
    """
    losses = ["total_loss"] if "total_loss" in series else []
    losses += [key for key in series if key.startswith("loss_") and not _is_earlier_layer(key, series)]
    precision = [key for key in PRECISION if key in series]
    panels = bool(precision) + len(losses)
    if not panels:
        return None
    rows = math.ceil(panels / COLUMNS)
    with matplotlib.rc_context({**_STYLE, **(_DARK if dark else {})}):
        figure = Figure(figsize=(4 * min(COLUMNS, panels), 2.7 * rows), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # inches
        axes = iter(figure.subplots(rows, COLUMNS if rows > 1 else panels, squeeze=False).flat)
        if precision:
            _draw_precision(next(axes), {key: series[key] for key in precision})
        for name in losses:
            layers = [key for key in series if re.fullmatch(rf"{re.escape(name)}_\d+", key)]
            _draw_loss(next(axes), name, series[name], [series[key] for key in layers])
        for unused in axes:
            unused.set_axis_off()
        figure.supxlabel("step", fontsize=9)
    return figure


def _is_earlier_layer(key: str, series: Series) -> bool:
    name, _, layer = key.rpartition("_")
    return layer.isdigit() and name in series


def _draw_precision(axes: Axes, series: Series) -> None:
    for key, values in series.items():
        name, colour = PRECISION[key]
        steps, precision = list(values), list(values.values())
        style = "o--" if key == "boxfill/AP" else "o-"
        axes.plot(
            steps,
            precision,
            style,
            color=colour,
            markersize=4,
            linewidth=2,
            label=f"{name} {precision[-1]:.1f}",
        )
    axes.set_title("average precision, %")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="best")


def _draw_loss(axes: Axes, name: str, values: dict[int, float], layers: list[dict[int, float]]) -> None:
    for layer in layers:
        axes.plot(
            list(layer), _running_mean(list(layer.values())), color=LAYER_COLOUR, linewidth=0.7, alpha=0.6
        )
    steps, logged = list(values), list(values.values())
    axes.plot(steps, logged, color=LOSS_COLOUR, linewidth=0.8, alpha=0.35)
    axes.plot(steps, _running_mean(logged), color=LOSS_COLOUR, linewidth=2)
    axes.set_title(name)
    axes.set_ylim(0, 1.1 * float(np.percentile(logged, 99)) or 1)


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
