"""The losses of a training step: match queries to boxes, then one line per loss."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.distributed import mean_over_ranks
from sim_m2f.errors import UserError
from sim_m2f.supervision.affinity import color_affinity, edge_mask
from sim_m2f.supervision.box_fill import box_fill_loss
from sim_m2f.supervision.mask_supervision import MaskMatcher, mask_losses
from sim_m2f.supervision.matcher import BoxMatcher, Match
from sim_m2f.supervision.pairwise import pairwise_loss
from sim_m2f.supervision.projection import projection_loss
from sim_m2f.supervision.schedule import fade_out, ramp_up, resolve_steps
from sim_m2f.supervision.targets import STRIDE, Targets, flatten_targets

Outputs = dict[str, Any]


class Criterion(nn.Module):
    """Base of both criteria: deep supervision, classification, the step counter (part of ``state_dict``).

    ``criterion(outputs, targets, images, teacher_outputs=None)`` returns weighted scalars by name, each the
    sum over the decoder layers and normalised over all ranks; their sum is the training loss.

    Args of the call:
        outputs: {"pred_logits": (B, Q, C+1), "pred_masks": (B, Q, h, w) logits at stride 4, "mask_features",
            "aux_outputs": [the first two, per earlier layer]}.
        targets: per picture {"labels": (N,) int64, "boxes": (N, 4) float xyxy in pixels of the input,
            "valid": (H, W) bool, optional, False on padding and on rows without usable annotation,
            "masks": (N, H, W), only for mask supervision}.
        images: (B, 3, H, W), as the network got them.
        teacher_outputs: the teacher's outputs for the same pictures.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.former = cfg.MODEL.MASK_FORMER
        self.classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.step = 0

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def layers(self, outputs: Outputs) -> list[dict[str, Tensor]]:
        """The outputs that are supervised, the last layer's last."""
        earlier = outputs["aux_outputs"] if self.former.DEEP_SUPERVISION else []
        return [*earlier, {name: outputs[name] for name in ("pred_logits", "pred_masks")}]

    def classification(self, logits: Tensor, targets: Targets, match: Match) -> Tensor:
        """Cross-entropy of all queries of all layers, "no object" for those without an object."""
        wanted = logits.new_full(logits.shape[:3], self.classes, dtype=torch.int64)
        layer = torch.arange(len(logits), device=logits.device)[:, None].expand_as(match.query)
        picture = targets.picture.expand_as(match.query)
        labels = targets.labels.expand_as(match.query)
        unclaimed = torch.where(match.matched, labels, wanted[layer, picture, match.query])
        wanted = wanted.index_put((layer, picture, match.query), unclaimed)
        weight = logits.new_ones(self.classes + 1)
        weight[-1] = self.former.NO_OBJECT_WEIGHT
        loss = F.cross_entropy(logits.flatten(0, 2), wanted.flatten(), weight, reduction="none").view(
            len(logits), -1
        )
        total = mean_over_ranks(weight[wanted].flatten(1).sum(1))
        return (loss.sum(1) / total).sum()


def matched_masks(mask_logits: list[Tensor], match: Match, targets: Targets) -> Tensor:
    """(L, T, h, w) float32: the mask logits of the query that claims each object, per layer."""
    return torch.stack(
        [layer[targets.picture, query].float() for layer, query in zip(mask_logits, match.query, strict=True)]
    )


def per_object(loss: Tensor, match: Match, targets: Targets) -> Tensor:
    """Sum over layers and matched objects of a loss (L, T), divided by the objects of a mean rank."""
    objects = mean_over_ranks(loss.new_tensor(float(len(targets)))).clamp(min=1)
    return (loss * match.matched).sum() / objects


class SIMCriterion(Criterion):
    """Learning from boxes alone (design of SIM, CVPR 2023)."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.sim = cfg.MODEL.SIM
        matcher = self.sim.MATCHER
        self.matcher = BoxMatcher(matcher.CLASS_WEIGHT, matcher.PROJECTION_WEIGHT, matcher.BOX_WEIGHT)
        self.register_buffer("mean", torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1), persistent=False)

    def forward(
        self,
        outputs: Outputs,
        targets: list[dict[str, Tensor]],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
    ) -> dict[str, Tensor]:
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            mask_logits = [layer["pred_masks"] for layer in layers]
            logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
            objects = flatten_targets(targets, mask_logits[0].shape[-2:], images.device)

            match = self.matcher(logits, *_projections(mask_logits), objects)
            masks = matched_masks(mask_logits, match, objects)
            losses = {
                "loss_ce": self.former.CLASS_WEIGHT * self.classification(logits, objects, match),
                "loss_projection": self._projection(masks, objects, match),
                "loss_pairwise": self._pairwise(masks, objects, match, self._edges(images, targets)),
            }
            box_fill = self.sim.BOX_FILL.WEIGHT * self._schedule(fade_out, self.sim.BOX_FILL.STEPS)
            if box_fill > 0:
                losses["loss_box_fill"] = box_fill * per_object(
                    box_fill_loss(masks, objects.box_masks), match, objects
                )
        self.step += self.training
        return losses

    def _schedule(self, ramp: Any, steps: float) -> float:
        return ramp(self.step, resolve_steps(steps, self.max_iter))

    def _projection(self, masks: Tensor, objects: Targets, match: Match) -> Tensor:
        loss = projection_loss(masks, *objects.projections)
        return self.sim.PROJECTION.WEIGHT * per_object(loss, match, objects)

    def _pairwise(self, masks: Tensor, objects: Targets, match: Match, edges: Tensor) -> Tensor:
        sums, numbers = pairwise_loss(masks, objects, edges, self.sim.PAIRWISE.DILATION)
        counted = mean_over_ranks((numbers * match.matched).sum(1)).clamp(min=1)
        weight = self.sim.PAIRWISE.WEIGHT * self._schedule(ramp_up, self.sim.PAIRWISE.WARMUP)
        return weight * ((sums * match.matched).sum(1) / counted).sum()

    def _edges(self, images: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """(B, 4, h, w) bool: the edges of like colour between usable pixels."""
        dilation = self.sim.PAIRWISE.DILATION
        affinity = color_affinity(images.float() * self.std + self.mean, dilation)
        return (affinity >= self.sim.PAIRWISE.COLOR_THRESHOLD) & edge_mask(_valid(targets, images), dilation)


class MaskCriterion(Criterion):
    """Learning from masks, as the original does it: the upper bound."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        former = self.former
        self.matcher = MaskMatcher(
            former.CLASS_WEIGHT, former.MASK_WEIGHT, former.DICE_WEIGHT, former.TRAIN_NUM_POINTS
        )

    def forward(
        self,
        outputs: Outputs,
        targets: list[dict[str, Tensor]],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
    ) -> dict[str, Tensor]:
        former = self.former
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            mask_logits = [layer["pred_masks"] for layer in layers]
            logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
            objects = flatten_targets(targets, mask_logits[0].shape[-2:], images.device)
            truth = [target["masks"].to(images.device) for target in targets]

            match = self.matcher(logits, [layer.float() for layer in mask_logits], truth, objects)
            masks = matched_masks(mask_logits, match, objects)
            sampling = former.TRAIN_NUM_POINTS, former.OVERSAMPLE_RATIO, former.IMPORTANCE_SAMPLE_RATIO
            cross_entropy, dice = mask_losses(masks, torch.cat(truth), *sampling)
        self.step += self.training
        return {
            "loss_ce": former.CLASS_WEIGHT * self.classification(logits, objects, match),
            "loss_mask": former.MASK_WEIGHT * per_object(cross_entropy, match, objects),
            "loss_dice": former.DICE_WEIGHT * per_object(dice, match, objects),
        }


def build_criterion(cfg: CfgNode) -> Criterion:
    """The criterion that MODEL.SIM.SUPERVISION names.

    Raises:
        UserError: it names neither "box" nor "mask".
    """
    kinds = {"box": SIMCriterion, "mask": MaskCriterion}
    kind = cfg.MODEL.SIM.SUPERVISION
    if kind not in kinds:
        raise UserError(f"MODEL.SIM.SUPERVISION: {kind!r} does not exist; take 'box' or 'mask'")
    return kinds[kind](cfg)


@torch.no_grad()
def _projections(mask_logits: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, B, Q, w) and (L, B, Q, h): the largest mask probability of every column and of every row."""
    along_x = torch.stack([layer.amax(-2) for layer in mask_logits]).float().sigmoid()
    along_y = torch.stack([layer.amax(-1) for layer in mask_logits]).float().sigmoid()
    return along_x, along_y


def _valid(targets: list[dict[str, Tensor]], images: Tensor) -> Tensor:
    """(B, h, w) bool: pixels at stride 4 that lie wholly on usable pixels; all where nothing is said."""
    whole = torch.ones(images.shape[-2:], dtype=torch.bool)
    valid = torch.stack([target.get("valid", whole) for target in targets]).to(
        images.device, non_blocking=True
    )
    return F.avg_pool2d(valid.float(), STRIDE) == 1
