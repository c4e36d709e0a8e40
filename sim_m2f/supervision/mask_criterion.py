"""The losses of a training step from masks: Mask2Former's own, the upper bound for learning from boxes."""

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.data.copy_paste import PasteBank
from sim_m2f.supervision.base import Criterion, Outputs, matched_masks, per_object
from sim_m2f.supervision.mask_supervision import MaskMatcher, mask_losses
from sim_m2f.supervision.targets import flatten_targets


class MaskCriterion(Criterion):
    """Learning from masks as the original does it; see ``Criterion`` for the call."""

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
        bank: PasteBank | None = None,
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
