"""How good a mask is likely to be: its expected IoU with the true one, from signs that need no truth."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.optimize import nnls

from sim_m2f.errors import UserError
from sim_m2f.files import read_json, write_file
from sim_m2f.labelling.masks import SIGNS
from sim_m2f.report.drawing import rendered

FILE = "quality.json"
FEWEST = 20  # objects that weights are fitted to
ERROR = 0.5  # a mask with a lower IoU is counted as wrong
BINS = 10  # of the reliability plot, with as many objects each


@dataclass(frozen=True)
class Quality:
    """The score of a mask, 0 to 1: a weighted sum of its ``SIGNS`` and 1, and what validation said of it.

    Attributes:
        weights: of the signs, and last the score of a mask without any.
        colors: whether masks corrected by colours were better.
        measured: on validation masks, by name; empty where there were none.
    """

    weights: Sequence[float] = (0.25, 0.25, 0.25, 0.25, 0.0)
    colors: bool = True
    measured: dict[str, float] = field(default_factory=dict)

    def score(self, signs: np.ndarray) -> np.ndarray:
        """(N,) scores of signs (N, 4); 0 for a mask that the network did not give."""
        scores = np.clip(signs @ np.array(self.weights[:-1]) + self.weights[-1], 0, 1)
        return np.where(signs.any(1), scores, 0.0)


def fitted(signs: np.ndarray, ious: np.ndarray) -> list[float]:
    """Weights, none negative, whose scores come nearest to the IoU (N,) of masks with signs (N, 4).

    Those of ``Quality`` where the objects are too few to tell.
    """
    if len(ious) < FEWEST:
        return list(Quality().weights)
    weights, _ = nnls(np.column_stack([signs, np.ones(len(signs))]), ious)
    return [float(weight) for weight in weights]


def held_back_scores(signs: np.ndarray, ious: np.ndarray, images: np.ndarray) -> np.ndarray:
    """(N,) scores by weights from the other half of the images; ``images`` (N,) numbers them from 0."""
    scores = np.zeros(len(ious))
    for half in (0, 1):
        held = images % 2 == half
        known = held if held.all() or not held.any() else ~held
        scores[held] = Quality(fitted(signs[known], ious[known])).score(signs[held])
    return scores


def summary(scores: np.ndarray, ious: np.ndarray) -> dict[str, float]:
    """Mean IoU, and the share of errors (IoU below 0.5) in the worst tenth by score and in the rest: %."""
    order = np.argsort(scores, kind="stable")
    tenth = max(1, len(order) // 10)
    wrong = 100 * (ious[order] < ERROR)
    rest = wrong[tenth:] if len(wrong) > tenth else wrong
    return {
        "objects": len(ious),
        "mIoU": 100 * float(ious.mean()),
        "errors of the worst tenth": float(wrong[:tenth].mean()),
        "errors of the rest": float(rest.mean()),
    }


def reliability(scores: np.ndarray, ious: np.ndarray) -> Image.Image:
    """A plot of mean IoU over mean score, of objects in groups of like scores."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#8a94a0", linewidth=1)
    axes.plot(scores, ious, ".", color="#2f7fd6", alpha=0.3, label="an object")
    groups = [group for group in np.array_split(np.argsort(scores), BINS) if len(group)]
    means = [(scores[group].mean(), ious[group].mean()) for group in groups]
    axes.plot(*zip(*means, strict=True), "o-", color="#e08a1e", label="a tenth of the objects")
    axes.set(xlabel="score (held-back images)", ylabel="IoU with the true mask", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    return rendered(figure)


def write_quality(folder: Path, quality: Quality) -> None:
    write_file(folder / FILE, json.dumps(asdict(quality), indent=1))


def read_quality(folder: Path, colors: bool) -> Quality:
    """What a calibration left in a network's folder; the mean of the signs, and ``colors``, without one.

    Raises:
        UserError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return Quality(colors=colors)
    try:
        quality = Quality(**read_json(folder / FILE))
        weights = [float(weight) for weight in quality.weights]
        if len(weights) != len(SIGNS) + 1 or not np.isfinite(weights).all():
            raise ValueError(f"its weights are not {len(SIGNS) + 1} finite numbers")
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / FILE}: is damaged ({error}); remove it") from error
    return quality
