"""A batch whose objects have found their queries: what every loss is computed from."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.distributed import at_least_one
from sim_m2f.supervision.box_edges import BoxEdges
from sim_m2f.supervision.color_model import ColorLabels
from sim_m2f.supervision.losses import FocalSums
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.pseudo_masks import IGNORED, PseudoLabels
from sim_m2f.supervision.reading import BoxLogits, box_logits, whole_masks
from sim_m2f.supervision.schedule import fade_out, resolve_steps
from sim_m2f.supervision.targets import BoxPixels, Targets


@dataclass(frozen=True)
class Matched:
    """L decoder layers and T objects, maps (h, w) at stride 4.

    Attributes:
        objects: the T objects.
        match: which query claims which object.
        predicted: (B, L, Q, h, w) mask logits of all queries, in the network's precision.
    """

    objects: Targets
    match: Match
    predicted: Tensor

    @cached_property
    def rows(self) -> Tensor:
        """(L, T) int64: which of the B * L * Q predicted masks are the objects'."""
        _, layers, queries = self.predicted.shape[:3]
        layer = torch.arange(layers, device=self.predicted.device)[:, None]
        return (self.objects.image_index * layers + layer) * queries + self.match.query

    @property
    def masks(self) -> Tensor:
        """(L, T, h, w) float32: the mask logits of these queries, copied anew at each use."""
        return whole_masks(self.predicted, self.rows)

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
        return self.objects.draw(purpose, len(self.rows), number)


@dataclass(frozen=True)
class Supervision:
    """What boxes say about the masks of a batch, for all groups of queries.

    Attributes:
        sim: the keys MODEL.SIM.
        points: number, oversampling and importance of the points at which masks are compared with masks.
        step, max_iter: the steps done, and those of the run.
        images: (B, 3, H, W) float32 RGB, 0 to 255.
        valid: (B, h, w) bool, pixels at stride 4 that lie wholly on usable pixels.
        pixels: the P pixels of the boxes and of the margin around them that holds their pixels' neighbours.
        teacher_features: (B, d, h, w) the teacher's mask features, if there is a teacher.
        labels: of the pixels of the boxes, if there is a teacher.
        colors: masks corrected by colour, if they are used.
        truth: (S, H, W) bool, the true masks of ``objects.known_index``, if there are any.
        edges: of the P pixels, if the pairwise loss is in use.
    """

    sim: CfgNode
    points: tuple[int, float, float]
    step: int
    max_iter: int
    images: Tensor
    valid: Tensor
    pixels: BoxPixels
    teacher_features: Tensor | None
    labels: PseudoLabels | None
    colors: ColorLabels | None
    truth: Tensor | None = None
    edges: BoxEdges | None = None


@dataclass(frozen=True)
class MatchedBoxes(Matched):
    """The same with what the masks are compared with."""

    supervision: Supervision

    @property
    def pixels(self) -> BoxPixels:
        """Those of the supervision."""
        return self.supervision.pixels

    @cached_property
    def inside(self) -> Tensor:
        """(P,) bool: in the box, not in the margin."""
        return self.objects.inside(self.pixels.target, self.pixels.x, self.pixels.y)

    @cached_property
    def logits(self) -> BoxLogits:
        """The masks where the losses read them."""
        return box_logits(self.predicted, self.rows, self.pixels)

    @cached_property
    def deficit(self) -> Tensor:
        """(L, T): how far each mask is from filling its box enough; it fades over FILL_GUARD.FADE."""
        keys, target = self.supervision.sim.FILL_GUARD, self.pixels.target
        areas = self.objects.areas.to(target.device, non_blocking=True)
        within = self.logits.pixels.detach().sigmoid() * self.inside
        fill = within.new_zeros(len(within), len(self.objects)).index_add(1, target, within) / areas
        deficit = fill_deficit(fill, *keys.RANGE)
        if keys.FADE == 0:
            return deficit
        return deficit * fade_out(self.supervision.step, resolve_steps(keys.FADE, self.supervision.max_iter))

    @cached_property
    def label_sums(self) -> Tensor:
        """(2,): sums over layers of the focal loss of pixels towards their labels.

        First those that keep the label of their semantic mask, then those whose label was corrected; of
        objects that learn from their boxes and have a query.
        """
        labels, number = self.supervision.labels, len(self.objects)
        assert labels is not None
        kind = torch.where(labels.final == IGNORED, 2, (labels.final != labels.semantic).long())
        pixels = self.pixels.places(labels.pixels), labels.final == 1, kind * number + labels.pixels.target
        sums = FocalSums.apply(self.logits.pixels, *pixels, 3 * number, *focal_keys(self.supervision.sim))
        return (sums.unflatten(1, (3, number))[:, :2] * self.by_box.matched[:, None]).sum((0, 2))


def focal_keys(sim: CfgNode) -> tuple[float, float]:
    """Alpha and gamma of the focal losses towards pseudo masks."""
    return sim.PSEUDO_MASKS.FOCAL_ALPHA, sim.PSEUDO_MASKS.FOCAL_GAMMA


def per_object(loss: Tensor, match: Match, objects: Targets) -> Tensor:
    """Sum over layers and matched objects of a loss (L, T), per annotated object of a mean rank."""
    return (loss * match.matched).sum() / at_least_one(objects.numbers.annotated)


def fill_deficit(fill: Tensor, least: float, enough: float) -> Tensor:
    """1 where a mask fills at most the share ``least`` of its box, falling linearly to 0 at ``enough``.

    Args:
        fill: any shape, the mean of the mask's probabilities in its box.
        least, enough: shares of the box.
    """
    return ((enough - fill) / max(enough - least, 1e-6)).clamp(0, 1)
