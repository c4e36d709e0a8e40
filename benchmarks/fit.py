"""Runs `sim-m2f fit` on the boxes of a set with masks and compares its masks with the true ones.

    python benchmarks/fit.py pennfudan --weights ../shared/weights/mobilenetv2_100_imagenet.safetensors

Every segmentation is removed from the set's training annotations before `fit` sees them; all of them, those
that it holds back for validation too, get masks. Adds the set to benchmarks/results/fit.json: minutes, and
for fit's masks, filled boxes, ellipses and GrabCut the mean IoU and the AP (see label_quality.py).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from hardware import describe
from label_quality import Comparison, ellipse, filled, grabcut
from pycocotools import mask as coco_mask
from real import RESULTS
from tqdm import tqdm

from sim_m2f.config import get_cfg
from sim_m2f.config.shipped import find_config
from sim_m2f.data.catalog import DatasetSource, data_sources
from sim_m2f.data.coco import CocoData, read_coco
from sim_m2f.data.image import read_image

HALF = "[127.5, 127.5, 127.5]"  # of weights for pixels of -1 to 1


def without_masks(source: DatasetSource, path: Path) -> Path:
    """The annotations without their segmentations and areas, in a file."""
    content = json.loads(source.annotations.read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"], annotation["area"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def fit_minutes(boxes: Path, source: DatasetSource, output: Path, args: argparse.Namespace) -> float:
    """Run the command in a process of its own."""
    command = [sys.executable, "-m", "sim_m2f.cli", "fit", "--annotations", str(boxes), "--overwrite"]
    command += ["--images", str(source.image_root), "--output", str(output), "--minutes", str(args.minutes)]
    if args.weights:
        command += ["--weights", args.weights, "MODEL.PIXEL_MEAN", HALF, "MODEL.PIXEL_STD", HALF]
    start = time.perf_counter()
    subprocess.run(command, check=True)
    return (time.perf_counter() - start) / 60


def compared(truth: CocoData, masks: Path) -> list[dict]:
    """The table of all objects, by row."""
    comparison = Comparison(truth)
    made = {entry["id"]: entry["segmentation"] for entry in json.loads(masks.read_text())["annotations"]}
    for image in tqdm(truth.images, "compare", disable=None):
        if not len(image.labels):
            continue
        pixels = read_image(truth.image_root / image.file_name)
        for function in (filled, ellipse, grabcut):
            found = np.stack([function(pixels, box) for box in image.boxes])
            comparison.add(function.__name__, image, found)
        own = [coco_mask.decode(made[number]).astype(bool) for number in image.annotation_ids]
        comparison.add("fit", image, np.stack(own))
    return comparison.table()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="people, pennfudan, nuclei or coco_more")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--weights", default="", metavar="FILE", help="pretrained backbone, else timm's")
    parser.add_argument("--output", type=Path, default=Path("output/fit"), metavar="FOLDER")
    args = parser.parse_args()
    cfg = get_cfg()
    cfg.merge_from_file(find_config(f"configs/{args.set}/boxes.yaml"))
    (source,) = data_sources(cfg, "TRAIN")
    output = args.output / args.set
    minutes = fit_minutes(without_masks(source, args.output / f"{args.set}.json"), source, output, args)
    truth = read_coco(source, read_masks=True)
    steps = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])["iteration"]
    entry = {"set": args.set, "minutes": round(minutes, 1), "asked": args.minutes, "steps": steps}
    entry |= {"hardware": describe(), "rows": compared(truth, output / "masks.json")}
    path = RESULTS / "fit.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    entries = [old for old in entries if old["set"] != args.set] + [entry]
    path.write_text("[\n" + ",\n".join(f" {json.dumps(each)}" for each in entries) + "\n]\n")
    print(json.dumps(entry, indent=1))


if __name__ == "__main__":
    main()
