"""A batch whose objects have found their queries: what every loss is computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.box_edges import BoxEdges
from sim_m2f.supervision.color_model import ColorLabels
from sim_m2f.supervision.losses import focal_loss
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.pseudo_masks import IGNORED, PseudoLabels
from sim_m2f.supervision.schedule import fade_out, resolve_steps
from sim_m2f.supervision.targets import Targets


@dataclass(frozen=True)
class Matched:
    """L decoder layers and T objects, maps (h, w) at stride 4.

    Attributes:
        objects: the T objects.
        match: which query claims which object.
        masks: (L, T, h, w) float32 mask logits of these queries.
    """

    objects: Targets
    match: Match
    masks: Tensor

    @cached_property
    def annotated(self) -> Match:
        """The match without the objects that copy-paste has put there by their pseudo masks."""
        matched = self.match.matched.index_fill(1, self.objects.pasted_index, False)
        return Match(self.match.query, matched)

    @cached_property
    def by_box(self) -> Match:
        """The match of the objects that learn from their boxes: neither pasted nor with a true mask."""
        return Match(self.match.query, self.match.matched & self.objects.by_box)

    def random_points(self, purpose: str, number: int) -> Tensor:
        """(L, T, number, 2) random points on the masks, x and y from 0 to 1."""
        return self.objects.draw(purpose, len(self.masks), number)


@dataclass(frozen=True)
class Supervision:
    """What boxes say about the masks of a batch, for all groups of queries.

    Attributes:
        sim: the keys MODEL.SIM.
        points: number, oversampling and importance of the points at which masks are compared with masks.
        step, max_iter: the steps done, and those of the run.
        images: (B, 3, H, W) float32 RGB, 0 to 255.
        valid: (B, h, w) bool, pixels at stride 4 that lie wholly on usable pixels.
        teacher_features: (B, d, h, w) the teacher's mask features, if there is a teacher.
        labels: of the P pixels of the boxes, if there is a teacher.
        colors: masks corrected by colour, if they are used.
        truth: (S, H, W) bool, the true masks of ``objects.known_index``, if there are any.
        edges: of the boxes' pixels, for the pairwise loss.
    """

    sim: CfgNode
    points: tuple[int, float, float]
    step: int
    max_iter: int
    images: Tensor
    valid: Tensor
    teacher_features: Tensor | None
    labels: PseudoLabels | None
    colors: ColorLabels | None
    truth: Tensor | None = None
    edges: BoxEdges | None = None


@dataclass(frozen=True)
class MatchedBoxes(Matched):
    """The same with what the masks are compared with."""

    supervision: Supervision

    @cached_property
    def deficit(self) -> Tensor:
        """(L, T): how far each mask is from filling its box enough; it fades over FILL_GUARD.FADE."""
        keys = self.supervision.sim.FILL_GUARD
        deficit = fill_deficit(self.masks, self.objects.box_masks, *keys.RANGE)
        if keys.FADE == 0:
            return deficit
        return deficit * fade_out(self.supervision.step, resolve_steps(keys.FADE, self.supervision.max_iter))

    @cached_property
    def labelled(self) -> Tensor:
        """(L, P) bool: pixels of the boxes with a label, of annotated objects that have a query."""
        labels = self.supervision.labels
        assert labels is not None
        return (labels.final != IGNORED) & self.by_box.matched[:, labels.pixels.target]

    @cached_property
    def label_loss(self) -> Tensor:
        """(L, P): focal loss of the pixels of the boxes towards their labels, 0 where there is none."""
        labels = self.supervision.labels
        assert labels is not None
        pixels, (height, width) = labels.pixels, self.objects.size
        position = (pixels.target * height + pixels.y) * width + pixels.x
        logits = self.masks.flatten(1).index_select(1, position)
        return focal_loss(logits, labels.final, *focal_keys(self.supervision.sim)) * self.labelled


def focal_keys(sim: CfgNode) -> tuple[float, float]:
    """Alpha and gamma of the focal losses towards pseudo masks."""
    return sim.PSEUDO_MASKS.FOCAL_ALPHA, sim.PSEUDO_MASKS.FOCAL_GAMMA


def per_object(loss: Tensor, match: Match, objects: Targets) -> Tensor:
    """Sum over layers and matched objects of a loss (L, T), per annotated object of a mean rank."""
    return (loss * match.matched).sum() / at_least_one(objects.numbers.annotated)


def matched_masks(mask_logits: Sequence[Tensor], match: Match, objects: Targets) -> Tensor:
    """(L, T, h, w) float32: the mask logits of the query that claims each object, per layer."""
    return torch.stack(
        [
            layer[objects.image_index, query].float()
            for layer, query in zip(mask_logits, match.query, strict=True)
        ]
    )


@torch.no_grad()
def fill_deficit(logits: Tensor, box_masks: Tensor, least: float, enough: float) -> Tensor:
    """1 where a mask fills at most the share ``least`` of its box, falling linearly to 0 at ``enough``.

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        box_masks: (T, h, w), 1 inside the box.
        least, enough: shares of the box, by the mean of the mask's probabilities.

    Returns:
        (L, T).
    """
    fill = (logits.sigmoid() * box_masks).sum((-2, -1)) / box_masks.sum((-2, -1))
    return ((enough - fill) / max(enough - least, 1e-6)).clamp(0, 1)
