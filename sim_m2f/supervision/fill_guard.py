"""A guard against outlines: masks that fill too little of their boxes learn to fill them.

The pairwise loss draws a pixel to the label that most of its like neighbours have. An empty mask it empties
wherever colours are uniform, and leaves edges and texture, where no edges count: an outline, which spans its
box all the same. For a full mask it works the other way round.
"""

from torch import Tensor

from sim_m2f.supervision.box_fill import fill_losses
from sim_m2f.supervision.matched import MatchedBoxes, per_object
from sim_m2f.supervision.schedule import fade_out, resolve_steps


def fill_guard(matched: MatchedBoxes) -> Tensor:
    """The loss towards the filled box as far as a mask lacks it, beyond what loss_box_fill does anyway."""
    supervision = matched.supervision
    keys = supervision.sim.BOX_FILL
    at_work = fade_out(supervision.step, resolve_steps(keys.STEPS, supervision.max_iter)) * (keys.WEIGHT > 0)
    loss = (matched.deficit - at_work).clamp(min=0) * fill_losses(matched)
    return per_object(loss, matched.by_box, matched.objects)
