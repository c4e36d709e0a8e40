"""Copy-paste: objects of recent images, cut out by their masks, on other images (SIM, CVPR 2023).

Pseudo masks are made of pixels at stride 4, and true masks are cut to these, so what is painted and what is
covered is known exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.distributed import from_all_ranks
from sim_m2f.draws import Seed, uniform
from sim_m2f.geometry import mask_extents
from sim_m2f.pixels import Pixels
from sim_m2f.structures import STRIDE, Target
from sim_m2f.supervision.known_masks import known_truth
from sim_m2f.supervision.matched import Matched, MatchedBoxes
from sim_m2f.supervision.paste_bank import TRUE_MASK, PasteBank, fit_to
from sim_m2f.supervision.pasted_targets import PastedTargets
from sim_m2f.supervision.schedule import resolve_steps
from sim_m2f.supervision.targets import box_ranges, cell_shares, flags, numbered


@dataclass(frozen=True)
class Jitter:
    """Random place and scale of a pasted object, around the centre of its box, with bilinear resampling.

    Attributes:
        shift: most way to move, in shares of the receiving image's width and height; a multiple of 4.
        scale: least and largest factor of the size.
    """

    shift: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)

    def __call__(
        self, pixels: Tensor, masks: Tensor, boxes: Tensor, size: tuple[int, int], drawn: Tensor
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            pixels: (R, 3, H0, W0), one object's image each.
            masks: (R, h0, w0) bool, the objects' pixels at stride 4.
            boxes: (R, 4) xyxy in pixels.
            size: (H, W) of the receiving images.
            drawn: (R, 3) random numbers, from 0 to 1.

        Returns:
            (R, 3, H, W) and (R, H / 4, W / 4) bool.
        """
        device, (height, width) = pixels.device, size
        steps, (least, largest) = torch.tensor([width // STRIDE, height // STRIDE]), self.scale
        shift = STRIDE * ((2 * drawn[:, :2] - 1) * self.shift * steps).round()
        scale = (least + (largest - least) * drawn[:, 2:]).to(device, non_blocking=True)
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        offset = centre - (centre + shift.to(device, non_blocking=True)) / scale

        def coordinate(axis: int, length: int, source_length: int, stride: int) -> Tensor:
            """(R, length): where the receiving image's columns or rows lie in the source, from -1 to 1."""
            here = torch.arange(length, device=device) + 0.5
            return 2 * (here / scale + offset[:, axis, None] / stride) / source_length - 1

        def resample(maps: Tensor, stride: int) -> Tensor:
            x = coordinate(0, width // stride, maps.shape[-1], stride)[:, None, :]
            y = coordinate(1, height // stride, maps.shape[-2], stride)[:, :, None]
            grid = torch.stack(torch.broadcast_tensors(x, y), dim=-1)
            return F.grid_sample(maps.float(), grid, align_corners=False)

        return resample(pixels, 1), resample(masks[:, None], STRIDE)[:, 0] > 0.5


class CopyPaste:
    """Pastes objects of recent images on new ones, and keeps the bank of these images, all ranks the same."""

    def __init__(self, cfg: CfgNode, device: torch.device) -> None:
        self.keys = cfg.MODEL.SIM.COPY_PASTE
        self.start = resolve_steps(self.keys.START, cfg.SOLVER.MAX_ITER)
        moved = self.keys.SHIFT > 0 or self.keys.SCALE != (1.0, 1.0)
        self.jitter = Jitter(self.keys.SHIFT, self.keys.SCALE) if moved else None
        self.pixels = Pixels(cfg).to(device)
        self.bank = PasteBank(self.keys.PICTURES, self.pixels, self.keys.SCORE_POWER)

    def __call__(
        self, images: Tensor, targets: Sequence[Target], step: int
    ) -> tuple[Tensor, Sequence[Target]]:
        """See ``paste``; before MODEL.SIM.COPY_PASTE.START nothing is pasted."""
        if step < self.start:
            return images, targets
        return paste(images, targets, self.bank, self.keys.PROBABILITY, self.keys.OBJECTS, self.jitter)

    def remember(self, images: Tensor, matched: Sequence[Matched], step: int) -> None:
        """Enter the images of all ranks with their masks; no object is pasted twice.

        This begins twice as many steps before MODEL.SIM.COPY_PASTE.START as the bank holds images: it is full
        by then where every second batch has an object.

        Args:
            images: (B, 3, H, W) of this rank, as the network got them.
            matched: what the losses of its parts were computed from.
            step: steps done before this one.
        """
        if step < self.start - 2 * self.bank.capacity:
            return
        parts = [_entry(part) for part in matched if isinstance(part, MatchedBoxes)]
        objects = [torch.cat(each) for each in zip(*(part for part in parts if part), strict=True)]
        if not objects:
            return
        counts = [count for part in matched for count in part.objects.counts]
        rgb = self.pixels.undo(images).round().clamp(0, 255).byte()
        for of_rank, entries in from_all_ranks(counts, [rgb, *objects]):
            self.bank.add(of_rank, *entries)


def _entry(matched: MatchedBoxes) -> tuple[Tensor, ...]:
    """Boxes, labels, masks and scores for ``PasteBank.add``; nothing where no masks are made.

    The masks are the true ones where these are known, else those corrected by colour where these are made,
    else the pseudo masks.
    """
    made, objects = matched.supervision, matched.objects
    if made.colors is not None:
        masks, scores = made.colors.masks > 0.5, made.colors.quality
    elif made.labels is not None:
        masks, scores = made.labels.masks(objects)
    elif made.truth is not None:
        scores = torch.zeros(len(objects), device=objects.boxes.device)
        masks = torch.zeros(len(objects), *objects.size, dtype=torch.bool, device=objects.boxes.device)
    else:
        return ()
    if made.truth is not None:
        masks = masks.index_copy(0, objects.known_index, cell_shares(made.truth) > 0.5)
        scores = scores.index_fill(0, objects.known_index, TRUE_MASK)
    return objects.boxes, objects.labels, masks, scores * ~objects.pasted


def build_copy_paste(cfg: CfgNode, device: torch.device) -> CopyPaste | None:
    """Copy-paste, if MODEL.SIM.COPY_PASTE.ENABLED and masks of some objects are learned from boxes."""
    sim = cfg.MODEL.SIM
    return CopyPaste(cfg, device) if sim.COPY_PASTE.ENABLED and sim.SUPERVISION != "mask" else None


@torch.no_grad()
def paste(
    images: Tensor,
    targets: Sequence[Target],
    bank: PasteBank,
    probability: float,
    most_objects: int,
    jitter: Jitter | None = None,
) -> tuple[Tensor, Sequence[Target]]:
    """Give each image, with ``probability``, 1 to ``most_objects`` objects of the bank.

    Any number is as likely. Without jitter an object keeps its place and is cut to (H, W); a later one lies
    on the earlier ones. An annotated object gets the smallest box around the uncovered pixels of its box (a
    pixel belongs to a box when its centre does; every box owns at least one); a side that keeps an uncovered
    pixel stays as it is. For an annotated object with a known mask the pixels are those of its mask. A pasted
    object gets the box around its visible pixels. An object that is left without such a pixel is dropped.

    Known masks and proposals lose what is covered. The mask of a pasted object is known if it was true.

    What an image receives is drawn by its seed. The boxes of the whole batch are transferred from the device
    when the targets are looked at.

    Args:
        images: (B, 3, H, W), as the network gets them; H and W are multiples of 4.
        targets: per image {"labels": (N,) int64, "boxes": (N, 4) float xyxy in pixels, "valid": (H, W)
            bool, "masks" and "proposals": (N, H, W) bool, "known": (N,) bool, "proposal_scores": (N,) float,
            "seed"}, best on the CPU; all but the first two may be absent.
        bank: on the images' device.
        probability: that an image receives.
        most_objects: at least 1.
        jitter: of place and scale.

    Returns:
        images and targets, those given if no image receives; the arguments are as they were. Else a target
        has "labels", "boxes" (annotated objects first) and "pasted": (N,) bool, all on the device of its
        labels; "pasted_masks": (N, h, w) bool on the images' device, the visible pixels of pasted objects at
        stride 4, False for all others; if it had it, "seed" and "valid", now also True where something was
        pasted; and what it had of the others, pasted objects being without proposals (maps are on the images'
        device).
    """
    seeds = [target.get("seed") for target in targets]
    receivers = (uniform(seeds, "receivers", 1)[:, 0] < probability).nonzero().flatten()
    if not len(bank) or not len(receivers):
        return images, targets

    seeds = [seeds[i] for i in receivers.tolist()]
    drawn, exist = _received(bank, seeds, most_objects)
    rows = receivers.to(images.device, non_blocking=True)
    canvas, visible = _paint(images.index_select(0, rows), bank, drawn, exist, jitter, seeds)
    images = images.clone().index_copy_(0, rows, canvas)  # the clone keeps the memory format
    covered = visible.new_zeros(len(images), *visible.shape[2:]).index_copy(0, rows, visible.any(1))
    pasted = _pasted(visible, bank.labels[drawn], bank.known[drawn])
    return images, _pasted_targets(targets, receivers, visible, covered, pasted)


def _received(bank: PasteBank, seeds: Sequence[Seed], most_objects: int) -> tuple[Tensor, Tensor]:
    """(R, K) objects of the bank for R images by their seeds, and (R, K) bool: which of them are there."""
    drawn, exist = bank.draw(seeds, most_objects)
    numbers = (uniform(seeds, "numbers", 1) * most_objects).long()
    received = torch.arange(drawn.shape[1]) <= numbers
    return drawn, exist & received.to(exist.device, non_blocking=True)


def _pasted_targets(
    targets: Sequence[Target], receivers: Tensor, visible: Tensor, covered: Tensor, pasted: Tensor
) -> PastedTargets:
    """The targets of B images, R of which received K objects each.

    Args:
        targets: the old ones.
        receivers: (R,) int64 on the CPU.
        visible: (R, K, h, w) bool, the pasted objects' visible pixels.
        covered: (B, h, w) bool, pixels of any of them.
        pasted: (R * K, 7), those columns of ``_collect`` of the pasted objects.
    """
    table = torch.cat([_remaining(targets, covered), pasted])
    received_by = receivers[:, None].expand(-1, visible.shape[1]).flatten()
    image, order = torch.cat([_images(targets), received_by]).sort(stable=True)
    counts = image.bincount(minlength=len(targets)).tolist()
    masks, painted = visible.flatten(0, 1), _enlarged(covered)

    def collect(table: Tensor) -> list[Target]:
        return _collect(targets, table, image, order, masks, painted)

    ordered = table.index_select(0, order.to(table.device, non_blocking=True))
    return PastedTargets(ordered, counts, collect)


def _paint(
    canvas: Tensor,
    bank: PasteBank,
    drawn: Tensor,
    exist: Tensor,
    jitter: Jitter | None,
    seeds: Sequence[Seed],
) -> tuple[Tensor, Tensor]:
    """Paint those of the objects ``drawn`` (R, K) that ``exist`` (R, K) on R images, one of each at a time.

    Returns:
        (R, 3, H, W) and (R, K, h, w) bool: the images, and each object's pixels that no later one covers.
    """
    height, width = canvas.shape[-2:]
    visible: list[Tensor] = []
    moves = uniform(seeds, "jitter", drawn.shape[1], 3)
    for objects, here, move in zip(drawn.unbind(1), exist.unbind(1), moves.unbind(1), strict=True):
        pixels, masks = bank.pictures(objects), bank.masks[objects]
        if jitter:
            pixels, masks = jitter(pixels, masks, bank.boxes[objects], (height, width), move)
        masks = fit_to(masks, height // STRIDE, width // STRIDE) & here[:, None, None]
        pixels = fit_to(pixels, height, width).to(canvas.dtype)
        canvas = torch.where(_enlarged(masks)[:, None], pixels, canvas)
        visible = [*(earlier & ~masks for earlier in visible), masks]
    return canvas, torch.stack(visible, dim=1)


def _images(targets: Sequence[Target]) -> Tensor:
    """(T,) int64: the image of every annotated object, in order."""
    return numbered([len(target["labels"]) for target in targets])


def _remaining(targets: Sequence[Target], covered: Tensor) -> Tensor:
    """(T, 7): those columns of ``_collect`` of annotated objects under ``covered`` (B, h, w)."""
    device, (height, width) = covered.device, covered.shape[1:]
    boxes = torch.cat([target["boxes"].reshape(-1, 4).float() for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    # On boxes magnified by the stride, box_ranges counts pixels of the input.
    fine = box_ranges(STRIDE * boxes, (STRIDE * height, STRIDE * width))
    ranges = torch.cat([fine[:, :2] // STRIDE, -(-fine[:, 2:] // STRIDE)], dim=1)
    image = _images(targets).to(device, non_blocking=True)
    boxes, labels, ranges = (tensor.to(device, non_blocking=True) for tensor in (boxes, labels, ranges))

    x1, y1, x2, y2 = ranges[:, :, None].unbind(1)
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
    left = mask_extents(inside & ~covered[image])
    stays, known = left[:, 2] > left[:, 0], flags(targets, "known")
    cut = torch.where(left == ranges, boxes, STRIDE * left.float())
    if (truth := known_truth(targets, device)) is not None:
        index = known.nonzero().flatten().to(device, non_blocking=True)
        whole, left = mask_extents(truth), mask_extents(truth & ~_enlarged(covered[image[index]]))
        cut = cut.index_copy(0, index, torch.where(left == whole, boxes[index], left.float()))
        stays = stays.index_copy(0, index, (left == whole).all(1) | (left[:, 2] > left[:, 0]))
    further = labels, stays, known.to(device, non_blocking=True)
    return torch.cat([cut, *(column[:, None] for column in further)], dim=1)


def _pasted(visible: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """(R * K, 7): those columns of ``_collect``, from masks (R, K, h, w), labels and flags (R, K)."""
    extents = mask_extents(visible.flatten(0, 1))
    further = labels.flatten(), extents[:, 2] > extents[:, 0], known.flatten()
    return torch.cat([STRIDE * extents.float(), *(column[:, None] for column in further)], dim=1)


def _collect(
    targets: Sequence[Target], table: Tensor, image: Tensor, order: Tensor, masks: Tensor, painted: Tensor
) -> list[Target]:
    """The new targets.

    Args:
        targets: the old ones, T objects.
        table: (T + P, 7) on the CPU: box, label, 1 for one that stays, 1 for one whose mask is known; one
            image's after the other's.
        image: (T + P,) their images, on the CPU.
        order: (T + P,) the n-th annotated or, from T on, pasted object that each is, on the CPU.
        masks: (P, h, w) bool, the pasted objects' visible pixels.
        painted: (B, H, W) bool, pixels where something was pasted.
    """
    annotated, stays = len(table) - len(masks), table[:, 5] > 0
    table, image, order = table[stays], image[stays], order[stays]
    counts = image.bincount(minlength=len(targets)).tolist()
    which = (order - annotated + 1).clamp(min=0).to(masks.device, non_blocking=True)
    masks = torch.cat([torch.zeros_like(masks[:1]), masks]).index_select(0, which)
    columns = table[:, 4].long(), table[:, :4], table[:, 6] > 0, order, masks
    split = zip(*(column.split(counts) for column in columns), strict=True)
    new: list[Target] = []
    first = 0  # object of the image
    for target, paint, (labels, boxes, known, objects, visible) in zip(targets, painted, split, strict=True):
        home, pasted = target["labels"].device, objects >= annotated
        fields: Target = {
            "labels": labels.to(home),
            "boxes": boxes.to(home),
            "pasted": pasted.to(home),
            "pasted_masks": visible,
        }
        if "seed" in target:
            fields["seed"] = target["seed"]
        if "valid" in target:
            fields["valid"] = target["valid"].to(paint.device, non_blocking=True) | paint
        kept = (objects[~pasted] - first).to(home)
        theirs = visible[len(kept) :]
        if "known" in target:
            true = theirs & known[len(kept) :, None, None].to(paint.device, non_blocking=True)
            fields["masks"] = _uncovered(target["masks"][kept], paint, _enlarged(true))
            fields["known"] = known.to(home)
        if "proposals" in target:
            none = _enlarged(torch.zeros_like(theirs))
            fields["proposals"] = _uncovered(target["proposals"][kept], paint, none)
            fields["proposal_scores"] = F.pad(target["proposal_scores"][kept], (0, len(theirs)))
        first += len(target["labels"])
        new.append(fields)
    return new


def _uncovered(masks: Tensor, painted: Tensor, further: Tensor) -> Tensor:
    """(N + P, H, W) bool: what is left of masks (N, H, W) below what is painted (H, W), and further ones."""
    return torch.cat([masks.to(painted.device, non_blocking=True) & ~painted, further])


def _enlarged(maps: Tensor) -> Tensor:
    """(N, h, w) to (N, 4 h, 4 w): each pixel as 4 x 4."""
    return maps.repeat_interleave(STRIDE, dim=-1).repeat_interleave(STRIDE, dim=-2)
