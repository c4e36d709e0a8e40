"""The annotations of a batch as flat tensors, and its boxes as pixels at stride 4."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sim_m2f.draws import Seed, uniform
from sim_m2f.geometry import iou, mask_extents
from sim_m2f.structures import STRIDE, Target


class Numbers(NamedTuple):
    """What losses are divided by, each () float32: of a batch, or of the whole batch on a mean rank.

    Attributes:
        images: how many.
        annotated: objects that learn from annotations: the images' own, and pasted ones with a true mask.
        pasted: objects of other images, with a pseudo mask.
        claimed: objects that find a query.
        edges: counted edges of the pairwise loss, if it is in use.
        labelled: pixels with a pseudo label, if there is a teacher.
    """

    images: Tensor
    annotated: Tensor
    pasted: Tensor
    claimed: Tensor
    edges: Tensor = torch.zeros(())
    labelled: Tensor = torch.zeros(())


@dataclass(frozen=True)
class Proposals:
    """Masks from elsewhere of the T objects of a batch.

    Attributes:
        masks: (T, h, w) the share of each pixel at stride 4 that is the mask's.
        quality: (T,) confidence times IoU of the box around the mask and the annotated one; 0 without a mask.
    """

    masks: Tensor
    quality: Tensor


@dataclass(frozen=True)
class Boxes:
    """T boxes of a batch, one image's after the other's: all that matching asks of the objects.

    Attributes:
        labels: (T,) int64, 0 to C-1.
        image_index: (T,) int64, index of the object's image in the batch.
        boxes: (T, 4) float xyxy in pixels of the network's input.
        ranges: (T, 4) int64: first column and row, and the ends (exclusive) of the box, stride 4.
        counts: objects per image.
        size: (h, w) of the maps at stride 4.
    """

    labels: Tensor
    image_index: Tensor
    boxes: Tensor
    ranges: Tensor
    counts: list[int]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def device_ranges(self) -> Tensor:
        """``ranges`` where the labels are."""
        return self.ranges.to(self.labels.device, non_blocking=True)

    @cached_property
    def projections(self) -> tuple[Tensor, Tensor]:
        """(T, w) and (T, h): 1 on the columns and on the rows of the box, else 0."""
        height, width = self.size
        x0, y0, x1, y1 = self.device_ranges.unbind(1)
        columns = torch.arange(width, device=self.labels.device)
        rows = torch.arange(height, device=self.labels.device)
        in_columns = (columns >= x0[:, None]) & (columns < x1[:, None])
        in_rows = (rows >= y0[:, None]) & (rows < y1[:, None])
        return in_columns.float(), in_rows.float()

    @cached_property
    def relative_boxes(self) -> Tensor:
        """(T, 4) xyxy in shares of the network's input."""
        height, width = self.size
        size = torch.tensor([width, height, width, height]).to(self.boxes.device, non_blocking=True)
        return self.boxes / size / STRIDE

    @property
    def box_masks(self) -> Tensor:
        """(T, h, w): 1 inside the box, else 0."""
        columns, rows = self.projections
        return rows[:, :, None] * columns[:, None, :]

    def inside(self, target: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """(..., P) bool: whether pixels (..., P) at stride 4 lie in the boxes of their objects (P,)."""
        x0, y0, x1, y1 = self.device_ranges[target].unbind(1)
        return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


@dataclass(frozen=True)
class Targets(Boxes):
    """The T objects of a batch.

    Attributes:
        ranges: as of ``Boxes``, on the CPU.
        classes: (K,) int64 on the CPU, the classes that occur, in order.
        class_index: (T,) int64 on the CPU, place of each object's class in ``classes``.
        pasted: (T,) bool, objects that copy-paste has put there.
        pasted_index: (S,) int64, which of these have a pseudo mask.
        pasted_masks: (S, h, w) bool, these masks at stride 4.
        known_index: (S,) int64, which objects have a true mask, for mixed supervision.
        seeds: per image, of its random numbers.
        proposals: masks from elsewhere, if there are any.
        whole: the numbers of the whole batch, once a criterion has put them in.
    """

    classes: Tensor
    class_index: Tensor
    pasted: Tensor
    pasted_index: Tensor
    pasted_masks: Tensor
    known_index: Tensor
    seeds: list[Seed]
    proposals: Proposals | None = None
    whole: Numbers | None = None

    @property
    def numbers(self) -> Numbers:
        """Those of the whole batch."""
        assert self.whole
        return self.whole

    @property
    def areas(self) -> Tensor:
        """(T,) int64 on the CPU: how many pixels at stride 4 each box has."""
        return (self.ranges[:, 2:] - self.ranges[:, :2]).prod(1)

    @property
    def by_box(self) -> Tensor:
        """(T,) bool: objects that learn from their boxes, neither pasted nor with a true mask."""
        return (~self.pasted).index_fill(0, self.known_index, False)

    def draw(self, purpose: str, layers: int, number: int) -> Tensor:
        """(L, T, number, 2) random numbers, from 0 to 1, on the objects' device; see ``sim_m2f.draws``."""
        drawn = [
            uniform([seed], purpose, layers, count, number, 2, device=self.labels.device)[0]
            for seed, count in zip(self.seeds, self.counts, strict=True)
        ]
        return torch.cat(drawn, dim=1)


@dataclass(frozen=True)
class BoxPixels:
    """The pixels of all boxes, row by row, one box after the other: memory grows with the boxes' area.

    Attributes:
        target: (P,) int64, which object.
        x, y: (P,) int64, column and row.
        columns: (P,) int64, how many of the pixels of its object lie in one row.
        firsts: (T, 4) int64 per object: first column, first row, columns, place of its first pixel.
        areas: (T,) int64 on the CPU: how many of the pixels are of each object.
    """

    target: Tensor
    x: Tensor
    y: Tensor
    columns: Tensor
    firsts: Tensor
    areas: Tensor

    def places(self, other: "BoxPixels") -> Tensor:
        """(P',) int64: where the pixels of smaller boxes of the same objects are among these."""
        x0, y0, columns, first = self.firsts[other.target].unbind(1)
        return first + (other.y - y0) * columns + other.x - x0

    def neighbours(self, dx: int, dy: int) -> tuple[Tensor, Tensor]:
        """(P,) int64: each pixel's neighbour among those of its object; (P,) bool: whether there is one."""
        there = torch.arange(len(self.x), device=self.x.device) + dy * self.columns + dx
        there = there.clamp(0, max(len(self.x) - 1, 0))
        exists = (self.target[there] == self.target) & (self.x[there] == self.x + dx)
        return there, exists & (self.y[there] == self.y + dy)


def numbered(counts: Sequence[int]) -> Tensor:
    """(sum of counts,) int64 on the CPU: 0 so many times, then 1, ...

    ``repeat_interleave`` would wake all threads for it.
    """
    return torch.tensor([i for i, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)


def map_size(maps: Tensor) -> tuple[int, int]:
    """Height and width of maps (..., h, w)."""
    return maps.shape[-2], maps.shape[-1]


def flatten_targets(targets: Sequence[Target], size: tuple[int, int], device: torch.device) -> Targets:
    """The targets of the contract ({"labels", "boxes", ...} per image) as one ``Targets`` on ``device``.

    "pasted" (N,) bool and "pasted_masks" (N, h, w) bool are there where copy-paste has been at work.

    Boxes are needed on the CPU as well; a batch whose targets are on the CPU costs no transfer back.
    """
    counts = [len(target["labels"]) for target in targets]
    boxes = torch.cat([target["boxes"].reshape(-1, 4).float() for target in targets])
    labels = torch.cat([target["labels"].reshape(-1) for target in targets])
    known = flags(targets, "known")
    pasted, pasted_index, pasted_masks = _pasted(targets, known, size, device)
    classes, class_index = labels.cpu().unique(return_inverse=True)
    image_index = numbered(counts)
    return Targets(
        labels=labels.to(device, non_blocking=True),
        image_index=image_index.to(device, non_blocking=True),
        boxes=boxes.to(device, non_blocking=True),
        ranges=box_ranges(boxes.cpu(), size),
        counts=counts,
        classes=classes,
        class_index=class_index,
        pasted=pasted,
        pasted_index=pasted_index,
        pasted_masks=pasted_masks,
        known_index=known.nonzero().flatten().to(device, non_blocking=True),
        size=size,
        proposals=_proposals(targets, boxes.to(device, non_blocking=True)),
        seeds=[target.get("seed") for target in targets],
    )


def _proposals(targets: Sequence[Target], boxes: Tensor) -> Proposals | None:
    """Those of objects with these boxes (T, 4); None where none are given."""
    own = [target["proposals"] for target in targets if "proposals" in target]
    if not own:
        return None
    masks = torch.cat([each.to(boxes.device, non_blocking=True) for each in own])
    scores = torch.cat([target["proposal_scores"] for target in targets]).to(boxes.device, non_blocking=True)
    return Proposals(cell_shares(masks), scores * iou(mask_extents(masks).float(), boxes))


def cell_shares(masks: Tensor) -> Tensor:
    """(N, 4 h, 4 w) bool to (N, h, w): the share of each pixel at stride 4 that is the mask's."""
    cells = masks.unflatten(2, (-1, STRIDE)).unflatten(1, (-1, STRIDE))
    return cells.sum((2, 4)) / STRIDE**2


def _pasted(
    targets: Sequence[Target], known: Tensor, size: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) flags of the pasted objects, (S,) indices and (S, h, w) masks of those whose mask is not known."""
    pasted = flags(targets, "pasted")
    index = (pasted & ~known).nonzero().flatten().to(device, non_blocking=True)
    if not len(index):
        nothing = torch.zeros(0, *size, dtype=torch.bool, device=device)
        return pasted.to(device, non_blocking=True), index, nothing
    masks = torch.cat([target["pasted_masks"].to(device, non_blocking=True) for target in targets])
    return pasted.to(device, non_blocking=True), index, masks.index_select(0, index)


def flags(targets: Sequence[Target], name: Literal["pasted", "known"]) -> Tensor:
    """(T,) bool on the CPU: a flag of the objects, False where it is not given."""
    none = (torch.zeros(len(target["labels"]), dtype=torch.bool) for target in targets)
    return torch.cat([target.get(name, other).cpu() for target, other in zip(targets, none, strict=True)])


def box_ranges(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Columns and rows at stride 4 whose centres lie in the boxes; every box owns at least one pixel.

    Column k has its centre at 4 (k + 0.5) and is in the box when x1 <= centre < x2. A box without any
    gets the pixel that holds its own centre.

    Args:
        boxes: (T, 4) xyxy in pixels of the network's input.
        size: (h, w) at stride 4.

    Returns:
        (T, 4) int64: first column, first row, last column + 1, last row + 1.
    """

    def clamped(places: Tensor, beyond: int) -> Tensor:
        each = zip(places.long().unbind(1), size[::-1], strict=True)
        return torch.stack([place.clamp(0, length - beyond) for place, length in each], dim=1)

    first = clamped(torch.ceil(boxes[:, :2] / STRIDE - 0.5), 0)
    end = clamped(torch.ceil(boxes[:, 2:] / STRIDE - 0.5), 0)
    centre = clamped(((boxes[:, :2] + boxes[:, 2:]) / (2 * STRIDE)).floor(), 1)
    empty = end <= first
    return torch.cat([torch.where(empty, centre, first), torch.where(empty, centre + 1, end)], dim=1)


def box_pixels(targets: Targets, margin: int | Tensor = 0) -> BoxPixels:
    """Every pixel of every box, with ``margin`` more pixels on all sides where the image has them.

    A margin of (T, 4) int64 on the CPU is one for each side of every box.
    """
    height, width = targets.size
    limit = torch.tensor([width, height, width, height])
    grown = (targets.ranges + margin * torch.tensor([-1, -1, 1, 1])).clamp(min=0).minimum(limit)
    columns, rows = (grown[:, 2:] - grown[:, :2]).unbind(1)
    areas = columns * rows
    device = targets.labels.device
    starts = areas.cumsum(0) - areas
    firsts = torch.stack([grown[:, 0], grown[:, 1], columns, starts], dim=1).to(device, non_blocking=True)
    index = torch.arange(len(targets), device=device)
    pixels = int(areas.sum())
    target = torch.repeat_interleave(index, areas.to(device, non_blocking=True), output_size=pixels)
    x0, y0, columns, starts = firsts[target].unbind(1)
    rank = torch.arange(pixels, device=device) - starts
    return BoxPixels(target, x0 + rank % columns, y0 + rank // columns, columns, firsts, areas)
