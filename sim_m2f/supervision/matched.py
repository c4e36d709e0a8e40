"""A batch whose objects have found their queries: what every loss is computed from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sim_m2f.config import CfgNode
from sim_m2f.distributed import number_over_ranks
from sim_m2f.supervision.affinity import alike_edges
from sim_m2f.supervision.color_model import ColorLabels
from sim_m2f.supervision.losses import focal_loss
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.pseudo_masks import IGNORED, PseudoLabels
from sim_m2f.supervision.schedule import fade_out, resolve_steps
from sim_m2f.supervision.targets import BoxPixels, Targets, box_pixels


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
        """The match without the objects that copy-paste has put there."""
        return Match(self.match.query, self.match.matched & ~self.objects.pasted)

    @cached_property
    def by_box(self) -> Match:
        """The match of the objects that learn from their boxes: neither pasted nor with a true mask."""
        matched = self.annotated.matched.index_fill(1, self.objects.known_index, False)
        return Match(self.match.query, matched)


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

    @cached_property
    def edges(self) -> Tensor:
        """(B, 4, h, w) bool: see ``alike_edges``."""
        return alike_edges(self.images, self.valid, self.teacher_features, self.sim.PAIRWISE)


class _Read(torch.autograd.Function):
    """Values of the predicted masks at two lists of places, with one gradient of the masks.

    Nothing is kept but the lists, and of the first one, which is long, only what it is made from.

    Takes masks (B, L, Q, h, w), first places of masks (L, T), objects (P,) and places in a mask (P,) of
    pixels, and further places (L, T, K); returns (L, P) and (L, T, K) float32.
    """

    @staticmethod
    def forward(
        ctx: Any, masks: Tensor, first: Tensor, target: Tensor, pixel: Tensor, further: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(first, target, pixel, further)
        ctx.like = masks.shape, masks.dtype
        flat, places = masks.flatten(), first.index_select(1, target).add_(pixel)
        return flat[places].float(), flat[further].float()

    @staticmethod
    def backward(ctx: Any, of_pixels: Tensor, of_further: Tensor) -> tuple[Tensor | None, ...]:
        (first, target, pixel, further), (shape, dtype) = ctx.saved_tensors, ctx.like
        gradient = torch.zeros(shape, dtype=dtype, device=of_pixels.device)
        flat, places = gradient.view(-1), first.index_select(1, target).add_(pixel)
        flat.index_add_(0, places.view(-1), of_pixels.reshape(-1).to(dtype))
        flat.index_add_(0, further.view(-1), of_further.reshape(-1).to(dtype))
        return gradient, None, None, None, None


class BoxLogits(NamedTuple):
    """All that the losses in boxes read of the masks; float32 logits.

    pixels: (L, P) at the P pixels of ``MatchedBoxes.pixels``.
    along_x, along_y: (L, T, w) and (L, T, h), the largest of every column and of every row; one of equal
        ones receives the gradient.
    """

    pixels: Tensor
    along_x: Tensor
    along_y: Tensor


@dataclass(frozen=True)
class MatchedBoxes(Matched):
    """The same with what the masks are compared with."""

    supervision: Supervision

    @cached_property
    def pixels(self) -> BoxPixels:
        """The P pixels of the boxes and of the margin around them that holds their pixels' neighbours."""
        return box_pixels(self.objects, self.supervision.sim.PAIRWISE.DILATION)

    @cached_property
    def inside(self) -> Tensor:
        """(P,) bool: in the box, not in the margin."""
        return self.objects.inside(self.pixels.target, self.pixels.x, self.pixels.y)

    @cached_property
    def logits(self) -> BoxLogits:
        """The masks where the losses read them."""
        height, width = self.objects.size
        first, pixels = self.rows * (height * width), self.pixels
        with torch.no_grad():
            masks = self.predicted.flatten(0, 2)[self.rows]
            top, left = masks.max(-2).indices, masks.max(-1).indices
            columns, rows = (torch.arange(side, device=first.device) for side in (width, height))
            largest = torch.cat([top * width + columns, rows * width + left], dim=-1) + first[..., None]
        places = first, pixels.target, pixels.y * width + pixels.x, largest
        values, profiles = _Read.apply(self.predicted, *places)
        return BoxLogits(values, *profiles.split([width, height], dim=-1))

    @cached_property
    @torch.no_grad()
    def deficit(self) -> Tensor:
        """(L, T): how far each mask is from filling its box enough; it fades over FILL_GUARD.FADE."""
        keys, target = self.supervision.sim.FILL_GUARD, self.pixels.target
        areas = self.objects.areas.to(target.device, non_blocking=True)
        within = self.logits.pixels.sigmoid() * self.inside
        fill = within.new_zeros(len(within), len(self.objects)).index_add(1, target, within) / areas
        deficit = fill_deficit(fill, *keys.RANGE)
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
    def labelled_number(self) -> Tensor:
        """(L,): how many pixels are labelled, on a mean rank."""
        return number_over_ranks(self.labelled.sum(1).float())

    @cached_property
    def label_loss(self) -> Tensor:
        """(L, P): focal loss of the pixels of the boxes towards their labels, 0 where there is none."""
        labels = self.supervision.labels
        assert labels is not None
        logits = self.logits.pixels.index_select(1, self.pixels.places(labels.pixels))
        return focal_loss(logits, labels.final, *focal_keys(self.supervision.sim)) * self.labelled


def focal_keys(sim: CfgNode) -> tuple[float, float]:
    """Alpha and gamma of the focal losses towards pseudo masks."""
    return sim.PSEUDO_MASKS.FOCAL_ALPHA, sim.PSEUDO_MASKS.FOCAL_GAMMA


def per_object(loss: Tensor, match: Match, objects: Targets) -> Tensor:
    """Sum over layers and matched objects of a loss (L, T), per annotated object of a mean rank."""
    return (loss * match.matched).sum() / number_over_ranks(loss.new_full((), objects.annotated))


def whole_masks(predicted: Tensor, rows: Tensor) -> Tensor:
    """Those (..., h, w) of the predicted masks (B, L, Q, h, w) that the rows (...) name, copied, float32."""
    maps = predicted.flatten(0, 2).index_select(0, rows.flatten())
    return maps.view(*rows.shape, *maps.shape[1:]).float()


def recomputed(loss: Callable[[Tensor], Tensor], predicted: Tensor, rows: Tensor) -> Tensor:
    """A loss of ``whole_masks``, computed once more in the backward pass instead of keeping the masks."""
    return checkpoint(
        lambda: loss(whole_masks(predicted, rows)), use_reentrant=False, preserve_rng_state=False
    )


def fill_deficit(fill: Tensor, least: float, enough: float) -> Tensor:
    """1 where a mask fills at most the share ``least`` of its box, falling linearly to 0 at ``enough``.

    Args:
        fill: any shape, the mean of the mask's probabilities in its box.
        least, enough: shares of the box.
    """
    return ((enough - fill) / max(enough - least, 1e-6)).clamp(0, 1)
