"""From the network's outputs to instances, as Mask2Former's instance inference does it."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import masks_to_boxes

STRIDE = 4


@torch.no_grad()
def instances(
    outputs: dict[str, Tensor],
    image_sizes: list[tuple[int, int]],
    original_sizes: list[tuple[int, int]],
    top_k: int,
) -> list[dict[str, Tensor]]:
    """The best (query, class) pairs of every picture with their masks at the picture's own size.

    A score is the class probability times the mean probability of the mask's pixels.

    Args:
        outputs: "pred_logits" (B, Q, C+1) and "pred_masks" (B, Q, h, w) logits at stride 4.
        image_sizes: height and width of each picture in the network's input, without padding.
        original_sizes: height and width that the masks are wanted in.
        top_k: most instances per picture.

    Returns:
        per picture, best first, {"scores" (K,), "labels" (K,) int64, "masks" (K, H0, W0) bool, "boxes" (K, 4)
        xyxy in pixels around the masks, zeros for an empty mask}.
    """
    probabilities = outputs["pred_logits"].float().softmax(-1)[..., :-1]
    classes = probabilities.shape[-1]
    scores, pairs = probabilities.flatten(1).topk(min(top_k, probabilities[0].numel()), dim=1)
    results = []
    for i, (image_size, original_size) in enumerate(zip(image_sizes, original_sizes, strict=True)):
        logits = _resized(outputs["pred_masks"][i, pairs[i] // classes].float(), image_size, original_size)
        masks = logits > 0
        area = masks.flatten(1).sum(1)
        mask_scores = (logits.sigmoid() * masks).flatten(1).sum(1) / (area + 1e-6)
        result_scores, order = (scores[i] * mask_scores).sort(descending=True, stable=True)
        masks = masks[order]
        results.append(
            {
                "scores": result_scores,
                "labels": (pairs[i] % classes)[order],
                "masks": masks,
                "boxes": _boxes(masks),
            }
        )
    return results


def _resized(logits: Tensor, image_size: tuple[int, int], original_size: tuple[int, int]) -> Tensor:
    """(K, h, w) at stride 4 to the network's input, without its padding, to (K, H0, W0)."""
    height, width = logits.shape[-2:]
    full = F.interpolate(
        logits[None], size=(height * STRIDE, width * STRIDE), mode="bilinear", align_corners=False
    )
    full = full[..., : image_size[0], : image_size[1]]
    return F.interpolate(full, size=original_size, mode="bilinear", align_corners=False)[0]


def _boxes(masks: Tensor) -> Tensor:
    """(K, 4) xyxy with exclusive right and lower ends; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    filled = masks.flatten(1).any(1)
    if filled.any():
        boxes[filled] = masks_to_boxes(masks[filled]) + boxes.new_tensor([0, 0, 1, 1])
    return boxes
