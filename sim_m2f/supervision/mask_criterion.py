"""The losses of a training step from masks: Mask2Former's own, the upper bound for learning from boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.structures import Outputs, Target
from sim_m2f.supervision.base import Criterion
from sim_m2f.supervision.mask_supervision import MaskMatcher, mask_losses
from sim_m2f.supervision.matched import Matched, matched_masks, per_object
from sim_m2f.supervision.targets import flatten_targets, map_size


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
    ) -> tuple[dict[str, Tensor], Matched]:
        keys = self.mask_former
        with torch.autocast(images.device.type, enabled=False):
            layers = self.layers(outputs)
            mask_logits = [layer["pred_masks"] for layer in layers]
            logits = torch.stack([layer["pred_logits"] for layer in layers]).float()
            objects = flatten_targets(targets, map_size(mask_logits[0]), images.device)
            truth = [target["masks"].to(images.device) for target in targets]

            match = self.matcher(logits, [layer.float() for layer in mask_logits], truth, objects)
            masks = matched_masks(mask_logits, match, objects)
            sampling = keys.TRAIN_NUM_POINTS, keys.OVERSAMPLE_RATIO, keys.IMPORTANCE_SAMPLE_RATIO
            cross_entropy, dice = mask_losses(masks, torch.cat(truth), *sampling)
        losses = {
            "loss_ce": self.classification(logits, objects, match),
            "loss_mask": keys.MASK_WEIGHT * per_object(cross_entropy, match, objects),
            "loss_dice": keys.DICE_WEIGHT * per_object(dice, match, objects),
        }
        return losses, Matched(objects, match, masks)
