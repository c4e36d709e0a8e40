"""Runs a network over a test set, writes its detections in COCO's results format and scores them."""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pycocotools import mask as mask_utils
from torch import nn
from tqdm import tqdm

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.coco import CocoData
from sim_m2f.data.dataset import EvalDataset
from sim_m2f.data.loader import Batches, eval_loader
from sim_m2f.data.segmentation import encode_masks
from sim_m2f.detections import detections
from sim_m2f.distributed import from_first_rank, gather_on_first_rank
from sim_m2f.engine import coco_metrics
from sim_m2f.errors import UserError
from sim_m2f.files import write_file
from sim_m2f.modeling.tiles import tiled
from sim_m2f.progress import progress
from sim_m2f.structures import Detections
from sim_m2f.weights.folder import METRICS_FILE

RESULTS_FILE = "inference/coco_instances_results.json"


def evaluate_all(cfg: CfgNode, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
    """Score every test set of DATASETS.TEST*; see ``evaluate``.

    The first one's results lie in OUTPUT_DIR, those of others in a folder of their name below it.

    Returns:
        the metrics; before those of all but the first test set stand its name and "/".
    """
    metrics: dict[str, float] = {}
    sources, folder = data_sources(cfg, "TEST"), Path(cfg.OUTPUT_DIR)
    for source in sources:
        loader = eval_loader(cfg, source, accelerator.process_index, accelerator.num_processes)
        below = "" if source is sources[0] else f"{source.name}/"
        scores = evaluate(model, loader, folder / below, accelerator, cfg)
        metrics |= {f"{below}{name}": value for name, value in scores.items()}
    return metrics


def evaluate(
    model: nn.Module,
    loader: Batches[EvalDataset],
    output_dir: Path,
    accelerator: Accelerator,
    cfg: CfgNode,
) -> dict[str, float]:
    """Detect instances in every image of a test set and score them as COCO does.

    Writes ``output_dir``/inference/coco_instances_results.json and, where the data have annotations,
    inference/metrics.json (null for NaN), and prints the tables. All ranks call it, each with its own share
    of the images; the first one writes and prints.

    Args:
        model: the network, wrapped by accelerate or not; its modes (train or eval) are as before afterwards.
        loader: batches of ``sim_m2f.data.loader.eval_loader``; over all ranks each image exactly once.
        output_dir: folder of the run.
        accelerator: device, precision and ranks.
        cfg: TEST says what is detected.

    Returns:
        on every rank, the metrics of ``coco_metrics.score``; empty when the data have no annotations.

    Raises:
        UserError: a score is not a finite number, an annotated segmentation cannot be read, or a file cannot
            be written.
        ValueError: the detections do not fit the images or the classes, or an image came twice or never.
    """
    data = loader.dataset.data
    scored = data.has_annotations and accelerator.is_main_process
    truth = coco_metrics.load_truth(data.annotations_file) if scored else None
    shares = gather_on_first_rank(_detect(model, loader, accelerator, cfg))
    metrics: dict[str, float] = {}
    if accelerator.is_main_process:
        seen, found = (list(itertools.chain.from_iterable(parts)) for parts in zip(*shares, strict=True))
        results = _in_order(found, seen, [image.id for image in data.images])
        write_file(output_dir / RESULTS_FILE, json.dumps(results))
        (output_dir / METRICS_FILE).unlink(missing_ok=True)
        if truth is None:
            tqdm.write(f"{data.name} has no annotations; its detections are in {output_dir / RESULTS_FILE}")
        else:
            metrics = coco_metrics.score(truth, results)
            _report(metrics, data, output_dir)
    return from_first_rank(metrics)


def _detect(
    model: nn.Module, loader: Batches[EvalDataset], accelerator: Accelerator, cfg: CfgNode
) -> tuple[list[int], list[dict[str, Any]]]:
    """This rank's image ids and detections."""
    # DDP would synchronise buffers in every forward pass, but ranks may differ in their number of batches.
    network = accelerator.unwrap_model(model)
    seen: list[int] = []
    results: list[dict[str, Any]] = []
    shown = accelerator.is_local_main_process
    pixels = loader.pixels.to(accelerator.device)
    with torch.no_grad(), evaluation_mode(network):
        for batch in progress(loader, "evaluate", len(loader), shown=shown):
            with accelerator.autocast():
                images = pixels.of_batch(batch["images"], batch["image_sizes"])
                outputs = tiled(network, images, cfg.TEST.TILE, objects=cfg.TEST.DETECTIONS_PER_IMAGE)
            sizes = batch["image_sizes"], batch["original_sizes"]
            found = detections(outputs, batch["images"], *sizes, cfg, cfg.TEST.COLORS.ENABLED)
            for image_id, instances in zip(batch["image_ids"], found, strict=True):
                seen.append(image_id)
                results += encode(image_id, instances, loader.dataset.data.category_ids)
    return seen, results


def encode(image_id: int, instances: Detections, category_ids: list[int]) -> list[dict[str, Any]]:
    """The instances of one image as entries of COCO's results format.

    Args:
        image_id: id of the image.
        instances: "scores" (K,), "labels" (K,) from 0 on, "masks" (K, H, W) bool at the image's size.
        category_ids: COCO's category id of each label.

    Returns:
        K entries: image_id, category_id, score, segmentation (RLE, counts as text) and bbox, the box around
        the mask as x, y, width, height in pixels of the image (zeros for an empty mask).

    Raises:
        UserError: a score is not a finite number.
    """
    masks, scores, labels = instances["masks"], instances["scores"].tolist(), instances["labels"].tolist()
    if not all(math.isfinite(score) for score in scores):
        fault = "a score is not a finite number: broken weights, or training has diverged"
        advice = "start from an earlier checkpoint or lower SOLVER.BASE_LR"
        raise UserError(f"image {image_id}: {fault}; {advice}")
    encoded = encode_masks(masks.cpu().numpy())
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "score": score,
            "segmentation": rle,
            "bbox": mask_utils.toBbox(rle).tolist(),
        }
        for label, score, rle in zip(labels, scores, encoded, strict=True)
    ]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _in_order(results: list[dict[str, Any]], seen: list[int], image_ids: list[int]) -> list[dict[str, Any]]:
    """The detections in the order of the images, so that the file is the same for any number of ranks."""
    if sorted(seen) != sorted(image_ids):
        different = len(set(seen))
        raise ValueError(f"evaluation saw {len(seen)} images ({different} different) of {len(image_ids)}")
    place = {image_id: index for index, image_id in enumerate(image_ids)}
    return sorted(results, key=lambda entry: place[entry["image_id"]])


def _report(metrics: dict[str, float], data: CocoData, output_dir: Path) -> None:
    if "segm/AP" not in metrics:
        tqdm.write(f"{data.annotations_file}: annotations without segmentation, so only boxes are scored")
    tables = coco_metrics.format_tables(metrics, data.class_names)
    tqdm.write(f"\n{data.name}, {len(data.images)} images\n{tables}\n")
    known = {name: None if math.isnan(value) else value for name, value in metrics.items()}
    write_file(output_dir / METRICS_FILE, json.dumps(known, indent=1))
