"""The loss of objects that were pasted by their pseudo masks."""

import torch
from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.losses import dice_loss, focal_loss
from sim_m2f.supervision.matched import MatchedBoxes, focal_keys
from sim_m2f.supervision.reading import recomputed


def copy_paste(matched: MatchedBoxes) -> Tensor:
    """Mean focal loss and dice towards the pasted masks, per pasted object, summed over the layers."""
    objects, pasted = matched.objects, matched.objects.pasted_index
    truth, keys = objects.pasted_masks.flatten(1), focal_keys(matched.supervision.sim)
    number = at_least_one(objects.numbers.pasted)
    if not len(pasted):  # else nothing would have a gradient of all masks
        return torch.zeros_like(number)

    def each(masks: Tensor) -> Tensor:
        logits = masks.flatten(2)
        return focal_loss(logits, truth, *keys).mean(-1) + dice_loss(logits.sigmoid(), truth.float())

    loss = recomputed(each, matched.predicted, matched.rows.index_select(1, pasted))
    return (loss * matched.match.matched.index_select(1, pasted)).sum() / number
