"""The loss of objects that were pasted by their pseudo masks."""

from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.losses import dice_loss, focal_loss
from sim_m2f.supervision.matched import MatchedBoxes, focal_keys


def copy_paste(matched: MatchedBoxes) -> Tensor:
    """Mean focal loss and dice towards the pasted masks, per pasted object, summed over the layers."""
    objects, pasted = matched.objects, matched.objects.pasted_index
    logits, target = matched.masks.index_select(1, pasted).flatten(2), objects.pasted_masks.flatten(1)
    focal = focal_loss(logits, target.long(), *focal_keys(matched.supervision.sim)).mean(-1)
    loss = focal + dice_loss(logits.sigmoid(), target.float())
    loss = loss * matched.match.matched.index_select(1, pasted)
    return loss.sum() / at_least_one(objects.numbers.pasted)
