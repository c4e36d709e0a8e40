"""Whole pseudo masks behind a quality gate (BoxTeacher, https://arxiv.org/abs/2210.05174, section 3.3)."""

from torch import Tensor

from sim_m2f.supervision.mask_supervision import mask_losses
from sim_m2f.supervision.matched import MatchedBoxes, per_object


def gated_masks(matched: MatchedBoxes) -> Tensor:
    """Cross-entropy and dice towards each object's pseudo mask at uncertain points, per annotated object.

    They are weighted by class probability times IoU of the teacher's mask's box with the annotated one, and
    left out below MIN_QUALITY, so that every object counts alike, and a doubtful one less.
    """
    supervision, labels = matched.supervision, matched.supervision.labels
    assert labels is not None
    good = labels.quality * (labels.quality >= supervision.sim.GATED_MASKS.MIN_QUALITY)
    truth = labels.soft_masks(matched.objects)
    cross_entropy, dice = mask_losses(matched.masks, truth, matched.random_points, *supervision.points)
    return per_object(good * (cross_entropy + dice), matched.by_box, matched.objects)
