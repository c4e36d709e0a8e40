"""Masks corrected by colour: what is coloured as the object, not as what surrounds its box, belongs to it.

Two colour histograms per object, of its mask and of the rest of its box and the surroundings, as in GrabCut
(https://dl.acm.org/doi/10.1145/1015706.1015720). That every pixel is drawn to the region that explains its
colour better is region competition, a level-set energy with densities where Box2Mask
(https://arxiv.org/abs/2212.01579) has means. Neighbours of like colour then draw each other to one side, by
mean-field steps of a conditional random field (https://arxiv.org/abs/1210.5644) with edges of two lengths
in place of all pairs. Nothing is learned but the masks.
"""

import itertools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.geometry import iou, missing_logits, projection_boxes
from sim_m2f.structures import STRIDE, Target
from sim_m2f.supervision.affinity import lab_at
from sim_m2f.supervision.color_histograms import color_bins, log_ratio
from sim_m2f.supervision.losses import parts
from sim_m2f.supervision.targets import BoxPixels, Targets, box_pixels, flatten_targets, map_size

FINER = 2  # colours are looked at in so much smaller pixels than masks: at stride 2, where outlines show
LEAST_MARGIN = 2  # pixels at stride 4
ELLIPSE = 1.5  # logit of the first mask inside an ellipse that touches the box's sides, and minus it outside
MOST_SURE = 20.0  # logit whose exponential float32 can still divide by sums of many
MOST_RISE = 4.0  # logits, of a mask that has to span its box
DISTANCES = (1, 4)  # of neighbours that draw each other, in pixels at stride 2


@dataclass(frozen=True)
class ColorLabels:
    """Probabilities that pixels belong to their objects.

    Attributes:
        masks: (T, h, w), stride 4, 0 outside of the object's box.
        quality: (T,), IoU of the box around the mask and the annotated one; 0 where no mask was given.
        confidence: (T,), mean probability of the pixels above one half, 0 where there is none.
    """

    masks: Tensor
    quality: Tensor
    confidence: Tensor


@torch.no_grad()
def color_labels(
    logits: Tensor, images: Tensor, valid: Tensor, targets: Targets, keys: CfgNode, prior: float = 0.0
) -> ColorLabels:
    """What ``corrected`` makes of masks at stride 2, as means of 2 x 2 of its pixels.

    Beside the result no maps of objects are made: memory grows with the area of the boxes and their margins.

    Args:
        logits: (T, h, w) mask logits of the objects, stride 4.
        images: (B, 3, H, W) RGB of 0..255.
        valid: (B, h, w) bool, pixels that count.
        targets: the T objects.
        keys: MODEL.SIM.COLOR_MODEL.
        prior: share of an ellipse in the boxes that the first masks are made of, beside the logits.
    """
    pixels, fine = _corrected(logits, images, valid, targets, keys, prior)
    cells = box_pixels(targets)
    first = pixels.places(replace(cells, x=FINER * cells.x, y=FINER * cells.y))
    below = first + pixels.columns[first]
    means = (fine[first] + fine[first + 1] + fine[below] + fine[below + 1]) / FINER**2
    masks = fine.new_zeros(len(targets), *targets.size).index_put_((cells.target, cells.y, cells.x), means)
    quality = iou(projection_boxes(masks.amax(-2), masks.amax(-1)), targets.relative_boxes)
    inside = masks > 0.5
    confidence = (masks * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    return ColorLabels(masks, quality, confidence)


@torch.no_grad()
def corrected_masks(
    logits: Tensor,
    image: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    keys: CfgNode,
    alone: bool = False,
) -> Tensor:
    """Mask logits of given boxes in one image, corrected by colours that are twice as fine as the masks.

    Args:
        logits: (N, h, w), stride 4.
        image: (3, H, W) RGB of 0..255, the network's input.
        boxes: (N, 4) xyxy in pixels of the input.
        size: height and width of the image in the input, without padding.
        keys: MODEL.SIM.COLOR_MODEL.
        alone: see ``corrected``.

    Returns:
        (N, 2 h, 2 w), stride 2.
    """
    target: Target = {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    targets = flatten_targets([target], map_size(logits), logits.device)
    valid = torch.zeros(1, *map_size(logits), dtype=torch.bool, device=logits.device)
    valid[:, : size[0] // STRIDE, : size[1] // STRIDE] = True
    return _logits(corrected(logits, image[None], valid, targets, keys, alone=alone))


def corrected(
    logits: Tensor,
    images: Tensor,
    valid: Tensor,
    targets: Targets,
    keys: CfgNode,
    prior: float = 0.0,
    alone: bool = False,
) -> Tensor:
    """Masks of the objects from their own logits, colours and neighbours, with pixels of stride 2.

    A pixel's logit is KEEP * logit + log(P(colour | mask) / P(colour | rest)) + SMOOTHING * the sum over the
    neighbours of their likeness * (2 P(neighbour in the mask) - 1). The surroundings are MARGIN of the box
    on all sides, without what lies in other boxes. A pixel in several boxes belongs to one object at most, so
    its odds share one probability. The histograms are taken ITERATIONS times, each from the masks corrected
    by the former; in the end all logits of a mask rise until it spans its box
    (``geometry.missing_logits``).

    Args:
        alone: no box hides pixels from another, which suits boxes that may be of the same object.

    Returns:
        (T, 2 h, 2 w) probabilities, 0 outside of the object's box; for the arguments see ``color_labels``.
    """
    pixels, mask = _corrected(logits, images, valid, targets, keys, prior, alone)
    masks = mask.new_zeros(len(targets), FINER * targets.size[0], FINER * targets.size[1])
    return masks.index_put_((pixels.target, pixels.y, pixels.x), mask)


def _corrected(
    logits: Tensor,
    images: Tensor,
    valid: Tensor,
    targets: Targets,
    keys: CfgNode,
    prior: float,
    alone: bool = False,
) -> tuple[BoxPixels, Tensor]:
    """The P pixels at stride 2 of the boxes and their surroundings, and (P,) what ``corrected`` has there."""
    targets = replace(
        targets, ranges=FINER * targets.ranges, size=(FINER * targets.size[0], FINER * targets.size[1])
    )
    pixels = box_pixels(targets, _margins(targets, keys.MARGIN))
    inside = targets.inside(pixels.target, pixels.x, pixels.y)
    image = targets.image_index[pixels.target]
    place = (image * targets.size[0] + pixels.y) * targets.size[1] + pixels.x
    nothing = logits.new_zeros(len(images) * targets.size[0] * targets.size[1], dtype=torch.float32)
    covered = nothing.index_add(0, place, inside.float())[place] > 0
    counts = valid[image, pixels.y // FINER, pixels.x // FINER] & (inside | ~covered | alone)
    colors = lab_at(images, STRIDE // FINER)[image, :, pixels.y, pixels.x]
    bins = color_bins(colors, counts, pixels.target, len(targets))
    edges = _edges(pixels, colors, keys.SMOOTHING_COLOR)

    def shared(logits: Tensor) -> Tensor:
        """A pixel belongs to one of the objects in whose boxes it is, or to none."""
        if alone:
            return logits.sigmoid() * inside
        odds = logits.clamp(max=MOST_SURE).exp() * inside
        return odds / (1 + nothing.index_add(0, place, odds)[place])

    own = (1 - prior) * _enlarged_at(logits, pixels) + prior * _ellipse(pixels, targets)
    mask = shared(own)
    for _ in range(keys.ITERATIONS):
        seen = keys.KEEP * own + log_ratio(bins, mask, counts, pixels.target, len(targets))
        mask = shared(seen)
        for _ in range(keys.SMOOTHING_STEPS):
            drawn = sum(likeness * (2 * mask.index_select(0, there) - 1) for there, likeness in edges)
            mask = shared(seen + keys.SMOOTHING * drawn)
    if keys.SPAN:
        mask = _spanning(_logits(mask).where(inside, -torch.inf), pixels, targets, keys.SPAN).sigmoid()
    return pixels, mask


def _enlarged_at(logits: Tensor, pixels: BoxPixels) -> Tensor:
    """(P,): maps (T, h, w), enlarged to stride 2, at the pixels; few maps at a time."""
    height, width = map_size(logits)
    ends = [0, *pixels.areas.cumsum(0).tolist()]
    values = [logits.new_zeros(0, dtype=torch.float32)]
    for part in parts(len(logits), FINER**2 * height * width):
        maps = F.interpolate(logits[part, None].float(), scale_factor=FINER, mode="bilinear")[:, 0]
        own = slice(ends[part.start], ends[min(part.stop, len(logits))])
        values.append(maps[pixels.target[own] - part.start, pixels.y[own], pixels.x[own]])
    return torch.cat(values)


def _logits(probabilities: Tensor) -> Tensor:
    return probabilities.clamp(1e-6, 1 - 1e-6).logit()


def _spanning(logits: Tensor, pixels: BoxPixels, targets: Targets, share: float) -> Tensor:
    """Logits (P,), -inf outside of the boxes, those of an object so high that its mask spans its box."""
    along_x, along_y = (
        logits.new_full((len(targets) * length,), -torch.inf)
        .scatter_reduce(0, pixels.target * length + place, logits, "amax")
        .view(-1, length)
        for place, length in zip((pixels.x, pixels.y), targets.size[::-1], strict=True)
    )
    areas = targets.areas.to(logits.device, non_blocking=True)
    return logits + missing_logits(along_x, along_y, areas, share, MOST_RISE)[pixels.target]


def _ellipse(pixels: BoxPixels, targets: Targets) -> Tensor:
    """(P,): ELLIPSE in the ellipse that touches the sides of the object's box, -ELLIPSE outside."""
    x0, y0, x1, y1 = targets.ranges.to(pixels.x.device, non_blocking=True)[pixels.target].unbind(1)
    across = (2 * (pixels.x - x0) + 1) / (x1 - x0) - 1
    down = (2 * (pixels.y - y0) + 1) / (y1 - y0) - 1
    return torch.where(across**2 + down**2 < 1, ELLIPSE, -ELLIPSE)


def _edges(pixels: BoxPixels, colors: Tensor, deviation: float) -> list[tuple[Tensor, Tensor]]:
    """For each of the 8 neighbours at each of DISTANCES, which pixel it is and how alike its colour is.

    Args:
        pixels: the P pixels.
        colors: (P, 3) CIELAB.
        deviation: standard deviation of the Gaussian of colour differences.

    Returns:
        pairs of (P,) int32 and (P,) float, 0 where the object has no such pixel, else 1 / number of distances
        at most.
    """
    edges = []
    for distance in DISTANCES:
        for dy, dx in itertools.product((-distance, 0, distance), repeat=2):
            if dy or dx:
                there, exists = pixels.neighbours(dx, dy)
                apart = (colors - colors[there]).square().sum(1)
                likeness = exists * torch.exp(-apart / (2 * deviation**2)) / len(DISTANCES)
                edges.append((there.int(), likeness))
    return edges


def _margins(targets: Targets, share: float) -> Tensor:
    """(T, 4) int64: so much wider is each side's surroundings, in pixels at stride 2."""
    sides = (targets.ranges[:, 2:] - targets.ranges[:, :2]).repeat(1, 2)
    return (sides * share).long().clamp(min=FINER * LEAST_MARGIN)
