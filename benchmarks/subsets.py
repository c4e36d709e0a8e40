"""Where an ablation's rows differ on the hard subsets: precision and recall, with the classes and without.

    python benchmarks/subsets.py output/ablation_shapes

scores the detections of every run on the images of each tag, once as they are and once with all classes
taken for one, so that mistakes of the class and of the mask come apart. Prints a table and writes
benchmarks/results/ablation_subsets.json.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sim_m2f.config import get_cfg
from sim_m2f.data.catalog import data_sources
from sim_m2f.engine.evaluator import RESULTS_FILE

ROOT = Path(__file__).resolve().parents[1]
AP, RECALL = 0, 8  # places in COCOeval.stats: AP, and AR with 100 detections per image


def load(annotations: Path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(annotations))


def tagged(truth: COCO) -> dict[str, list[int]]:
    """The ids of the images with each tag."""
    images = truth.dataset["images"]
    tags = sorted({tag for image in images for tag in image["tags"]})
    return {tag: [image["id"] for image in images if tag in image["tags"]] for tag in tags}


def mask_scores(truth: COCO, results: Path, images: list[int], classes: bool) -> tuple[float, float]:
    """AP and AR of the masks on some images, in percent."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(str(results)), "segm")
        evaluation.params.imgIds = images
        evaluation.params.useCats = int(classes)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return 100 * evaluation.stats[AP], 100 * evaluation.stats[RECALL]


def compare(ablation: Path) -> Iterator[dict[str, Any]]:
    """One entry per tag and row: the means over its seeds."""
    configs = sorted(ablation.glob("*/seed*/config.yaml"))
    cfg = get_cfg()
    cfg.merge_from_file(configs[0])
    (source,) = data_sources(cfg, "TEST")
    truth = load(source.annotations)
    rows = sorted({config.parents[1] for config in configs})
    for tag, images in tagged(truth).items():
        for row in rows:
            files = sorted(row.glob(f"seed*/{RESULTS_FILE}"))
            entry: dict[str, Any] = {"tag": tag, "images": len(images), "row": row.name}
            for name, classes in (("", True), (", classes ignored", False)):
                scores = [mask_scores(truth, file, images, classes) for file in files]
                for metric, values in zip(("AP", "AR"), zip(*scores, strict=True), strict=True):
                    entry[f"segm/{metric}{name}"] = round(fmean(values), 2)
            yield entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ablation", type=Path, help="folder of a finished ablation")
    entries = list(compare(parser.parse_args().ablation))
    print("| " + " | ".join(entries[0]) + " |\n" + "|---" * len(entries[0]) + "|")
    for entry in entries:
        print("| " + " | ".join(map(str, entry.values())) + " |")
    (ROOT / "benchmarks/results/ablation_subsets.json").write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
