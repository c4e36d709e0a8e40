"""The two parts of SIM's pseudo mask loss: labels of the prototypes, labels that the correction changed."""

from torch import Tensor

from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.matched import MatchedBoxes


def pseudo_semantic(matched: MatchedBoxes) -> Tensor:
    """Focal loss of the pixels that keep the label of their semantic mask, per labelled pixel."""
    return _per_labelled_pixel(matched, _is_semantic(matched))


def self_correction(matched: MatchedBoxes) -> Tensor:
    """Focal loss of the pixels whose label the instance mask changed, per labelled pixel."""
    return _per_labelled_pixel(matched, ~_is_semantic(matched))


def _is_semantic(matched: MatchedBoxes) -> Tensor:
    """(P,) bool: whether the semantic mask alone would give the same label."""
    labels = matched.supervision.labels
    assert labels is not None
    return labels.final == labels.semantic


def _per_labelled_pixel(matched: MatchedBoxes, chosen: Tensor) -> Tensor:
    """Sum over the layers of the loss of the chosen (P,) pixels, divided by the number of labelled ones."""
    return (matched.label_loss * chosen).sum() / at_least_one(matched.objects.numbers.labelled)
