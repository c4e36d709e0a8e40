"""The losses of a training step from boxes: match queries to boxes, then one line per loss.

A loss is a file beside this one with a function of ``MatchedBoxes``, a line of ``TERMS`` and its keys.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.pixels import Pixels
from sim_m2f.structures import Outputs, Target
from sim_m2f.supervision.base import Criterion
from sim_m2f.supervision.box_fill import box_fill
from sim_m2f.supervision.label_terms import pseudo_semantic, self_correction
from sim_m2f.supervision.mask_criterion import MaskCriterion
from sim_m2f.supervision.matched import Matched, MatchedBoxes, matched_masks
from sim_m2f.supervision.matcher import BoxMatcher, mask_projections
from sim_m2f.supervision.pairwise import pairwise
from sim_m2f.supervision.paste_loss import copy_paste
from sim_m2f.supervision.projection import projection
from sim_m2f.supervision.pseudo_masks import PseudoMasks
from sim_m2f.supervision.schedule import term_weight
from sim_m2f.supervision.targets import STRIDE, flatten_targets, map_size

# The losses by name: their group of keys under MODEL.SIM, and the function that computes them.
TERMS: dict[str, tuple[str, Callable[[MatchedBoxes], Tensor]]] = {
    "loss_projection": ("PROJECTION", projection),
    "loss_pairwise": ("PAIRWISE", pairwise),
    "loss_box_fill": ("BOX_FILL", box_fill),
    "loss_pseudo_semantic": ("PSEUDO_SEMANTIC", pseudo_semantic),
    "loss_self_correction": ("SELF_CORRECTION", self_correction),
    "loss_copy_paste": ("COPY_PASTE", copy_paste),
}
FROM_LABELS = (pseudo_semantic, self_correction)  # these need the teacher's outputs


class SIMCriterion(Criterion):
    """Learning from boxes alone (SIM, CVPR 2023); see ``Criterion`` for the call."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.sim = cfg.MODEL.SIM
        matcher = self.sim.MATCHER
        self.matcher = BoxMatcher(matcher.CLASS_WEIGHT, matcher.PROJECTION_WEIGHT, matcher.BOX_WEIGHT)
        self.pseudo_masks = PseudoMasks(cfg)
        self.pixels = Pixels(cfg)

    def forward(
        self,
        outputs: Outputs,
        targets: Sequence[Target],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
    ) -> tuple[dict[str, Tensor], MatchedBoxes]:
        with torch.autocast(images.device.type, enabled=False):
            logits, matched = self._match(outputs, targets, images, teacher_outputs)
            losses = {"loss_ce": self.classification(logits, matched.objects, matched.match)}
            for name, (group, term) in TERMS.items():
                keys = self.sim[group]
                weight = term_weight(keys, self.step, self.max_iter)
                if self._is_used(keys, weight) and not (term in FROM_LABELS and matched.labels is None):
                    losses[name] = weight * term(matched)
        return losses, matched

    def update(self, matched: Matched) -> None:
        """A training step more; the prototypes follow the teacher's features."""
        super().update(matched)
        assert isinstance(matched, MatchedBoxes)
        if matched.labels is not None and matched.teacher_features is not None:
            self.pseudo_masks.update(matched.teacher_features, matched.objects, matched.labels)

    def _match(
        self, outputs: Outputs, targets: Sequence[Target], images: Tensor, teacher_outputs: Outputs | None
    ) -> tuple[Tensor, MatchedBoxes]:
        """(L, B, Q, C+1) class logits, and the batch with its matches and the labels of its pixels."""
        layers = self.layers(outputs)
        mask_logits = [layer["pred_masks"] for layer in layers]
        logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
        objects = flatten_targets(targets, map_size(mask_logits[0]), images.device)
        match = self.matcher(logits, *mask_projections(mask_logits), objects)
        features = labels = None
        if teacher_outputs is not None:
            features = teacher_outputs["mask_features"]
            labels = self.pseudo_masks(self.layers(teacher_outputs), features, objects, self.matcher)
        return logits, MatchedBoxes(
            sim=self.sim,
            objects=objects,
            match=match,
            masks=matched_masks(mask_logits, match, objects),
            images=self.pixels.undo(images),
            valid=_valid(targets, images),
            teacher_features=features,
            labels=labels,
        )

    def _is_used(self, keys: CfgNode, weight: float) -> bool:
        """A loss that starts later is there from the first step on; one that has faded out is gone."""
        return keys.ENABLED if "ENABLED" in keys else weight > 0


def build_criterion(cfg: CfgNode) -> Criterion:
    """The criterion that MODEL.SIM.SUPERVISION names, its prototypes drawn from ``cfg.SEED``."""
    kinds: dict[str, type[Criterion]] = {"box": SIMCriterion, "mask": MaskCriterion}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        return kinds[cfg.MODEL.SIM.SUPERVISION](cfg)


def _valid(targets: Sequence[Target], images: Tensor) -> Tensor:
    """(B, h, w) bool: pixels at stride 4 that lie wholly on usable pixels; all where nothing is said."""
    whole = torch.ones(images.shape[-2:], dtype=torch.bool)
    valid = torch.stack([target.get("valid", whole) for target in targets])
    return F.avg_pool2d(valid.to(images.device, non_blocking=True).float(), STRIDE) == 1
