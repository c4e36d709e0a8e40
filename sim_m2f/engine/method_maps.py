"""What SIM computes on its way to the pseudo masks of an image, as arrays to look at.

The criterion's own modules compute it; neither weights nor prototypes change, and no random number is drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import eval_augmentation
from sim_m2f.data.dataset import SampleReader, TrainDataset
from sim_m2f.data.loader import collate
from sim_m2f.engine.evaluator import evaluation_mode
from sim_m2f.pixels import Pixels
from sim_m2f.structures import STRIDE, Batch, Outputs, Prompts, Size
from sim_m2f.supervision.criterion import SIMCriterion
from sim_m2f.supervision.pseudo_masks import positive_thresholds
from sim_m2f.supervision.targets import Targets, flatten_targets

OUTSIDE = -2  # label of a pixel outside the object's box


@dataclass(frozen=True)
class MethodMaps:
    """One image and its T objects; maps (h, w) are at stride 4 and belong to one object each.

    Attributes:
        name: file name of the image.
        image: (H, W, 3) uint8 RGB, in the network's size, without padding.
        sources: where each of the K positive masks is from: "L3" is the object's query after decoder layer 3
            (0 comes before the first), "+1" a further query of the last layer.
        boxes: (T, 4) xyxy in pixels of ``image``.
        classes: (T,) names of the objects' classes.
        semantic, instance, blend: (T, h, w) M_S, M_I and M, NaN outside the object's box.
        labels: (T, h, w) 1 positive, 0 negative, -1 ignored, ``OUTSIDE`` outside the object's box.
        thresholds: (T,) M from which a pixel is positive.
        positives: (T, K, h, w) probabilities of the teacher's positive masks, NaN outside the object's box.
        weights: (T, K) their weights, 0 for a mask that does not count.
        student: (T, H, W) bool, the mask of the student's query, at the size of ``image``.
    """

    name: str
    image: np.ndarray
    sources: list[str]
    boxes: np.ndarray
    classes: np.ndarray
    semantic: np.ndarray
    instance: np.ndarray
    blend: np.ndarray
    labels: np.ndarray
    thresholds: np.ndarray
    positives: np.ndarray
    weights: np.ndarray
    student: np.ndarray

    def only(self, index: int) -> "MethodMaps":
        """The same image with one object alone."""
        of_image = {"name", "image", "sources"}
        chosen = {key: value[index : index + 1] for key, value in vars(self).items() if key not in of_image}
        return replace(self, **chosen)


class MethodView:
    """The first images of the training set that have objects, always the same, resized as for a test.

    Args:
        cfg: the configuration.
        dataset: the training set.
        number: how many images.
        accelerator: device and precision.

    Raises:
        UserError: an image cannot be decoded.
    """

    def __init__(self, cfg: CfgNode, dataset: TrainDataset, number: int, accelerator: Accelerator) -> None:
        read, divisor = SampleReader(cfg, eval_augmentation(cfg)), cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        self.accelerator, self.pixels = accelerator, Pixels(cfg).to(accelerator.device)
        self.images: list[tuple[str, list[str], Batch]] = []  # file name, names of all classes, batch of one
        for data, image in dataset.images[:number]:
            batch = collate([read(data, image)], divisor=divisor)
            self.images.append((image.file_name, data.class_names, batch))

    @torch.no_grad()
    def maps(self, student: nn.Module, teacher: nn.Module, criterion: SIMCriterion) -> Iterator[MethodMaps]:
        """What the networks, wrapped by accelerate or not, and the criterion make of each image now."""
        for name, class_names, batch in self.images:
            images = self.pixels.of_batch(batch["images"], batch["image_sizes"])
            outputs = self._outputs(student, images)
            prompts = criterion.teacher_prompts(batch["targets"], images)
            teacher_outputs = self._outputs(teacher, images, prompts)
            (*_, rows, columns), (height, width) = outputs["pred_masks"].shape, batch["image_sizes"][0]
            objects = flatten_targets(batch["targets"], (rows, columns), images.device)
            image = batch["images"][0, :, :height, :width].permute(1, 2, 0)
            yield MethodMaps(
                name=name,
                image=image.numpy(),
                boxes=objects.boxes.cpu().numpy(),
                classes=np.array(class_names)[objects.labels.cpu().numpy()],
                student=_student_masks(criterion, outputs, objects)[:, :height, :width].cpu().numpy(),
                **_pseudo_masks(criterion, teacher_outputs, objects, (height, width)),
            )

    def _outputs(self, network: nn.Module, images: Tensor, prompts: Prompts | None = None) -> Outputs:
        network = self.accelerator.unwrap_model(network)
        with evaluation_mode(network), self.accelerator.autocast():
            return network(images, prompts=prompts)


def _pseudo_masks(criterion: SIMCriterion, outputs: Outputs, objects: Targets, size: Size) -> dict[str, Any]:
    """The teacher's share of ``MethodMaps``, from its outputs for an image of this size."""
    (layers, matcher), pseudo = criterion.teacher_layers(outputs), criterion.pseudo_masks
    evidence = pseudo.evidence(layers, outputs["mask_features"], objects, matcher(layers, objects))
    labels = pseudo.labels(evidence)
    pixels, positive, keys = evidence.pixels, evidence.positive, criterion.sim.PSEUDO_MASKS
    bounds = keys.POSITIVE, keys.CONFIDENT
    thresholds = positive_thresholds(labels.blend, evidence.instance, pixels.target, len(objects), *bounds)
    height, width = (-(-length // STRIDE) for length in size)

    def as_maps(values: Tensor, outside: float = torch.nan) -> np.ndarray:
        maps = values.new_full((len(objects), *objects.size), outside)
        maps[pixels.target, pixels.y, pixels.x] = values
        return maps[:, :height, :width].cpu().numpy()

    own = max(positive.layer) + 1  # masks of the object's query, of the decoder's last layers
    first = criterion.mask_former.DEC_LAYERS - own
    masks = [
        layers.masks[0, layer, query[pixels.target], pixels.y, pixels.x]
        for layer, query in zip(positive.layer, positive.query, strict=True)
    ]
    further = range(1, 1 + len(masks) - own)
    return {
        "sources": [*(f"L{first + layer}" for layer in range(own)), *(f"+{number}" for number in further)],
        "semantic": as_maps(evidence.semantic),
        "instance": as_maps(evidence.instance),
        "blend": as_maps(labels.blend),
        "labels": as_maps(labels.final, OUTSIDE),
        "thresholds": thresholds.cpu().numpy(),
        "positives": np.stack([as_maps(mask.float().sigmoid()) for mask in masks], 1),
        "weights": positive.weight.T.cpu().numpy(),
    }


def _student_masks(criterion: SIMCriterion, outputs: Outputs, objects: Targets) -> Tensor:
    """(T, H, W) bool: the last masks of the queries that claim the objects; empty where none does."""
    masks = outputs["pred_masks"]
    match = criterion.matcher(criterion.layers(outputs).last, objects)
    own = masks[0, match.query[0]].float()
    full = F.interpolate(own[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0]
    return (full > 0) & match.matched[0, :, None, None]
