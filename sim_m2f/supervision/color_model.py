"""Masks corrected by colour: what is coloured as the object, not as what surrounds its box, belongs to it.

Two colour histograms per object, of its mask and of the rest of its box and the surroundings, as in GrabCut
(https://dl.acm.org/doi/10.1145/1015706.1015720). That every pixel is drawn to the region that explains its
colour better is region competition, a level-set energy with densities where Box2Mask
(https://arxiv.org/abs/2212.01579) has means. Nothing is learned but the masks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.geometry import iou, projection_boxes
from sim_m2f.structures import Target
from sim_m2f.supervision.affinity import rgb_to_lab
from sim_m2f.supervision.losses import dice_loss
from sim_m2f.supervision.matcher import mask_projections
from sim_m2f.supervision.targets import STRIDE, Targets, box_pixels, flatten_targets, map_size

BINS = (24, 16, 16)  # of L, a and b, over SPAN standard deviations of the object's pixels around their mean
SPAN = 4.0
LEAST_DEVIATION = 3.0  # in units of CIELAB, so that noise is not told apart
LEAST = 1e-4  # probability of a colour that a region does not have
MOST = 3.0  # largest logarithm of the ratio of two probabilities
LEAST_MARGIN = 2  # pixels
FINER = 2  # so much finer are colours and masks where no loss has to compare them with the network's


@dataclass(frozen=True)
class ColorLabels:
    """Probabilities that pixels belong to their objects.

    Attributes:
        masks: (T, h, w), 0 outside of the object's box.
        quality: (T,), IoU of the box around the mask and the annotated one.
    """

    masks: Tensor
    quality: Tensor


@torch.no_grad()
def color_labels(
    logits: Tensor, images: Tensor, valid: Tensor, targets: Targets, keys: CfgNode
) -> ColorLabels:
    """Masks with logits KEEP * logit + log(P(colour | mask) / P(colour | rest)).

    The surroundings are MARGIN of the box on all sides, without what lies in other boxes. The histograms are
    taken ITERATIONS times, each from the masks corrected by the former.

    Args:
        logits: (T, h, w) mask logits of the objects, stride 4.
        images: (B, 3, H, W) RGB of 0..255.
        valid: (B, h, w) bool, pixels that count.
        targets: the T objects.
        keys: MODEL.SIM.COLOR_MODEL.
    """
    lab = rgb_to_lab((F.avg_pool2d(images.float(), STRIDE) / 255).clamp(0, 1))
    pixels = box_pixels(targets, _margins(targets, keys.MARGIN))
    image = targets.image_index[pixels.target]
    boxes = targets.box_masks
    inside = boxes[pixels.target, pixels.y, pixels.x] > 0
    covered = torch.zeros_like(valid, dtype=boxes.dtype).index_add(0, targets.image_index, boxes) > 0
    counts = valid[image, pixels.y, pixels.x] & (inside | ~covered[image, pixels.y, pixels.x])
    color = color_bins(lab[image, :, pixels.y, pixels.x], counts, pixels.target, len(targets))
    own = logits[pixels.target, pixels.y, pixels.x].float()
    mask = own.sigmoid() * inside
    for _ in range(keys.ITERATIONS):
        ratio = log_ratio(color, mask, counts, pixels.target, len(targets))
        mask = (keys.KEEP * own + ratio).sigmoid() * inside
    masks = torch.zeros(len(targets), *targets.size, device=logits.device)
    masks[pixels.target, pixels.y, pixels.x] = mask
    projections = mask_projections([masks[None].clamp(1e-6, 1 - 1e-6).logit()])
    quality = iou(projection_boxes(*projections)[0, 0], targets.relative_boxes)
    return ColorLabels(masks, quality)


@torch.no_grad()
def corrected_masks(
    logits: Tensor, image: Tensor, boxes: Tensor, size: tuple[int, int], keys: CfgNode
) -> Tensor:
    """Mask logits of given boxes in one image, corrected by colours that are twice as fine as the masks.

    Args:
        logits: (N, h, w), stride 4.
        image: (3, H, W) RGB of 0..255, the network's input.
        boxes: (N, 4) xyxy in pixels of the input.
        size: height and width of the image in the input, without padding.
        keys: MODEL.SIM.COLOR_MODEL.

    Returns:
        (N, 2 h, 2 w), stride 2.
    """
    image, logits = (
        F.interpolate(maps[None].float(), scale_factor=FINER, mode="bilinear")[0] for maps in (image, logits)
    )
    target: Target = {"boxes": FINER * boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64)}
    targets = flatten_targets([target], map_size(logits), logits.device)
    valid = torch.zeros(1, *map_size(logits), dtype=torch.bool, device=logits.device)
    height, width = (FINER * side // STRIDE for side in size)
    valid[:, :height, :width] = True
    return color_labels(logits, image[None], valid, targets, keys).masks.clamp(1e-6, 1 - 1e-6).logit()


def color_loss(logits: Tensor, labels: ColorLabels, targets: Targets) -> Tensor:
    """(L, T): mean cross-entropy over the box towards the labels, and dice of mask and labels in the box."""
    boxes = targets.box_masks
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, labels.masks.expand_as(logits), reduction="none"
    )
    mean = (cross_entropy * boxes).sum((-2, -1)) / boxes.sum((-2, -1))
    return mean + dice_loss((logits.sigmoid() * boxes).flatten(2), labels.masks.flatten(1))


def color_bins(lab: Tensor, counts: Tensor, target: Tensor, objects: int) -> Tensor:
    """(P,) int64: the bins of CIELAB colours, finer where those of an object's pixels are more alike.

    Args:
        lab: (P, 3).
        counts: (P,) bool, pixels that say how wide the bins are.
        target: (P,) int64, the object of each pixel.
        objects: T.
    """
    weight = counts[:, None].to(lab.dtype)
    empty = lab.new_zeros(objects, 3)
    number = empty[:, :1].index_add(0, target, weight).clamp(min=1)
    mean = empty.index_add(0, target, lab * weight) / number
    away = lab - mean[target]
    deviation = (empty.index_add(0, target, away**2 * weight) / number).sqrt().clamp(min=LEAST_DEVIATION)
    bins = torch.tensor(BINS, device=lab.device)
    place = ((away / deviation[target] / SPAN + 0.5) * bins).long().clamp(min=0).minimum(bins - 1)
    return (place[:, 0] * BINS[1] + place[:, 1]) * BINS[2] + place[:, 2]


def log_ratio(color: Tensor, mask: Tensor, counts: Tensor, target: Tensor, objects: int) -> Tensor:
    """(P,): log(P(colour | mask) / P(colour | rest)) at each pixel, at most MOST either way.

    Args:
        color: (P,) int64 bins.
        mask: (P,) probability that the pixel belongs to its object.
        counts: (P,) bool, pixels that the histograms are made of.
        target: (P,) int64 its object.
        objects: T.
    """
    size = BINS[0] * BINS[1] * BINS[2]
    place = target * size + color
    parts = torch.stack([mask, 1 - mask]) * counts
    histograms = parts.new_zeros(2, objects * size).index_add(1, place, parts)
    histograms = _smoothed(histograms.view(2 * objects, *BINS)).view(2, objects, size)
    shares = histograms / histograms.sum(-1, keepdim=True).clamp(min=1e-6) + LEAST
    return (shares[0] / shares[1]).log().flatten()[place].clamp(-MOST, MOST)


def _smoothed(histograms: Tensor) -> Tensor:
    """(N, L, a, b): each bin's mean with its neighbours along every axis, weights 1, 2, 1."""
    for axis in (1, 2, 3):
        last = histograms.shape[axis] - 1
        before = torch.cat([histograms.narrow(axis, 0, 1), histograms.narrow(axis, 0, last)], dim=axis)
        after = torch.cat([histograms.narrow(axis, 1, last), histograms.narrow(axis, last, 1)], dim=axis)
        histograms = (before + after) / 4 + histograms / 2
    return histograms


def _margins(targets: Targets, share: float) -> Tensor:
    """(T, 4) int64: so much wider is each side's surroundings, in pixels at stride 4."""
    sides = (targets.ranges[:, 2:] - targets.ranges[:, :2]).repeat(1, 2)
    return (sides * share).long().clamp(min=LEAST_MARGIN)
