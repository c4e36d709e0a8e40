"""How good the pseudo labels of a run are: M_S, M_I, labels and alike edges against the true masks.

    python benchmarks/pseudo_masks.py output/shapes_box

reads the run's config.yaml and last checkpoint, looks at its training images, and writes
benchmarks/results/pseudo_masks.json (--output: another file). The share of M_S in the blend, its centre and
the threshold of the affinity are varied, besides those of the run, because the thresholds have to fit the
distribution of what they divide.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import hardware

from sim_m2f.config import get_cfg
from sim_m2f.data.loader import Batch, train_loader
from sim_m2f.modeling import build_model
from sim_m2f.supervision.affinity import color_affinity, edge_mask, feature_affinity, neighbour_offsets
from sim_m2f.supervision.criterion import SIMCriterion, build_criterion
from sim_m2f.supervision.pseudo_masks import pseudo_labels
from sim_m2f.supervision.targets import BoxPixels, box_pixels, flatten_targets
from sim_m2f.weights.checkpoint import load_weights, read_checkpoint, teacher_weights
from sim_m2f.weights.sources import last_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SHARES, CENTERS = (0.5, 0.3), (0.0, 0.5, 0.7)
COLOUR_THRESHOLDS, PRODUCT_THRESHOLDS = (0.3,), (0.1, 0.2, 0.3)


@torch.no_grad()
def gather(run: Path, batches: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of every pixel in the boxes: similarity to the nearest prototype, M_I, truth and object.

    Of every edge between neighbours: colour and feature affinity, and whether it joins what belongs together.
    """
    cfg = get_cfg()
    cfg.merge_from_file(run / "config.yaml")
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", "0"])
    path = last_checkpoint(run)
    state = read_checkpoint(path)
    criterion = build_criterion(cfg).eval()
    criterion.load_state_dict(state["criterion"])
    teacher = build_model(cfg).eval()
    load_weights(teacher, teacher_weights(state), path)

    cfg.MODEL.SIM.SUPERVISION = "mask"  # only so that the loader hands out the true masks
    loader = iter(train_loader(cfg))
    found: dict[str, list[Tensor]] = {"similarity": [], "instance": [], "truth": [], "object": []}
    edges: dict[str, list[Tensor]] = {"colour": [], "features": [], "right": []}
    objects = 0
    for batch in itertools.islice(loader, batches):
        outputs = teacher(criterion.pixels.of_batch(batch["images"], batch["image_sizes"]))
        (layers, matcher), features = criterion.teacher_layers(outputs), outputs["mask_features"]
        targets = flatten_targets(batch["targets"], features.shape[-2:], "cpu")
        match = matcher(layers, targets)
        evidence = criterion.pseudo_masks.evidence(layers, features, targets, match)
        pixels = evidence.pixels
        similarity = criterion.pseudo_masks.similarity(features, targets, pixels)
        masks = torch.cat([target["masks"] for target in batch["targets"]]).float()
        truth = F.avg_pool2d(masks, 4)[pixels.target, pixels.y, pixels.x] > 0.5
        values = similarity, evidence.instance, truth, pixels.target + objects
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
        objects += len(targets)
        for name, value in gather_edges(batch, features, criterion).items():
            edges[name].append(value)
    return tuple({name: torch.cat(values) for name, values in group.items()} for group in (found, edges))


def gather_edges(batch: Batch, features: Tensor, criterion: SIMCriterion) -> dict[str, Tensor]:
    """The edges whose first end lies in a box."""
    dilation = criterion.sim.PAIRWISE.DILATION
    maps = []
    for target in batch["targets"]:
        if not len(target["masks"]):
            maps.append(torch.zeros(features.shape[-2:], dtype=torch.int64))
            continue
        masks = F.avg_pool2d(target["masks"].float(), 4) > 0.5
        numbers = torch.arange(1, len(masks) + 1).view(-1, 1, 1)
        maps.append((masks * numbers).amax(0))
    instances = torch.stack(maps)
    boxes = flatten_targets(batch["targets"], features.shape[-2:], "cpu")
    inside = torch.zeros(instances.shape, dtype=torch.bool)
    pixels = box_pixels(boxes)
    inside[boxes.image_index[pixels.target], pixels.y, pixels.x] = True
    counted = edge_mask(torch.ones_like(inside), dilation) & inside[:, None]
    ends = [torch.roll(instances, (-dy, -dx), (1, 2)) for dy, dx in neighbour_offsets(dilation)]
    images = batch["images"]
    return {
        "colour": color_affinity(images, dilation)[counted],
        "features": feature_affinity(features, dilation)[counted],
        "right": (torch.stack(ends, 1) == instances[:, None])[counted],
    }


def edge_quality(affinity: Tensor, right: Tensor, threshold: float) -> dict[str, float]:
    alike = affinity >= threshold
    return {
        "threshold": threshold,
        "counted": round(alike.float().mean().item(), 4),
        "wrong of the counted": round((~right[alike]).float().mean().item(), 4),
    }


def mean_iou(mask: Tensor, found: dict[str, Tensor]) -> float:
    """Mean over the objects of the IoU with the true mask, inside the boxes."""
    objects = int(found["object"][-1]) + 1
    both, either = (
        torch.zeros(objects).index_add(0, found["object"], overlap.float())
        for overlap in (mask & found["truth"], mask | found["truth"])
    )
    return round((both / either.clamp(min=1)).mean().item(), 3)


def quality(found: dict[str, Tensor], share: float, center: float, keys: Any) -> dict[str, float | None]:
    """Labels of a blend: how many, how many of them right, and where they differ from M_I."""
    truth, instance = found["truth"], found["instance"]
    semantic = ((found["similarity"] - center) / keys.PROTOTYPES.TEMPERATURE).sigmoid()
    pixels = BoxPixels(*[found["object"]] * 6)  # only the first is read
    masks, unused = keys.PSEUDO_MASKS, torch.ones(int(found["object"][-1]) + 1)
    labels = pseudo_labels(
        semantic, instance, pixels, unused, share, masks.POSITIVE, masks.NEGATIVE, masks.CONFIDENT
    )
    positive, negative = labels.final == 1, labels.final == 0
    right = (positive & truth) | (negative & ~truth)
    wrong = (positive & ~truth) | (negative & truth)
    mistaken = (instance > 0.5) != truth
    figures = {
        "IoU of M_S": mean_iou(semantic > 0.5, found),
        "IoU of M": mean_iou(labels.blend > 0.5, found),
        "positive": positive,
        "negative": negative,
        "positive by M_S alone": labels.semantic == 1,
        "negative by M_S alone": labels.semantic == 0,
        "right of the positive": truth[positive],
        "right of the negative": ~truth[negative],
        "mistakes of M_I that the labels repeat": wrong & mistaken,
        "mistakes of M_I that the labels put right": right & mistaken,
        "mistakes that M_I had not made": wrong & ~mistaken,
    }
    return {name: value if isinstance(value, float) else share_of(value) for name, value in figures.items()}


def share_of(flags: Tensor) -> float | None:
    """The share of True, None where there is nothing to count."""
    return round(flags.float().mean().item(), 4) if len(flags) else None


def quantiles(values: Tensor, levels: list[float]) -> list[float]:
    return [round(value, 3) for value in values.quantile(torch.tensor(levels)).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of a run with a teacher and prototypes")
    parser.add_argument("--batches", type=int, default=20, help="training batches to look at")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/pseudo_masks.json")
    args = parser.parse_args()
    found, edges = gather(args.run, args.batches)
    product = edges["colour"] * edges["features"]
    keys = get_cfg()
    keys.merge_from_file(args.run / "config.yaml")
    sim, truth = keys.MODEL.SIM, found["truth"]
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    results: dict[str, Any] = {
        "command": f"python benchmarks/pseudo_masks.py {args.run} --batches {args.batches}",
        "pixels": len(truth),
        "objects": int(found["object"][-1]) + 1,
        "true": round(truth.float().mean().item(), 4),
        "IoU of M_I": mean_iou(found["instance"] > 0.5, found),
        "quantiles": levels,
        "similarity on the object": quantiles(found["similarity"][truth], levels),
        "similarity beside it": quantiles(found["similarity"][~truth], levels),
        "labels": [
            {"ALPHA": share, "CENTER": center, **quality(found, share, center, sim)}
            for share in sorted({*SHARES, sim.PSEUDO_MASKS.ALPHA})
            for center in sorted({*CENTERS, sim.PROTOTYPES.CENTER})
        ],
        "edges by colour": [edge_quality(edges["colour"], edges["right"], t) for t in COLOUR_THRESHOLDS],
        "edges by colour x features": [edge_quality(product, edges["right"], t) for t in PRODUCT_THRESHOLDS],
        "wrong of all edges": round((~edges["right"]).float().mean().item(), 4),
        "hardware": hardware.describe(),
    }
    args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
