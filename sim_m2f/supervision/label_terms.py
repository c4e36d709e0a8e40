"""The two parts of SIM's pseudo mask loss: labels of the prototypes, labels that the correction changed."""

from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.matched import MatchedBoxes


def pseudo_semantic(matched: MatchedBoxes) -> Tensor:
    """Focal loss of the pixels that keep the label of their semantic mask, per labelled pixel."""
    return matched.label_sums[0] / at_least_one(matched.objects.numbers.labelled)


def self_correction(matched: MatchedBoxes) -> Tensor:
    """Focal loss of the pixels whose label the instance mask changed, per labelled pixel."""
    return matched.label_sums[1] / at_least_one(matched.objects.numbers.labelled)
