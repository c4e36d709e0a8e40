"""Whether prototypes on a backbone's pretrained features tell an object's pixels from the rest of its box.

    python benchmarks/backbone_prototypes.py people pennfudan --weights FILE

Before anything is learned: prototypes (supervision/prototypes.py) of pixels in the middle of the boxes, and
others of pixels outside of all boxes, from the features of one stride or of all. The score of a pixel is its
similarity to the object's prototypes, alone or less that to the background's. The area under the ROC curve is
the mean over objects of training images, beside that of an ellipse in the box and of the colour model, which
have not learned either. Writes benchmarks/results/backbone_prototypes.json.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from real_runs import add_run_arguments, configuration
from scipy.stats import rankdata
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.data.loader import train_loader
from sim_m2f.errors import UserError
from sim_m2f.files import write_file
from sim_m2f.modeling import build_model
from sim_m2f.pixels import Pixels
from sim_m2f.structures import STRIDE
from sim_m2f.supervision.color_model import corrected
from sim_m2f.supervision.prototypes import Prototypes
from sim_m2f.supervision.targets import BoxPixels, Targets, box_pixels, flatten_targets
from sim_m2f.weights.checkpoint import load_checkpoint

OUTPUT = Path(__file__).parent / "results/backbone_prototypes.json"
MIDDLE = (
    0.35  # squared distance from a box's centre up to which pixels are taken for the object's; 1 at its sides
)
DRAWN = 512  # pixels of the objects, and as many of the background, that a batch gives the prototypes
LEAST = 20  # pixels of the object, and of the rest of its box
OBJECT, BACKGROUND = 0, 1


def batches(cfg: CfgNode) -> Iterator[tuple[dict[str, Tensor], Tensor, Targets, Tensor]]:
    """Maps at stride 4 of every stride and of all; images; objects; (T, h, w) their true masks."""
    network = build_model(cfg)
    load_checkpoint(network, cfg.MODEL.WEIGHTS)
    backbone, normalised = network.backbone.eval(), Pixels(cfg)
    for batch in train_loader(cfg):
        images = normalised.of_batch(batch["images"], batch["image_sizes"])
        size = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
        maps = {name: F.interpolate(each, size, mode="bilinear") for name, each in backbone(images).items()}
        deviations = [each / each.std((0, 2, 3), keepdim=True).clamp(min=1e-6) for each in maps.values()]
        masks = torch.cat([target["masks"].float() for target in batch["targets"]])
        targets = flatten_targets(batch["targets"], size, "cpu")
        if len(targets):
            maps["all"] = torch.cat(deviations, dim=1)
            yield maps, batch["images"], targets, F.avg_pool2d(masks, STRIDE) > 0.5


def centred(features: Tensor) -> Tensor:
    """(B, d, h, w) without the mean, so that the cosines of unlike pixels are not all near 1."""
    return features - features.mean((0, 2, 3), keepdim=True)


def distance(pixels: BoxPixels, targets: Targets) -> Tensor:
    """(P,): squared distance from the box's centre, 1 in the middle of its sides."""
    x0, y0, x1, y1 = targets.ranges[pixels.target].unbind(1)
    return ((2 * pixels.x + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * pixels.y + 1 - y0 - y1) / (y1 - y0)) ** 2


def learn(prototypes: Prototypes, features: Tensor, pixels: BoxPixels, targets: Targets) -> None:
    """Move them towards a batch's pixels in the middle of boxes, and outside of all boxes."""
    core = distance(pixels, targets) < MIDDLE
    image = targets.image_index[pixels.target]
    own = features[image[core], :, pixels.y[core], pixels.x[core]]
    outside = torch.ones(len(features), *features.shape[-2:], dtype=torch.bool)
    outside[image, pixels.y, pixels.x] = False
    rest = features.movedim(1, -1)[outside]
    drawn = [each[torch.randperm(len(each))[:DRAWN]] for each in (own, rest)]
    labels = torch.cat([torch.full((len(each),), kind) for kind, each in enumerate(drawn)])
    prototypes.update(torch.cat(drawn), labels)


def roc_area(score: Tensor, truth: Tensor) -> float:
    ranks, positive = rankdata(score.numpy()), int(truth.sum())
    return (ranks[truth.numpy()].sum() - positive * (positive + 1) / 2) / positive / (len(truth) - positive)


def measure(cfg: CfgNode, count: int) -> dict[str, float]:
    """Mean areas of each score, over the objects of ``count`` batches after as many to learn from."""
    torch.manual_seed(0)
    keys, found, areas = cfg.MODEL.SIM, {}, {}
    for index, (maps, images, targets, truth) in enumerate(islice(batches(cfg), 2 * count)):
        pixels = box_pixels(targets)
        place, image = (pixels.target, pixels.y, pixels.x), targets.image_index[pixels.target]
        scores = {"ellipse": -distance(pixels, targets)}
        if index >= count:
            valid = torch.ones_like(images[:, 0, ::STRIDE, ::STRIDE], dtype=torch.bool)
            fine = corrected(torch.zeros(truth.shape), images, valid, targets, keys.COLOR_MODEL, prior=1.0)
            scores["colours"] = F.avg_pool2d(fine[:, None], 2)[:, 0][place]
        for name, features in maps.items():
            features = centred(features)
            known = found.setdefault(name, Prototypes(2, features.shape[1], keys.PROTOTYPES))
            if index < count:
                learn(known, features, pixels, targets)
                continue
            own = features[image, :, pixels.y, pixels.x]
            alike, background = (known.similarity(own, kind) for kind in (OBJECT, BACKGROUND))
            scores[f"prototypes, {name}"] = alike
            scores[f"prototypes, {name}, less background"] = alike - background
        for target in range(len(targets) if index >= count else 0):
            inside = pixels.target == target
            true = truth[place][inside]
            if LEAST <= true.sum() <= len(true) - LEAST:
                for name, score in scores.items():
                    areas.setdefault(name, []).append(roc_area(score[inside], true))
    means = {name: round(sum(each) / len(each), 3) for name, each in areas.items()}
    return {"objects": len(areas["ellipse"]), **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", metavar="SET", help="people, pennfudan or nuclei")
    parser.add_argument("--batches", type=int, default=40, help="to learn from, and as many to measure")
    add_run_arguments(parser)
    args = parser.parse_args()
    args.opts = ["MODEL.SIM.SUPERVISION", "mask", "MODEL.SIM.PROTOTYPES.MOMENTUM", "0.9", *args.opts]
    results = {}
    with torch.no_grad():
        for name in args.sets:
            results[name] = measure(configuration(name, "mask", 0, args), args.batches)
    write_file(OUTPUT, json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
