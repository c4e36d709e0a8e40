"""The losses of a training step from masks: Mask2Former's own, the upper bound for learning from boxes."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.distributed import mean_over_ranks
from sim_m2f.structures import Outputs, Target
from sim_m2f.supervision.base import Criterion, Prepared, normalised
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.mask_supervision import MaskMatcher, mask_losses
from sim_m2f.supervision.matched import Matched, per_object


class MaskCriterion(Criterion):
    """Learning from masks as the original does it; see ``Criterion`` for the call."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        keys = self.mask_former
        self.matcher = MaskMatcher(
            keys.CLASS_WEIGHT, keys.MASK_WEIGHT, keys.DICE_WEIGHT, keys.TRAIN_NUM_POINTS
        )

    def forward(
        self,
        outputs: Outputs,
        targets: Sequence[Target],
        images: Tensor,
        teacher_outputs: Outputs | None = None,
        prepared: Prepared | None = None,
    ) -> tuple[dict[str, Tensor], Matched]:
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            objects = self.objects(targets, images)
            numbers = prepared.numbers if prepared else mean_over_ranks(self.own_numbers(objects))
            objects = normalised(objects, numbers)
            truth = [target["masks"].to(images.device, non_blocking=True) for target in targets]
            matched = Matched(objects, self.matcher(layers, truth, objects), layers.masks)
            losses = partial(self._losses, truth=torch.cat(truth))
            return self.all_losses(outputs, layers, matched, losses), matched

    def _losses(
        self, layers: Layers, matched: Matched, truth: Tensor, background: bool = True
    ) -> dict[str, Tensor]:
        """The losses of a group of queries towards the masks (T, H, W), by name."""
        keys = self.mask_former
        cross_entropy, dice = mask_losses(matched.masks, truth, matched.random_points, *self.points)
        return {
            "loss_ce": self.classification(layers.logits, matched.objects, matched.match, background),
            "loss_mask": keys.MASK_WEIGHT * per_object(cross_entropy, matched.match, matched.objects),
            "loss_dice": keys.DICE_WEIGHT * per_object(dice, matched.match, matched.objects),
        }
