"""What an ablation found, from the files of its runs: tables (Markdown, CSV, JSON) and a plot of AP."""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import numpy as np
from jinja2 import Template
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from pycocotools.coco import COCO

from sim_m2f.engine import coco_metrics
from sim_m2f.engine.evaluator import RESULTS_FILE
from sim_m2f.engine.logging import read_series
from sim_m2f.files import atomic_write, write_file
from sim_m2f.report.drawing import rendered, write_png

SCORES = {"segm/AP": "AP", "segm/AP50": "AP50", "segm/AP75": "AP75", "boxfill/AP": "box fill AP"}
MASK_ROW = r"(\d+_)?mask"  # what the others are compared with
PLOT_FILE = "ap_over_steps.png"
# Okabe and Ito's colours, which the colour-blind can tell apart, with grey instead of the pale yellow.
COLOURS = ("#999999", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#cc79a7", "#d55e00", "#000000")
STYLES = cycler(linestyle=["-", "--", ":", "-."]) * (cycler(color=COLOURS) + cycler(marker=list("osD^vPX*")))
SOURCE = (Path(__file__).parent / "ablation.md.j2").read_text("utf-8")
TEMPLATE = Template(SOURCE, trim_blocks=True, keep_trailing_newline=True)


@dataclass(frozen=True)
class Row:
    """A row of the table: its name, what it is in a few words, and its YAML file of overrides."""

    name: str
    title: str
    file: Path


@dataclass(frozen=True)
class Result:
    """A finished run. AP in percent, NaN where the test set has no such object."""

    row: str
    seed: int
    steps: int
    minutes: float
    page: Path  # the run's report
    scores: dict[str, float]  # by the keys of SCORES
    tags: dict[str, float]  # mask AP on the images of each tag
    curve: dict[int, float]  # mask AP by the number of steps done

    def numbers(self) -> dict[str, float]:
        """Scores, scores on each tag's images, and minutes, by their headings in the tables."""
        scores = {SCORES[key]: value for key, value in self.scores.items()}
        tags = {f"AP {tag}": value for tag, value in self.tags.items()}
        return {**scores, **tags, "minutes": self.minutes}


Groups = Sequence[tuple[Row, Sequence[Result]]]  # rows with their results, of which there is at least one


def read_result(row: str, seed: int, folder: Path, minutes: float, truth: COCO) -> Result:
    """The result of the finished run in ``folder``; its detections are scored on each tag's images."""
    series = read_series(folder / "metrics.jsonl")
    last = max(series["bbox/AP"])
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    return Result(
        row=row,
        seed=seed,
        steps=last + 1,
        minutes=minutes,
        page=folder / "index.html",
        scores={key: series.get(key, {}).get(last, math.nan) for key in SCORES},
        tags=score_tags(truth, results),
        curve={iteration + 1: value for iteration, value in series.get("segm/AP", {}).items()},
    )


def score_tags(truth: COCO, results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mask AP in percent on the images of each tag (a list "tags" of an image in the JSON), by tag.

    Args:
        truth: the annotations, from ``coco_metrics.load_truth``, all with masks.
        results: the detections in COCO's results format.
    """
    tagged: dict[str, list[int]] = {}
    for image in truth.dataset["images"]:
        tags = image.get("tags")
        for tag in {str(tag) for tag in tags} if isinstance(tags, list) else ():
            tagged.setdefault(tag, []).append(image["id"])
    scores = {}
    for tag, ids in sorted(tagged.items()):
        images, annotations = truth.loadImgs(ids), truth.loadAnns(truth.getAnnIds(ids))
        of_tag = coco_metrics.index({**truth.dataset, "images": images, "annotations": annotations})
        found = [entry for entry in results if entry["image_id"] in of_tag.imgs]
        scores[tag] = coco_metrics.score(of_tag, found)["segm/AP"]
    return scores


def write_tables(
    folder: Path, command: str, rows: Sequence[Row], results: Sequence[Result], failures: Sequence[str]
) -> None:
    """Write ablation.md, ablation.csv, ablation.json and ap_over_steps.png into ``folder``.

    Args:
        folder: the ablation's folder.
        command: the command line that makes them.
        rows: all rows, in their order; those without a result yet are left out.
        results: the finished runs.
        failures: what went wrong, one line per run.
    """
    by_seed = sorted(results, key=lambda result: result.seed)
    groups = [(row, [result for result in by_seed if result.row == row.name]) for row in rows]
    groups = [(row, group) for row, group in groups if group]
    records = [_record(row, group) for row, group in groups]
    write_file(folder / "ablation.json", json.dumps(records, indent=2))
    with atomic_write(folder / "ablation.csv") as file:
        _write_csv(file, groups)
    if groups:
        write_png(folder / PLOT_FILE, rendered(draw_plot(groups)))
    write_file(folder / "ablation.md", _markdown(folder, command, groups, failures))


def draw_plot(groups: Groups) -> Figure:
    """Mask AP over the steps: a line for each row's mean over its seeds in a band from minimum to maximum."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="mask AP, %")
    axes.set_prop_cycle(STYLES)
    for row, group in groups:
        steps = sorted(set.intersection(*(set(result.curve) for result in group)))
        values = np.array([[result.curve[step] for step in steps] for result in group])
        label = f"{row.name}  {fmean(result.scores['segm/AP'] for result in group):.1f}"
        (line,) = axes.plot(steps, values.mean(0), markersize=5, label=label)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.18, lw=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("mean and range over the seeds", loc="left", fontsize=10)
    place: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "alignment": "left"}
    for text in figure.legend(title="row, AP at the end", **place).get_texts():
        text.set_parse_math(False)  # the name of a row may hold dollars
    return figure


def _headings(groups: Groups) -> list[str]:
    """The headings of all rows; minutes last."""
    names = dict.fromkeys(name for _, group in groups for name in group[0].numbers() if name != "minutes")
    return [*names, "minutes"]


def _values(group: Sequence[Result], heading: str) -> list[float]:
    """One number per seed; NaN for a row that was tested on images without a tag that others have."""
    return [result.numbers().get(heading, math.nan) for result in group]


def _record(row: Row, group: Sequence[Result]) -> dict[str, Any]:
    scores = {key: [_rounded(result.scores[key]) for result in group] for key in SCORES}
    tags = {tag: [_rounded(result.tags[tag]) for result in group] for tag in group[0].tags}
    return {
        "row": row.name,
        "seeds": [result.seed for result in group],
        "steps": group[0].steps,
        **scores,
        "segm/AP by tag": tags,
        "minutes": [_rounded(result.minutes) for result in group],
    }


def _write_csv(file: IO[str], groups: Groups) -> None:
    headings = _headings(groups)
    statistics: dict[str, Callable[..., float]] = {"mean": fmean, "min": min, "max": max}
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ["row", "seeds", "steps", *(f"{name} {kind}" for name in headings for kind in statistics)]
    )
    for row, group in groups:
        seeds = " ".join(str(result.seed) for result in group)
        values = [_values(group, name) for name in headings]
        cells = [_rounded(function(numbers)) for numbers in values for function in statistics.values()]
        writer.writerow([row.name, seeds, group[0].steps, *cells])


def _markdown(folder: Path, command: str, groups: Groups, failures: Sequence[str]) -> str:
    headings, table = _headings(groups), []
    masks = next((group for row, group in groups if re.fullmatch(MASK_ROW, row.name)), [])
    for row, group in groups:
        pages = [f"[{result.seed}]({os.path.relpath(result.page, folder)})" for result in group]
        cells = [_cell(_values(group, name)) for name in headings]
        shares = [_share(group, masks, key) for key in ("segm/AP", "segm/AP75")] if masks else []
        table.append([row.name, row.title, str(group[0].steps), *cells, *shares, " ".join(pages)])
    headings += ["AP / mask's", "AP75 / mask's"] if masks else []
    content = {"command": command, "headings": headings, "table": table, "failures": failures}
    return TEMPLATE.render(**content, plot=PLOT_FILE)


def _share(group: Sequence[Result], masks: Sequence[Result], key: str) -> str:
    """The mean score as a share of that of mask supervision."""
    mean, whole = (fmean(result.scores[key] for result in results) for results in (group, masks))
    return f"{mean / whole:.2f}" if whole > 0 and not math.isnan(mean) else "–"


def _cell(values: Sequence[float]) -> str:
    if any(math.isnan(value) for value in values):
        return "–"
    spread = f" ({min(values):.1f}..{max(values):.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)
