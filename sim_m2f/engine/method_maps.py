"""What SIM computes on its way to the pseudo masks of an image, as arrays to look at.

The criterion's own modules compute it; neither weights nor prototypes change, and no random number is drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.data.augmentation import eval_augmentation
from sim_m2f.data.dataset import TrainDataset, network_input, read_sample
from sim_m2f.data.loader import collate
from sim_m2f.engine.evaluator import evaluation_mode
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Batch, Outputs
from sim_m2f.supervision.criterion import SIMCriterion
from sim_m2f.supervision.matcher import mask_projections
from sim_m2f.supervision.pseudo_masks import PositiveMasks, positive_thresholds
from sim_m2f.supervision.targets import STRIDE, Targets, flatten_targets

OUTSIDE = -2  # label of a pixel outside the object's box


@dataclass(frozen=True)
class MethodMaps:
    """One image and its T objects; maps (h, w) are at stride 4 and belong to one object each.

    Attributes:
        name: file name of the image.
        image: (H, W, 3) uint8 RGB, in the network's size, without padding.
        boxes: (T, 4) xyxy in pixels of ``image``.
        classes: names of the objects' classes.
        semantic, instance, blend: (T, h, w) M_S, M_I and M, NaN outside the object's box.
        labels: (T, h, w) 1 positive, 0 negative, -1 ignored, ``OUTSIDE`` outside the object's box.
        thresholds: (T,) M from which a pixel is positive.
        positives: (K, T, h, w) probabilities of the teacher's positive masks, NaN outside the object's box.
        weights: (K, T) their weights, 0 for a mask that does not count.
        sources: where each of the K masks is from: "L3" is the object's query after decoder layer 3 (0 comes
            before the first), "+1" a further query of the last layer.
        student: (T, H, W) bool, the mask of the student's query, at the size of ``image``.
    """

    name: str
    image: np.ndarray
    boxes: np.ndarray
    classes: list[str]
    semantic: np.ndarray
    instance: np.ndarray
    blend: np.ndarray
    labels: np.ndarray
    thresholds: np.ndarray
    positives: np.ndarray
    weights: np.ndarray
    sources: list[str]
    student: np.ndarray


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
        self.accelerator = accelerator
        self.pixels = Pixels(cfg)
        self.batches: list[Batch] = []
        self.labelling: list[tuple[str, list[str]]] = []  # file name and names of all classes
        augment, divisor = eval_augmentation(cfg), cfg.MODEL.MASK_FORMER.SIZE_DIVISIBILITY
        for data, image in dataset.images[:number]:
            sample = augment(read_sample(data, image, cfg.INPUT.BOTTOM_ROWS))
            self.batches.append(collate([network_input(self.pixels, image, sample)], divisor=divisor))
            self.labelling.append((image.file_name, data.class_names))

    def maps(self, student: nn.Module, teacher: nn.Module, criterion: SIMCriterion) -> Iterator[MethodMaps]:
        """What the networks, wrapped by accelerate or not, and the criterion make of each image now."""
        for batch, (name, class_names) in zip(self.batches, self.labelling, strict=True):
            images = batch["images"].to(self.accelerator.device, memory_format=torch.channels_last)
            outputs, teacher_outputs = (self._outputs(network, images) for network in (student, teacher))
            objects = flatten_targets(batch["targets"], outputs["pred_masks"].shape[-2:], images.device)
            yield self._maps(name, class_names, batch, objects, criterion, outputs, teacher_outputs)

    @torch.no_grad()
    def _outputs(self, network: nn.Module, images: Tensor) -> Outputs:
        network = self.accelerator.unwrap_model(network)
        with evaluation_mode(network), self.accelerator.autocast():
            return network(images)

    @torch.no_grad()
    def _maps(
        self,
        name: str,
        class_names: list[str],
        batch: Batch,
        objects: Targets,
        criterion: SIMCriterion,
        outputs: Outputs,
        teacher_outputs: Outputs,
    ) -> MethodMaps:
        layers, pseudo = criterion.layers(teacher_outputs), criterion.pseudo_masks
        evidence = pseudo.evidence(layers, teacher_outputs["mask_features"], objects, criterion.matcher)
        labels = pseudo.labels(evidence, len(objects))
        pixels, positive = evidence.pixels, evidence.positive
        masks = criterion.sim.PSEUDO_MASKS
        thresholds = positive_thresholds(
            labels.blend,
            evidence.instance,
            pixels.target,
            len(objects),
            masks.POSITIVE,
            masks.CONFIDENT,
        )
        height, width = batch["image_sizes"][0]
        cells = slice(None), slice(-(-height // STRIDE)), slice(-(-width // STRIDE))

        def as_maps(values: Tensor, outside: float) -> np.ndarray:
            maps = values.new_full((len(objects), *objects.size), outside)
            maps[pixels.target, pixels.y, pixels.x] = values
            return maps[cells].cpu().numpy()

        masks = [
            layers[layer - 1 - max(positive.layer)]["pred_masks"][0, query[pixels.target], pixels.y, pixels.x]
            for layer, query in zip(positive.layer, positive.query, strict=True)
        ]
        image = self.pixels.undo(batch["images"][0])[:, :height, :width].permute(1, 2, 0).numpy()
        return MethodMaps(
            name=name,
            image=image.round().clip(0, 255).astype(np.uint8),
            boxes=objects.boxes.cpu().numpy(),
            classes=[class_names[label] for label in objects.labels.tolist()],
            semantic=as_maps(evidence.semantic, torch.nan),
            instance=as_maps(evidence.instance, torch.nan),
            blend=as_maps(labels.blend, torch.nan),
            labels=as_maps(labels.final, OUTSIDE),
            thresholds=thresholds.cpu().numpy(),
            positives=np.stack([as_maps(mask.float().sigmoid(), torch.nan) for mask in masks]),
            weights=positive.weight.cpu().numpy(),
            sources=_sources(positive, criterion.mask_former.DEC_LAYERS),
            student=_student_masks(criterion, outputs, objects)[:, :height, :width].cpu().numpy(),
        )


def _sources(positive: PositiveMasks, layers: int) -> list[str]:
    """Names of the positive masks: those of the decoder's last layers, then further queries."""
    own = max(positive.layer) + 1
    further = [f"+{number + 1}" for number in range(len(positive.layer) - own)]
    return [f"L{layers - own + layer}" for layer in range(own)] + further


def _student_masks(criterion: SIMCriterion, outputs: Outputs, objects: Targets) -> Tensor:
    """(T, H, W) bool: the last masks of the queries that claim the objects; empty where none does."""
    masks = outputs["pred_masks"]
    match = criterion.matcher(outputs["pred_logits"][None].float(), *mask_projections([masks]), objects)
    own = masks[0, match.query[0]].float()
    full = F.interpolate(own[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)[0]
    return (full > 0) & match.matched[0, :, None, None]
