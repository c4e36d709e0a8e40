"""The loss towards masks corrected by colour."""

from torch import Tensor

from sim_m2f.supervision.color_model import color_loss
from sim_m2f.supervision.matched import MatchedBoxes, per_object


def color_model(matched: MatchedBoxes) -> Tensor:
    """Per annotated object, weighted by how well the corrected mask fits its box; none below MIN_IOU."""
    colors = matched.supervision.colors
    assert colors is not None
    good = colors.quality * (colors.quality >= matched.supervision.sim.COLOR_MODEL.MIN_IOU)
    return per_object(
        good * color_loss(matched.masks, colors, matched.objects), matched.annotated, matched.objects
    )
