"""The loss towards masks corrected by colour."""

from torch import Tensor

from sim_m2f.supervision.mask_supervision import mask_losses
from sim_m2f.supervision.matched import MatchedBoxes, per_object


def color_model(matched: MatchedBoxes) -> Tensor:
    """Cross-entropy and dice at uncertain points, as towards true masks, per annotated object.

    They are weighted by how well the corrected mask fits its box, and left out below MIN_IOU; one that is
    surer than others of its image that are learned, by its confidence to the power TRUST, counts more than
    they. Points lie outside of the boxes too: without the zeros there, masks spread over like objects beside
    theirs.
    """
    supervision, colors = matched.supervision, matched.supervision.colors
    assert colors is not None
    keys = supervision.sim.COLOR_MODEL
    fit = colors.quality * (colors.quality >= keys.MIN_IOU) * matched.objects.by_box
    sure = fit * colors.confidence**keys.TRUST
    image, none = matched.objects.image_index, fit.new_zeros(len(matched.objects.counts))
    fits, sures = (none.index_add(0, image, each) for each in (fit, sure))
    good = sure * (fits / sures.clamp(min=1e-6))[image]
    cross_entropy, dice = mask_losses(matched.masks, colors.masks, matched.random_points, *supervision.points)
    return per_object(good * (cross_entropy + dice), matched.by_box, matched.objects)
