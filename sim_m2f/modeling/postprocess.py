"""From the network's outputs to instances, as Mask2Former's instance inference does it."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.geometry import extent, missing_logits
from sim_m2f.structures import STRIDE, Detections, LayerOutputs, Size

MOST_RISE = 8.0  # logits, of a mask that has to span its box
CHUNK = 4  # masks that are brought to full size together


@torch.no_grad()
def instances(
    outputs: LayerOutputs, image_sizes: list[Size], original_sizes: list[Size], top_k: int
) -> list[Detections]:
    """The best (query, class) pairs of every image with their masks at the image's own size.

    A score is the class probability times the mean probability of the mask's pixels.

    Args:
        outputs: "pred_logits" (B, Q, C+1) and "pred_masks" (B, Q, h, w) logits at stride 4.
        image_sizes: height and width of each image in the network's input, without padding.
        original_sizes: height and width that the masks are wanted in.
        top_k: most instances per image.

    """
    probabilities = outputs["pred_logits"].float().softmax(-1)[..., :-1]
    classes = probabilities.shape[-1]
    scores, pairs = probabilities.flatten(1).topk(min(top_k, probabilities[0].numel()), dim=1)
    results: list[Detections] = []
    for i, (image_size, original_size) in enumerate(zip(image_sizes, original_sizes, strict=True)):
        queries, query = (pairs[i] // classes).unique(return_inverse=True)
        logits = outputs["pred_masks"][i, queries].float()
        masks, boxes, mask_scores = _found(logits, image_size, original_size)
        result_scores, order = (scores[i] * mask_scores[query]).sort(descending=True, stable=True)
        query, labels = query[order], (pairs[i] % classes)[order]
        results.append(
            {
                "scores": result_scores,
                "labels": labels,
                "masks": masks[query],
                "boxes": boxes[query],
                "queries": queries[query],
            }
        )
    return results


@torch.no_grad()
def masks_in_boxes(
    logits: Tensor,
    boxes: Tensor,
    image_size: Size,
    original_size: Size,
    span: float = 0.0,
    ellipse: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The masks of given boxes at the image's own size, without what lies outside of their boxes.

    Args:
        logits: (N, h, w) mask logits of the boxes' queries, stride 4.
        boxes: (N, 4) xyxy in pixels of the original image; a pixel is inside when its centre is.
        image_size: height and width of the image in the network's input, without padding.
        original_size: height and width that the masks are wanted in.
        span: share of its box that the box around a mask has to cover; all logits of a mask rise until it
            does, see ``geometry.missing_logits``.
        ellipse: logit in the middle of the box, before that, of the ellipse that touches its sides.

    Returns:
        (N, H0, W0) bool, and (N,) scores: the mean probability of the pixels of the mask, before it rose.
    """
    masks = torch.empty(len(logits), *original_size, dtype=torch.bool, device=logits.device)
    (in_columns, across), (in_rows, down) = (
        _in_box(boxes[:, axis, None], boxes[:, axis + 2, None], original_size[1 - axis]) for axis in (0, 1)
    )
    scores = logits.new_empty(len(logits), dtype=torch.float32)
    for part, full in _full_size(logits.float(), image_size, original_size):
        inside = in_rows[part, :, None] & in_columns[part, None, :]
        own = full + ellipse * (1 - across[part, None, :] - down[part, :, None])
        own = own.where(inside, -torch.inf)
        areas = in_columns[part].sum(1) * in_rows[part].sum(1)
        rise = missing_logits(own.amax(1), own.amax(2), areas, span, MOST_RISE)
        mask = torch.gt(own, -rise[:, None, None], out=masks[part])
        scores[part] = _mean_probability(full, mask)
    return masks, scores


def _in_box(first: Tensor, last: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Along one axis of boxes with sides at (N, 1): (N, length) bool, whether pixels' centres are inside, and
    (N, length) their squared distance from the middle, 1 at the sides."""
    centres = torch.arange(length, device=first.device) + 0.5
    return (centres >= first) & (centres < last), ((2 * centres - first - last) / (last - first)).square()


def _found(logits: Tensor, image_size: Size, original_size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (K, H0, W0) of logits (K, h, w) at stride 4, their boxes, their pixels' mean probability."""
    masks = torch.empty(len(logits), *original_size, dtype=torch.bool, device=logits.device)
    boxes, scores = logits.new_empty(len(logits), 4), logits.new_empty(len(logits))
    for part, full in _full_size(logits, image_size, original_size):
        mask = torch.gt(full, 0, out=masks[part])
        top, bottom = extent(full.amax(2) > 0)
        left, right = extent(full.amax(1) > 0)
        boxes[part] = torch.stack([left, top, right, bottom], dim=1)
        scores[part] = _mean_probability(full, mask)
    return masks, boxes, scores


def _mean_probability(logits: Tensor, masks: Tensor) -> Tensor:
    """(K,) of the pixels of masks (K, H, W); the logits are overwritten."""
    return logits.sigmoid_().mul_(masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)


def _full_size(logits: Tensor, image_size: Size, original_size: Size) -> Iterator[tuple[slice, Tensor]]:
    """Logits (K, h, w) at stride 4 as logits (k, H0, W0), and which these are.

    A few masks at a time, so that their logits at full size stay in the caches.
    """
    vertical, horizontal = (
        _resizing(length, size, original, logits.device)
        for length, size, original in zip(logits.shape[-2:], image_size, original_size, strict=True)
    )
    for start in range(0, len(logits), CHUNK):
        part = slice(start, start + CHUNK)
        yield part, vertical.T @ (logits[part] @ horizontal)


def _resizing(length: int, size: int, original: int, device: torch.device) -> Tensor:
    """(length, original): one axis from stride 4 to the network's input, without its padding, to the image.

    Both steps are bilinear, that is, linear and separable, so this matrix per axis is all of it.
    """
    axis = torch.eye(length, device=device)[None]
    full = F.interpolate(axis, size=length * STRIDE, mode="linear", align_corners=False)[..., :size]
    return F.interpolate(full, size=original, mode="linear", align_corners=False)[0]
