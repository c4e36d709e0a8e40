"""From outputs and images to instances, whose masks colours may correct."""

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.geometry import mask_extents
from sim_m2f.modeling.postprocess import instances, masks_in_boxes
from sim_m2f.modeling.prompts import grown
from sim_m2f.modeling.specks import without_specks
from sim_m2f.structures import Detections, LayerOutputs, Size
from sim_m2f.supervision.color_model import FINER, corrected_masks

TOGETHER = 16  # masks that are corrected together, each with maps of its own at stride 2


@torch.no_grad()
def detections(
    outputs: LayerOutputs,
    images: Tensor,
    image_sizes: list[Size],
    original_sizes: list[Size],
    cfg: CfgNode,
    colors: bool,
) -> list[Detections]:
    """What ``postprocess.instances`` finds, where asked for with masks of good scores corrected by colour.

    Scores and order stay those of the network.

    Args:
        outputs: of the network, see ``postprocess.instances``.
        images: (B, 3, H, W) RGB of 0..255 on any device, the network's input before it is normalised.
        image_sizes: height and width of each image in the input, without padding.
        original_sizes: height and width that the masks are wanted in.
        cfg: TEST and MODEL.SIM.COLOR_MODEL are used.
        colors: whether masks are corrected, as TEST.COLORS says.
    """
    found = instances(outputs, image_sizes, original_sizes, cfg.TEST.DETECTIONS_PER_IMAGE)
    if colors:
        for index, (each, size) in enumerate(zip(found, image_sizes, strict=True)):
            _correct(each, outputs["pred_masks"][index], images[index], size, cfg)
    return found


def _correct(found: Detections, logits: Tensor, image: Tensor, size: Size, cfg: CfgNode) -> None:
    """Correct the masks of one image, and their boxes, in place; ``logits`` (Q, h, w) are all queries'."""
    keys, test = cfg.MODEL.SIM.COLOR_MODEL.clone(), cfg.TEST.COLORS
    keys.defrost()
    keys.KEEP, keys.SMOOTHING, keys.SPAN = test.KEEP, test.SMOOTHING, 0.0
    original: Size = (found["masks"].shape[1], found["masks"].shape[2])
    good = (found["scores"] >= test.MIN_SCORE) & (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)
    index = good.nonzero()[:, 0]
    queries, place = found["queries"][index].unique(return_inverse=True)  # classes of a query share its mask
    boxes = found["boxes"].new_empty(len(queries), 4)
    limits = boxes.new_tensor([original[1], original[0]] * 2)
    boxes[place] = grown(found["boxes"][index], test.GROW).clamp(min=0).minimum(limits)
    scale = boxes.new_tensor([new / old for old, new in zip(original[::-1], size[::-1], strict=True)] * 2)
    image = image.to(logits.device)
    fine_size: Size = (FINER * size[0], FINER * size[1])
    masks = found["masks"].new_empty(len(queries), *original)
    for first in range(0, len(queries), TOGETHER):
        part = slice(first, first + TOGETHER)
        of_part, own = logits[queries[part]].float(), boxes[part]
        fine = corrected_masks(of_part, image, own * scale, size, keys, alone=True)
        masks[part] = without_specks(masks_in_boxes(fine, own, fine_size, original)[0])
    corrected = masks[place]
    kept = corrected.any((1, 2))  # colours may leave nothing
    index, corrected = index[kept], corrected[kept]
    found["masks"][index], found["boxes"][index] = corrected, mask_extents(corrected).to(boxes.dtype)
