"""The losses of a training step from boxes: match queries to boxes, then one line per loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.data.copy_paste import PasteBank
from sim_m2f.distributed import number_over_ranks
from sim_m2f.errors import UserError
from sim_m2f.supervision.affinity import color_affinity, edge_mask, feature_affinity
from sim_m2f.supervision.base import Criterion, Outputs, mask_profiles, matched_masks, per_object
from sim_m2f.supervision.box_fill import box_fill_loss
from sim_m2f.supervision.mask_criterion import MaskCriterion
from sim_m2f.supervision.matcher import BoxMatcher, Match
from sim_m2f.supervision.pairwise import pairwise_loss
from sim_m2f.supervision.projection import dice_loss, projection_loss
from sim_m2f.supervision.pseudo_masks import IGNORED, PseudoLabels, PseudoMasks, focal_loss, pseudo_losses
from sim_m2f.supervision.schedule import fade_out, resolve_steps, started
from sim_m2f.supervision.targets import STRIDE, Targets, flatten_targets


class SIMCriterion(Criterion):
    """Learning from boxes alone (SIM, CVPR 2023); see ``Criterion`` for the call."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.sim = cfg.MODEL.SIM
        matcher = self.sim.MATCHER
        self.matcher = BoxMatcher(matcher.CLASS_WEIGHT, matcher.PROJECTION_WEIGHT, matcher.BOX_WEIGHT)
        self.pseudo_masks = PseudoMasks(cfg)
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(
        self,
        outputs: Outputs,
        targets: list[dict[str, Tensor]],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
        bank: PasteBank | None = None,
    ) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            mask_logits = [layer["pred_masks"] for layer in layers]
            logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
            objects = flatten_targets(targets, mask_logits[0].shape[-2:], images.device)

            match = self.matcher(logits, *mask_profiles(mask_logits), objects)
            masks = matched_masks(mask_logits, match, objects)
            annotated = Match(match.query, match.matched & ~objects.pasted)
            losses = {"loss_ce": self.former.CLASS_WEIGHT * self.classification(logits, objects, match)}
            if self.sim.PROJECTION.ENABLED:
                losses["loss_projection"] = self._projection(masks, objects, annotated)
            if self.sim.PAIRWISE.ENABLED:
                edges = self._edges(images, targets, teacher_outputs)
                losses["loss_pairwise"] = self._pairwise(masks, objects, annotated, edges)
            if self._box_fill_weight() > 0:
                losses["loss_box_fill"] = self._box_fill(masks, objects, annotated)
            if teacher_outputs is not None:
                teacher = self.layers(teacher_outputs), teacher_outputs["mask_features"]
                labels = self.pseudo_masks(*teacher, objects, self.matcher)
                losses |= self._pseudo(masks, objects, annotated, labels)
                if bank is not None:
                    pseudo, scores = labels.masks(objects)
                    bank.add(images, objects, pseudo, scores * ~objects.pasted)
            if self.sim.COPY_PASTE.ENABLED:
                losses["loss_copy_paste"] = self._copy_paste(masks, objects, match)
        self.step += self.training
        return losses

    @property
    def _focal(self) -> tuple[float, float]:
        return self.sim.PSEUDO_MASKS.FOCAL_ALPHA, self.sim.PSEUDO_MASKS.FOCAL_GAMMA

    def _steps(self, steps: float) -> float:
        return resolve_steps(steps, self.max_iter)

    def _weight(self, term: CfgNode) -> float:
        """Weight of a loss at this step, from its keys WEIGHT, START and WARMUP."""
        return term.WEIGHT * started(self.step, self._steps(term.START), self._steps(term.WARMUP))

    def _projection(self, masks: Tensor, objects: Targets, match: Match) -> Tensor:
        loss = projection_loss(masks, *objects.projections)
        return self._weight(self.sim.PROJECTION) * per_object(loss, match, objects)

    def _pairwise(self, masks: Tensor, objects: Targets, match: Match, edges: Tensor) -> Tensor:
        sums, numbers = pairwise_loss(masks, objects, edges, self.sim.PAIRWISE.DILATION)
        counted = number_over_ranks((numbers * match.matched).sum(1))
        return self._weight(self.sim.PAIRWISE) * ((sums * match.matched).sum(1) / counted).sum()

    def _edges(self, images: Tensor, targets: list[dict[str, Tensor]], teacher: Outputs | None) -> Tensor:
        """(B, 4, h, w) bool: the edges between alike and usable pixels."""
        pairwise = self.sim.PAIRWISE
        affinity = color_affinity(images.float() * self.std + self.mean, pairwise.DILATION)
        threshold = pairwise.COLOR_THRESHOLD
        if pairwise.FEATURE_AFFINITY and teacher is not None:
            affinity = affinity * feature_affinity(teacher["mask_features"], pairwise.DILATION)
            threshold = pairwise.PRODUCT_THRESHOLD
        return (affinity >= threshold) & edge_mask(_valid(targets, images), pairwise.DILATION)

    def _box_fill_weight(self) -> float:
        return self.sim.BOX_FILL.WEIGHT * fade_out(self.step, self._steps(self.sim.BOX_FILL.STEPS))

    def _box_fill(self, masks: Tensor, objects: Targets, match: Match) -> Tensor:
        loss = box_fill_loss(masks, objects.box_masks)
        return self._box_fill_weight() * per_object(loss, match, objects)

    def _pseudo(
        self, masks: Tensor, objects: Targets, match: Match, labels: PseudoLabels
    ) -> dict[str, Tensor]:
        """Both losses towards the pseudo masks."""
        pixels, (height, width) = labels.pixels, objects.size
        position = (pixels.target * height + pixels.y) * width + pixels.x
        matched = match.matched[:, pixels.target]
        kept, changed = pseudo_losses(masks.flatten(1).index_select(1, position), labels, *self._focal)
        labelled = number_over_ranks(((labels.final != IGNORED) & matched).sum(1).float())
        losses = {}
        if self.sim.PSEUDO_SEMANTIC.ENABLED:
            semantic = ((kept * matched).sum(1) / labelled).sum()
            losses["loss_pseudo_semantic"] = self._weight(self.sim.PSEUDO_SEMANTIC) * semantic
        if self.sim.SELF_CORRECTION.ENABLED:
            correction = ((changed * matched).sum(1) / labelled).sum()
            losses["loss_self_correction"] = self._weight(self.sim.SELF_CORRECTION) * correction
        return losses

    def _copy_paste(self, masks: Tensor, objects: Targets, match: Match) -> Tensor:
        """Mean focal loss and dice, towards the masks of the pasted objects."""
        pasted = objects.pasted_index
        logits, wanted = masks.index_select(1, pasted).flatten(2), objects.pasted_masks.flatten(1)
        focal = focal_loss(logits, wanted.long(), *self._focal).mean(-1)
        loss = (focal + dice_loss(logits.sigmoid(), wanted.float())) * match.matched.index_select(1, pasted)
        number = number_over_ranks(loss.new_full((), len(pasted)))
        return self._weight(self.sim.COPY_PASTE) * loss.sum() / number


def build_criterion(cfg: CfgNode) -> Criterion:
    """The criterion that MODEL.SIM.SUPERVISION names, its prototypes drawn from ``cfg.SEED``.

    Raises:
        UserError: it names neither "box" nor "mask".
    """
    kinds = {"box": SIMCriterion, "mask": MaskCriterion}
    kind = cfg.MODEL.SIM.SUPERVISION
    if kind not in kinds:
        raise UserError(f"MODEL.SIM.SUPERVISION: {kind!r} does not exist; take 'box' or 'mask'")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.SEED)
        return kinds[kind](cfg)


def _valid(targets: list[dict[str, Tensor]], images: Tensor) -> Tensor:
    """(B, h, w) bool: pixels at stride 4 that lie wholly on usable pixels; all where nothing is said."""
    whole = torch.ones(images.shape[-2:], dtype=torch.bool)
    valid = torch.stack([target.get("valid", whole) for target in targets]).to(
        images.device, non_blocking=True
    )
    return F.avg_pool2d(valid.float(), STRIDE) == 1
