"""Whether faster-coco-eval gives what pycocotools gives, to the last bit, and how much faster it is.

    pip install faster-coco-eval
    python benchmarks/coco_eval.py

scores the same detections with both on the shapes and on every set of real images that DETECTRON2_DATASETS
has: the annotated masks moved, widened and doubled, with wrong classes, equal scores and masks out of
nowhere. Writes benchmarks/results/coco_eval.json.
"""

import contextlib
import copy
import io
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCOeval_faster
from hardware import describe
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from sim_m2f.data.segmentation import encode_masks
from sim_m2f.data.shapes import cached_shapes
from sim_m2f.engine import coco_metrics

OUTPUT = Path(__file__).parent / "results/coco_eval.json"
REAL_SETS = {
    "coco": "coco/annotations/instances_val2017.json",
    "coco_more": "coco_more/annotations/val.json",
    "nuclei": "nuclei/annotations/val.json",
    "pennfudan": "pennfudan/annotations/val.json",
}
COPIES = (1, 5)  # detections per annotated object; with 5 the images of the nuclei have more than 100


def annotation_files() -> dict[str, Path]:
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    real = {name: root / file for name, file in REAL_SETS.items() if (root / file).exists()}
    return {"shapes": cached_shapes() / "annotations/val.json", **real}


def detections(truth: COCO, copies: int) -> Iterator[dict[str, Any]]:
    """The annotated masks changed, and one mask out of nowhere in every image, in COCO's results format."""
    rng, known = np.random.default_rng(copies), list(truth.cats)
    for image_id, image in truth.imgs.items():
        masks, classes = (
            [np.zeros((image["height"], image["width"]), bool)],
            [int(rng.choice(list(truth.cats)))],
        )
        for annotation in truth.imgToAnns[image_id] * copies:
            moved = ndimage.shift(truth.annToMask(annotation), rng.integers(-4, 5, 2), order=0)
            masks.append(ndimage.binary_dilation(moved, iterations=int(rng.integers(1, 4))))
            right = rng.random() < 0.9
            classes.append(annotation["category_id"] if right else int(rng.choice(known)))
        y, x = rng.integers(0, masks[0].shape)
        masks[0][y:, x:] = True
        scores = rng.random(len(masks)).round(int(rng.integers(1, 9)))  # some are equal
        for category_id, score, rle in zip(classes, scores, encode_masks(np.stack(masks)), strict=True):
            entry = {"image_id": image_id, "category_id": category_id, "score": float(score)}
            yield {**entry, "segmentation": rle, "bbox": mask_utils.toBbox(rle).tolist()}


def evaluated(engine: type, truth: COCO, results: list[dict[str, Any]], kind: str) -> tuple[Any, float]:
    """The evaluation and its seconds, on copies because it writes into what it is given."""
    truth, results = copy.deepcopy((truth, results))
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = engine(truth, truth.loadRes(results), kind)
        begun = time.perf_counter()
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation, time.perf_counter() - begun


def compare(truth: COCO, results: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    reference, seconds = evaluated(COCOeval, truth, results, kind)
    fast, fast_seconds = evaluated(COCOeval_faster, truth, results, kind)
    difference = {
        name: float(np.abs(reference.eval[name] - fast.eval[name]).max())
        for name in ("precision", "recall", "scores")
    }
    difference["stats"] = float(np.abs(np.subtract(reference.stats, list(fast.stats)[:12])).max())
    return {
        "kind": kind,
        "detections": len(results),
        "largest_difference": difference,
        "equal": not any(difference.values()),
        "seconds_pycocotools": round(seconds, 3),
        "seconds_faster_coco_eval": round(fast_seconds, 3),
    }


def main() -> None:
    rows = []
    for name, file in annotation_files().items():
        truth = coco_metrics.load_truth(file)
        for copies in COPIES:
            results = list(detections(truth, copies))
            for kind in ("segm", "bbox"):
                rows.append({"set": name, "copies": copies, **compare(truth, results, kind)})
                print(rows[-1])
    packages = {name: version(name) for name in ("pycocotools", "faster-coco-eval", "numpy")}
    OUTPUT.write_text(
        json.dumps({"hardware": describe(), "packages": packages, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
