"""Masks for boxes that others make, with a confidence each: GrabCut, and SAM through transformers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.coco import CocoData, ImageRecord
from sim_m2f.errors import UserError, first_line
from sim_m2f.labelling.masks import corners, ellipse, filled
from sim_m2f.labelling.run import fingerprint, mask_fields

GRABCUT, SAM = "grabcut", "sam:"
ITERATIONS = 3, 2  # of GrabCut, before and after its mask is looked at for the first time
TOGETHER = 32  # boxes that SAM answers at a time

# Of an image (H, W, 3) uint8 RGB and boxes (N, 4) xyxy: masks (N, H, W) bool, and confidence (N,), 0 to 1.
Finder = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Proposer:
    """What makes the masks, and the network that it makes them with, if any."""

    name: str
    find: Finder
    network: nn.Module | None = None

    def identity(self, source: DatasetSource) -> str:
        """Changes with anything that changes all masks."""
        return fingerprint(source, self.network, self.name)

    def scored(self, label: dict[str, Any]) -> dict[str, Any]:
        """What ``labelling`` gave, which has its confidence already."""
        return label

    def labelling(self, data: CocoData) -> Callable[[ImageRecord], dict[int, Any]]:
        """What gives the masks of an image by annotation id: within their boxes, none of them empty."""
        return partial(self._labels, data)

    def _labels(self, data: CocoData, image: ImageRecord) -> dict[int, Any]:
        size = image.height, image.width
        found, scores = self.find(data.read_image(image), image.boxes)
        masks = found & np.stack([filled(box, *size) for box in image.boxes])
        for index in np.flatnonzero(~masks.any((1, 2))):
            masks[index], scores[index] = ellipse(image.boxes[index], *size), 0.0
        rows = zip(image.annotation_ids, mask_fields(masks), scores, strict=True)
        return {number: fields | {"score": round(float(score), 4)} for number, fields, score in rows}


def find_proposer(name: str, device: str = "auto") -> Proposer:
    """The one of a name: "grabcut", or "sam:" and a folder or a name on the Hub of SAM or SAM 2.

    Raises:
        UserError: there is none of the name, or SAM cannot be loaded.
    """
    if name == GRABCUT:
        return Proposer(name, grabcut)
    if not name.startswith(SAM) or name == SAM:
        raise UserError(f"--with {name}: is unknown; take {GRABCUT} or {SAM}NAME, a folder or name of SAM")
    return load_sam(name, device)


def grabcut(pixels: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's GrabCut from each box (Rother, Kolmogorov and Blake, 2004); see ``Finder``."""
    found = [grabcut_mask(pixels, box) for box in boxes]
    return np.stack([mask for mask, _ in found]), np.array([score for _, score in found])


def grabcut_mask(pixels: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, float]:
    """A mask (H, W) bool, and how far it has settled: its IoU with the mask two iterations before.

    A box without surroundings is filled, and so is one where nothing is found; their confidence is 0.
    """
    import cv2

    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = corners(box, height, width)
    if x1 - x0 == width and y1 - y0 == height:
        return filled(box, height, width), 0.0
    labels, models = np.zeros((height, width), np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
    bgr, rectangle = np.ascontiguousarray(pixels[..., ::-1]), (x0, y0, x1 - x0, y1 - y0)
    cv2.setRNGSeed(0)
    masks = []
    for iterations, mode in zip(ITERATIONS, (cv2.GC_INIT_WITH_RECT, cv2.GC_EVAL), strict=True):
        cv2.grabCut(bgr, labels, rectangle, *models, iterations, mode)
        masks.append((labels == cv2.GC_FGD) | (labels == cv2.GC_PR_FGD))
    first, last = masks
    if not last.any():
        return filled(box, height, width), 0.0
    return last, float((first & last).sum() / (first | last).sum())


def load_sam(name: str, device: str) -> Proposer:
    """SAM or SAM 2 by its name after "sam:", from safetensors alone, in float32; boxes are its prompts.

    Of its three masks for a box the one counts whose predicted IoU is the highest, which is its confidence.

    Raises:
        UserError: it cannot be loaded, or the device is not there.
    """
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    path = name.removeprefix(SAM)
    try:
        processor = AutoProcessor.from_pretrained(path)
        network = AutoModelForMaskGeneration.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
        network = network.to(device).eval()
    except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        fault = f"cannot be loaded ({first_line(error)})"
        raise UserError(f"--with {name}: {fault}; give a folder or name of SAM or SAM 2") from error
    return Proposer(name, partial(_sam_masks, processor, network), network)


@torch.no_grad()
def _sam_masks(
    processor: Any, network: Any, pixels: np.ndarray, boxes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Masks and predicted IoU; see ``Finder``."""
    inputs = processor(images=pixels, input_boxes=[boxes.tolist()], return_tensors="pt").to(network.device)
    seen = network.get_image_embeddings(inputs["pixel_values"])
    sizes = [inputs[key] for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
    masks, scores = [], []
    for prompts in inputs["input_boxes"].float().split(TOGETHER, dim=1):
        outputs = network(image_embeddings=seen, input_boxes=prompts, multimask_output=True)
        score, best = outputs.iou_scores[0].max(1)
        logits = outputs.pred_masks[:, torch.arange(len(best)), best][0][:, None]
        masks.append(processor.post_process_masks([logits.cpu()], *sizes)[0][:, 0].numpy())
        scores.append(score.clamp(0, 1).cpu().numpy())
    return np.concatenate(masks), np.concatenate(scores)
