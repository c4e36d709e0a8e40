"""Masks for true boxes: how good they are without learning, and those of a trained network.

    python benchmarks/label_quality.py people --run output/people_boxes
    python benchmarks/label_quality.py people --scores output/people_boxes ...

For the boxes of a set's validation images, mean IoU with the true masks and their AP, with the box as only
knowledge: the filled box, the ellipse in it, GrabCut (OpenCV, five iterations), the colour model from an
ellipse; and with --run the network's masks of these boxes, without and with the colours. All are clipped to
the boxes. AP counts each box once, best fitting masks first, so it needs no scores of a detector. Writes
benchmarks/results/labels_<set>.json.

With --scores, how well the scores of masks sort them: the share of errors, masks with an IoU below 0.5, among
the tenth of the validation objects that has the lowest scores and among the rest. Scores are fitted to the
other half of the images, or not at all ("mean of the signs"). Writes benchmarks/results/quality_<set>.json.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from real import RESULTS, box_masks, store, trained
from torch import Tensor
from tqdm import tqdm

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.config.shipped import find_config
from sim_m2f.data.catalog import DatasetSource, data_sources
from sim_m2f.data.coco import CocoData, ImageRecord, read_coco, read_mask
from sim_m2f.data.image import read_image
from sim_m2f.data.loader import eval_loader
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.engine import coco_metrics
from sim_m2f.geometry import iou, mask_extents
from sim_m2f.labelling import masks as label_masks
from sim_m2f.labelling.proposals import grabcut_mask
from sim_m2f.labelling.quality import Quality, summary
from sim_m2f.labelling.run import compared
from sim_m2f.modeling import Mask2Former
from sim_m2f.modeling.postprocess import masks_in_boxes
from sim_m2f.modeling.specks import without_specks
from sim_m2f.pixels import Pixels
from sim_m2f.segmenter import Segmenter
from sim_m2f.structures import STRIDE, Batch
from sim_m2f.supervision.color_model import FINER, corrected, corrected_masks
from sim_m2f.supervision.targets import flatten_targets


def filled(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(H, W) bool: the box."""
    return label_masks.filled(box, *image.shape[:2])


def ellipse(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(H, W) bool: the ellipse that touches the sides of the box."""
    return label_masks.ellipse(box, *image.shape[:2]) & filled(image, box)


def grabcut(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """(H, W) bool: OpenCV's GrabCut from the box; the box where it finds nothing."""
    return grabcut_mask(image, box)[0]


class Comparison:
    """Masks of annotated boxes against the true ones, by row: mean IoU, share above 0.75, AP."""

    def __init__(self, truth: CocoData) -> None:
        self.truth = truth
        self.ious: dict[str, list[float]] = defaultdict(list)
        self.results: dict[str, list[dict]] = defaultdict(list)

    def add(self, row: str, image: ImageRecord, masks: np.ndarray) -> None:
        """The masks (N, H, W) of an image's N boxes; AP takes first those that fit their boxes best."""
        for index, (mask, rle) in enumerate(zip(masks, encode_masks(masks), strict=True)):
            true = read_mask(self.truth, image, index).astype(bool)
            self.ious[row].append(float((mask & true).sum() / max((mask | true).sum(), 1)))
            category = self.truth.category_ids[int(image.labels[index])]
            found = {"image_id": image.id, "category_id": category, "segmentation": rle}
            self.results[row].append({**found, "bbox": [0, 0, 1, 1], "score": fit(mask, image.boxes[index])})

    def table(self) -> list[dict]:
        """An entry per row; IoU and AP in percent."""
        scored = coco_metrics.load_truth(self.truth.annotations_file)
        return [
            {
                "row": row,
                "objects": len(values),
                "mIoU": round(100 * float(np.mean(values)), 2),
                "above 0.75": round(100 * float(np.mean(np.array(values) > 0.75)), 1),
                "AP": round(coco_metrics.score(scored, self.results[row])["segm/AP"], 2),
            }
            for row, values in self.ious.items()
        ]


def of_network(
    cfg: CfgNode, network: Mask2Former | None, batch: Batch, image: ImageRecord
) -> dict[str, Tensor]:
    """By row, the masks (N, H, W) that need the network's input: the colours alone, and the network's."""
    boxes = torch.from_numpy(image.boxes).float()
    size, original = batch["image_sizes"][0], batch["original_sizes"][0]
    rgb, keys = batch["images"], cfg.MODEL.SIM.COLOR_MODEL
    given = batch["targets"][0]["boxes"]
    finer = FINER * size[0], FINER * size[1]
    height, width = (side // STRIDE for side in rgb.shape[-2:])
    targets = flatten_targets(batch["targets"], (height, width), rgb.device)
    valid = torch.zeros(1, height, width, dtype=torch.bool)
    valid[:, : size[0] // STRIDE, : size[1] // STRIDE] = True
    first = corrected(torch.zeros(len(boxes), height, width), rgb, valid, targets, keys, prior=1.0)
    masks = {"colours": masks_in_boxes(first - 0.5, boxes, finer, original)[0]}
    if network:
        logits = box_masks(cfg, network, Pixels(cfg).of_batch(rgb, [size]), batch["targets"])
        fine = corrected_masks(logits, rgb[0], given, size, keys)
        prompts = cfg.MODEL.SIM.PROMPTS
        masks["network"] = masks_in_boxes(logits, boxes, size, original, prompts.SPAN, prompts.ELLIPSE)[0]
        masks["network, colours"] = without_specks(masks_in_boxes(fine, boxes, finer, original)[0])
    return masks


def labelled(
    cfg: CfgNode, network: Mask2Former | None, truth: CocoData
) -> Iterator[tuple[ImageRecord, dict[str, np.ndarray]]]:
    """Every image with boxes, and by row its masks (N, H, W)."""
    batches = eval_loader(cfg, data_sources(cfg, "TEST")[0])
    for batch, image in zip(tqdm(batches, disable=None), truth.images, strict=True):
        if not len(image.labels):
            continue
        pixels = read_image(truth.image_root / image.file_name)
        masks = {
            function.__name__: np.stack([function(pixels, box) for box in image.boxes])
            for function in (filled, ellipse, grabcut)
        }
        with torch.no_grad():
            found = of_network(cfg, network, batch, image)
        yield image, masks | {row: each.numpy() for row, each in found.items()}


def sorting(run: Path, source: DatasetSource) -> list[dict]:
    """How well scores sort a run's masks, with colours or without, as they are better: a row a kind."""
    cfg, network = trained(run)
    names = read_coco(source, read_masks=False).class_names
    with_colors = compared(Segmenter(network.cpu(), cfg, names), source)
    best = max(with_colors, key=lambda colors: with_colors[colors].ious.mean())
    found = with_colors[best]
    about = {"seed": cfg.SEED, "steps": cfg.SOLVER.MAX_ITER, "colors": best}
    kinds = {"fitted to the other half": found.scores, "mean of the signs": Quality().score(found.signs)}
    return [
        {"row": row, **about, **{name: round(value, 2) for name, value in summary(each, found.ious).items()}}
        for row, each in kinds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="people, pennfudan, nuclei or coco_more")
    parser.add_argument("--run", type=Path, help="folder of a run, for the rows of the network")
    parser.add_argument(
        "--scores", nargs="+", default=[], type=Path, metavar="RUN", help="these runs' scores"
    )
    args = parser.parse_args()
    cfg, network = get_cfg(), None
    cfg.merge_from_file(find_config(f"configs/{args.set}/boxes.yaml"))
    for run in args.scores:
        for row in sorting(run, data_sources(cfg, "TEST")[0]):
            store(RESULTS / f"quality_{args.set}.json", row)
            print(json.dumps(row))
    if args.scores:
        return
    if args.run:
        cfg, network = trained(args.run)
        network.cpu()
    truth = read_coco(data_sources(cfg, "TEST")[0], read_masks=True)
    comparison = Comparison(truth)
    for image, rows in labelled(cfg, network, truth):
        for row, masks in rows.items():
            comparison.add(row, image, masks)
    table = [
        entry
        | ({"seed": cfg.SEED, "steps": cfg.SOLVER.MAX_ITER} if entry["row"].startswith("network") else {})
        for entry in comparison.table()
    ]
    write_table(RESULTS / f"labels_{args.set}.json", table)


def write_table(path: Path, table: list[dict]) -> None:
    """A line per entry, in the file and on the screen."""
    path.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in table) + "\n]\n")
    print(path.read_text())


def fit(mask: np.ndarray, box: np.ndarray) -> float:
    """IoU of the box around a mask and a box xyxy."""
    return float(iou(mask_extents(torch.from_numpy(mask)).double(), torch.from_numpy(box)))


if __name__ == "__main__":
    main()
