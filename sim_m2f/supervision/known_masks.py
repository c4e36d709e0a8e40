"""Mixed supervision: objects whose true mask is annotated learn from it, the others from their boxes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sim_m2f.structures import Target
from sim_m2f.supervision.mask_supervision import mask_losses
from sim_m2f.supervision.matched import MatchedBoxes, per_object
from sim_m2f.supervision.reading import whole_masks


def known_truth(targets: Sequence[Target], device: torch.device) -> Tensor | None:
    """(S, H, W) bool, in pixels of the input: the masks that are known; None where masks are not read."""
    read = [target for target in targets if "known" in target]
    # mask by mask, because a selection of pinned memory is not pinned
    own = [
        target["masks"][index].to(device, non_blocking=True)
        for target in read
        for index in target["known"].nonzero().flatten().tolist()
    ]
    if own:
        return torch.stack(own)
    return read[0]["masks"][:0].to(device) if read else None


def known_masks(matched: MatchedBoxes) -> Tensor:
    """Cross-entropy and dice at uncertain points, as in supervision by masks, per annotated object.

    Objects that were pasted by their true masks count among these.
    """
    truth, points, objects = matched.supervision.truth, matched.supervision.points, matched.objects
    assert truth is not None
    index = objects.known_index
    cross_entropy, dice = mask_losses(
        whole_masks(matched.predicted, matched.rows.index_select(1, index)),
        truth,
        lambda purpose, number: matched.random_points(purpose, number).index_select(1, index),
        *points,
    )
    loss = torch.zeros_like(matched.match.matched, dtype=dice.dtype).index_add(1, index, cross_entropy + dice)
    return per_object(loss, matched.annotated, objects)
