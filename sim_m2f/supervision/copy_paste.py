"""Copy-paste: objects of recent images, cut out by their pseudo masks, on other images (SIM, CVPR 2023).

Pseudo masks are made of pixels at stride 4, so what is painted and what is covered is known exactly on these.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.config import CfgNode
from sim_m2f.errors import UserError
from sim_m2f.geometry import mask_extents
from sim_m2f.structures import Target
from sim_m2f.supervision.matched import Matched, MatchedBoxes
from sim_m2f.supervision.paste_bank import PasteBank, fit_to
from sim_m2f.supervision.pasted_targets import PastedTargets
from sim_m2f.supervision.schedule import resolve_steps
from sim_m2f.supervision.targets import STRIDE, box_ranges, numbered


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
        self, pixels: Tensor, masks: Tensor, boxes: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            pixels: (R, 3, H0, W0), one object's image each.
            masks: (R, h0, w0) bool, the objects' pixels at stride 4.
            boxes: (R, 4) xyxy in pixels.
            size: (H, W) of the receiving images.

        Returns:
            (R, 3, H, W) and (R, H / 4, W / 4) bool.
        """
        device, (height, width) = pixels.device, size
        steps = torch.tensor([width // STRIDE, height // STRIDE])
        shift = STRIDE * ((2 * torch.rand(len(boxes), 2) - 1) * self.shift * steps).round()
        scale = torch.empty(len(boxes), 1).uniform_(*self.scale).to(device, non_blocking=True)
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
    """Pastes objects of recent images on new ones, and keeps the bank of these images."""

    def __init__(self, cfg: CfgNode, device: torch.device) -> None:
        self.keys = cfg.MODEL.SIM.COPY_PASTE
        self.start = resolve_steps(self.keys.START, cfg.SOLVER.MAX_ITER)
        moved = self.keys.SHIFT > 0 or self.keys.SCALE != (1.0, 1.0)
        self.jitter = Jitter(self.keys.SHIFT, self.keys.SCALE) if moved else None
        self.bank = PasteBank(self.keys.PICTURES, device, self.keys.SCORE_POWER)

    def __call__(
        self, images: Tensor, targets: Sequence[Target], step: int
    ) -> tuple[Tensor, Sequence[Target]]:
        """See ``paste``; before MODEL.SIM.COPY_PASTE.START nothing is pasted."""
        if step < self.start:
            return images, targets
        return paste(images, targets, self.bank, self.keys.PROBABILITY, self.keys.OBJECTS, self.jitter)

    def remember(self, images: Tensor, matched: Matched) -> None:
        """Enter the images (B, 3, H, W) of a step with their pseudo masks; none is pasted twice.

        Masks corrected by colour are preferred where they are made.
        """
        if not isinstance(matched, MatchedBoxes):
            return
        made = matched.supervision
        if made.colors is not None:
            masks, scores = made.colors.masks > 0.5, made.colors.quality
        elif made.labels is not None:
            masks, scores = made.labels.masks(matched.objects)
        else:
            return
        self.bank.add(images, matched.objects, masks, scores * ~matched.objects.pasted)


def build_copy_paste(cfg: CfgNode, device: torch.device) -> CopyPaste | None:
    """Copy-paste, if MODEL.SIM.COPY_PASTE.ENABLED and masks are learned from boxes.

    Raises:
        UserError: some masks are known, which pasting would have to cover.
    """
    sim = cfg.MODEL.SIM
    if sim.COPY_PASTE.ENABLED and sim.SUPERVISION == "mixed":
        fault = "MODEL.SIM.COPY_PASTE: cannot cover known masks (MODEL.SIM.SUPERVISION mixed)"
        raise UserError(f"{fault}; set MODEL.SIM.COPY_PASTE.ENABLED False")
    return CopyPaste(cfg, device) if sim.COPY_PASTE.ENABLED and sim.SUPERVISION == "box" else None


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
    pixel stays as it is. A pasted object gets the box around its visible pixels. An object without such a
    pixel is dropped.

    Receivers and numbers are drawn from torch's global random state of the CPU, the objects from that of the
    device. The boxes of the whole batch are transferred from the device when the targets are looked at.

    Args:
        images: (B, 3, H, W), as the network gets them; H and W are multiples of 4.
        targets: per image {"labels": (N,) int64, "boxes": (N, 4) float xyxy in pixels, "valid": (H, W)
            bool, may be absent}, best on the CPU.
        bank: on the images' device.
        probability: that an image receives.
        most_objects: at least 1.
        jitter: of place and scale.

    Returns:
        images and targets; the arguments are as they were. A target has "labels", "boxes" (annotated objects
        first) and "pasted": (N,) bool, all on the device of its labels; "pasted_masks": (N, h, w) bool on the
        images' device, the visible pixels of pasted objects at stride 4, False for all others; and, if it had
        it, "valid", now also True where something was pasted (on the images' device if an image received).
    """
    size = images.shape[-2] // STRIDE, images.shape[-1] // STRIDE
    receivers = (torch.rand(len(images)) < probability).nonzero().flatten()
    if not len(bank) or not len(receivers):
        return images, [_without_pasted(target, size, images.device) for target in targets]

    drawn, exist = bank.draw(len(receivers), most_objects)
    numbers = torch.randint(1, most_objects + 1, (len(receivers), 1))
    received = torch.arange(drawn.shape[1]) < numbers
    exist = exist & received.to(images.device, non_blocking=True)
    rows = receivers.to(images.device, non_blocking=True)
    canvas, visible = _paint(images.index_select(0, rows), bank, drawn, exist, jitter)
    images = images.clone().index_copy_(0, rows, canvas)  # the clone keeps the memory format

    covered = visible.new_zeros(len(images), *size).index_copy(0, rows, visible.any(1))
    table = torch.cat([_remaining(targets, covered), _pasted(visible, bank.labels[drawn])])
    received_by = receivers[:, None].expand(-1, drawn.shape[1]).flatten()
    image, order = torch.cat([_images(targets), received_by]).sort(stable=True)
    counts = image.bincount(minlength=len(images)).tolist()
    masks, painted = visible.flatten(0, 1), _enlarged(covered)

    def collect(table: Tensor) -> list[Target]:
        return _collect(targets, table, image, order, masks, painted)

    ordered = table.index_select(0, order.to(table.device, non_blocking=True))
    return images, PastedTargets(ordered, counts, collect)


def _without_pasted(target: Target, size: tuple[int, int], device: torch.device) -> Target:
    """The target of an image in a batch that receives nothing."""
    labels = target["labels"]
    nothing = torch.zeros(len(labels), *size, dtype=torch.bool, device=device)
    return {**target, "pasted_masks": nothing, "pasted": torch.zeros_like(labels, dtype=torch.bool)}


def _paint(
    canvas: Tensor, bank: PasteBank, drawn: Tensor, exist: Tensor, jitter: Jitter | None
) -> tuple[Tensor, Tensor]:
    """Paint those of the objects ``drawn`` (R, K) that ``exist`` (R, K) on R images, one of each at a time.

    Returns:
        (R, 3, H, W) and (R, K, h, w) bool: the images, and each object's pixels that no later one covers.
    """
    height, width = canvas.shape[-2:]
    visible: list[Tensor] = []
    slots = bank.slots
    for objects, here in zip(drawn.unbind(1), exist.unbind(1), strict=True):
        pixels, masks = bank.images[slots[objects]], bank.masks[objects]
        if jitter:
            pixels, masks = jitter(pixels, masks, bank.boxes[objects], (height, width))
        masks = fit_to(masks, height // STRIDE, width // STRIDE) & here[:, None, None]
        pixels = fit_to(pixels, height, width).to(canvas.dtype)
        canvas = torch.where(_enlarged(masks)[:, None], pixels, canvas)
        visible = [*(earlier & ~masks for earlier in visible), masks]
    return canvas, torch.stack(visible, dim=1)


def _images(targets: Sequence[Target]) -> Tensor:
    """(T,) int64: the image of every annotated object, in order."""
    return numbered([len(target["labels"]) for target in targets])


def _remaining(targets: Sequence[Target], covered: Tensor) -> Tensor:
    """(T, 6): box, label, and 1 if something is left, of annotated objects under ``covered`` (B, h, w)."""
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
    boxes = torch.where(left == ranges, boxes, STRIDE * left.float())
    return torch.cat([boxes, labels[:, None], left[:, 2:3] > left[:, :1]], dim=1)


def _pasted(visible: Tensor, labels: Tensor) -> Tensor:
    """(R * K, 6): box, label, and 1 if something is visible, from masks (R, K, h, w) and labels (R, K)."""
    extents = mask_extents(visible.flatten(0, 1))
    return torch.cat(
        [STRIDE * extents.float(), labels.reshape(-1, 1), extents[:, 2:3] > extents[:, :1]], dim=1
    )


def _collect(
    targets: Sequence[Target], table: Tensor, image: Tensor, order: Tensor, masks: Tensor, painted: Tensor
) -> list[Target]:
    """The new targets.

    Args:
        targets: the old ones, T objects.
        table: (T + P, 6) on the CPU: box, label, and 1 for one that stays; one image's after the other's.
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
    columns = table[:, 4].long(), table[:, :4], order >= annotated, masks
    split = zip(*(column.split(counts) for column in columns), strict=True)
    new: list[Target] = []
    for target, paint, (labels, boxes, pasted, visible) in zip(targets, painted, split, strict=True):
        home = target["labels"].device
        fields: Target = {
            "labels": labels.to(home),
            "boxes": boxes.to(home),
            "pasted": pasted.to(home),
            "pasted_masks": visible,
        }
        if "valid" in target:
            fields["valid"] = target["valid"].to(paint.device, non_blocking=True) | paint
        new.append(fields)
    return new


def _enlarged(maps: Tensor) -> Tensor:
    """(N, h, w) to (N, 4 h, 4 w): each pixel as 4 x 4."""
    return maps.repeat_interleave(STRIDE, dim=-1).repeat_interleave(STRIDE, dim=-2)
