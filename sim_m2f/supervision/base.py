"""What supervision by boxes and by masks share: deep supervision, classification, the step counter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.distributed import mean_over_ranks
from sim_m2f.structures import STRIDE, Outputs, Prompted, Prompts, Target
from sim_m2f.supervision.box_edges import BoxEdges
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.matched import Matched
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.prompting import annotated_prompts, match_prompts
from sim_m2f.supervision.pseudo_masks import PseudoLabels
from sim_m2f.supervision.targets import Numbers, Targets, flatten_targets, map_size

Losses = Callable[..., dict[str, Tensor]]  # of layers, what is matched, and whether to count the background


@dataclass(frozen=True)
class Prepared:
    """What is known of a part of a batch before the student has seen it.

    Attributes:
        numbers: (6,) or (4,) float64, its ``Numbers``; those of the whole batch once parts are ``together``.
        labels: those that the teacher makes, if there is one.
        features: (B, d, h, w) the teacher's mask features, if there is one.
        edges: of the pixels of the boxes, if the pairwise loss is in use.
    """

    numbers: Tensor
    labels: PseudoLabels | None = None
    features: Tensor | None = None
    edges: BoxEdges | None = None


def normalised(objects: Targets, numbers: Tensor) -> Targets:
    """The objects with the numbers, (6,) or (4,), of the whole batch."""
    return replace(objects, whole=Numbers(*numbers.float()))


def together(parts: Sequence[Prepared]) -> list[Prepared]:
    """The parts of a rank with the numbers of the whole batch."""
    numbers = mean_over_ranks(torch.stack([part.numbers for part in parts]).sum(0))
    return [replace(part, numbers=numbers) for part in parts]


class Criterion(nn.Module):
    """Base of both criteria.

    ``losses, matched = criterion(outputs, targets, images, teacher_outputs=None)`` changes nothing.
    ``losses`` are weighted scalars by name, each the sum over the decoder layers and normalised over all
    ranks; their sum is the training loss. ``matched`` is what they were computed from: matches, labels,
    pseudo masks. After a training step ``criterion.update(matched)`` keeps what the next one needs, part of
    ``state_dict``.

    A batch may come in parts, whose losses add up to those of the whole: ``prepare`` each, bring these
    ``together``, give each to its call, and ``update`` with what all of them were computed from.

    Where the network was given the objects as prompts, the prompted queries learn by the same losses without
    matching, named "loss_prompt_*".
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.mask_former = keys = cfg.MODEL.MASK_FORMER
        self.points = keys.TRAIN_NUM_POINTS, keys.OVERSAMPLE_RATIO, keys.IMPORTANCE_SAMPLE_RATIO
        self.prompts = cfg.MODEL.SIM.PROMPTS
        self.classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.step = 0

    @torch.no_grad()
    def prepare(
        self, targets: Sequence[Target], images: Tensor, teacher_outputs: Outputs | None = None
    ) -> Prepared:
        """What is known of a part of a batch before the student has seen it; see ``forward``."""
        return Prepared(self.own_numbers(self.objects(targets, images)))

    def update(self, *matched: Matched) -> None:
        """A training step more; ``matched`` are those of all its parts."""
        self.step += 1

    def objects(self, targets: Sequence[Target], images: Tensor) -> Targets:
        """The objects of images (B, 3, H, W)."""
        height, width = map_size(images)
        return flatten_targets(targets, (height // STRIDE, width // STRIDE), images.device)

    def own_numbers(self, objects: Targets) -> Tensor:
        """(4,) float64: the first of the ``Numbers`` of the objects, of which a query claims one at most."""
        counts, pasted = objects.counts, len(objects.pasted_index)
        claimed = sum(min(count, self.mask_former.NUM_OBJECT_QUERIES) for count in counts)
        numbers = torch.tensor([len(counts), sum(counts) - pasted, pasted, claimed], dtype=torch.float64)
        return numbers.to(objects.labels.device, non_blocking=True)

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def student_prompts(self, targets: Sequence[Target], images: Tensor) -> Prompts | None:
        """The objects as prompts of the student, with noise, if MODEL.SIM.PROMPTS.ENABLED."""
        if not self.prompts.ENABLED:
            return None
        noise = self.classes, self.prompts.BOX_NOISE, self.prompts.LABEL_NOISE
        return annotated_prompts(targets, map_size(images), images.device, *noise)

    def teacher_prompts(self, targets: Sequence[Target], images: Tensor) -> Prompts | None:
        """The objects as prompts of the teacher, if MODEL.SIM.PROMPTS.TEACHER."""
        if not (self.prompts.ENABLED and self.prompts.TEACHER):
            return None
        return annotated_prompts(targets, map_size(images), images.device)

    def all_losses(
        self, outputs: Outputs, layers: Layers, matched: Matched, losses: Losses
    ) -> dict[str, Tensor]:
        """``losses`` of the learned queries and, weighted and under their own names, of the prompted ones."""
        found = losses(layers, matched)
        if "prompted" in outputs:
            layers = self.layers(outputs["prompted"])
            prompted = replace(matched, match=match_prompts(layers, matched.objects), predicted=layers.masks)
            for name, loss in losses(layers, prompted, background=False).items():
                found[name.replace("loss_", "loss_prompt_")] = self.prompts.WEIGHT * loss
        return found

    def layers(self, outputs: Outputs | Prompted) -> Layers:
        """The predictions that are supervised, the last layer's last."""
        if not self.mask_former.DEEP_SUPERVISION:
            logits, masks = outputs["pred_logits"][:, None], outputs["pred_masks"][:, None]
        elif "layers" in outputs:
            logits, masks = outputs["layers"]["pred_logits"], outputs["layers"]["pred_masks"]
        else:
            each = [*outputs["aux_outputs"], outputs]
            logits = torch.stack([layer["pred_logits"] for layer in each], dim=1)
            masks = torch.stack([layer["pred_masks"] for layer in each], dim=1)
        return Layers(logits.transpose(0, 1).float(), masks)

    def classification(
        self, logits: Tensor, objects: Targets, match: Match, background: bool = True
    ) -> Tensor:
        """Weighted cross-entropy of all queries of all layers, "no object" for those without an object.

        Without ``background`` these do not count.
        """
        layers, batch, queries, _ = logits.shape
        # a column more takes the labels of the objects that are left over
        target = logits.new_full((layers, batch, queries + 1), self.classes, dtype=torch.int64)
        layer = torch.arange(layers, device=logits.device)[:, None].expand_as(match.query)
        image, labels = objects.image_index.expand_as(match.query), objects.labels.expand_as(match.query)
        query = torch.where(match.matched, match.query, queries)
        target = target.index_put((layer, image, query), labels)[:, :, :-1]
        last = self.mask_former.NO_OBJECT_WEIGHT * background
        weight = F.pad(logits.new_ones(self.classes), (0, 1), value=last)
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), weight, reduction="none")
        numbers = objects.numbers
        found = numbers.claimed if background else numbers.annotated + numbers.pasted
        total = (1 - last) * found + last * queries * numbers.images
        return self.mask_former.CLASS_WEIGHT * loss.sum() / total.clamp(min=1e-6)
