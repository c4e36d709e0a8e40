"""Copy-paste: objects of recent training images, cut out by their pseudo masks, on other images.

The method is SIM's (CVPR 2023). A cell is a pixel at stride 4, so 4 x 4 pixels of the network's input. Pseudo
masks are made of cells; what is painted and what is covered is therefore known exactly on cells.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.geometry import mask_extents
from sim_m2f.structures import Target
from sim_m2f.supervision.targets import STRIDE, Targets, box_ranges

# What a checkpoint calls the attributes of a bank.
STATE = {
    "pictures": "images",
    **{name: name for name in ("masks", "boxes", "labels", "scores", "counts", "entered")},
}


class PasteBank:
    """The last training images with their objects, first in, first out.

    Pixels are kept as float16: it holds normalised pixels (below 4) to 0.001, a twentieth of one of 255 grey
    levels. Images of all sizes share one buffer, which grows to the largest; beyond an image all is zero.

    Args:
        capacity: most images, at least 1.
        device: where the batches' images are, and the bank.
        power: objects are drawn in proportion to score^power.

    Attributes:
        images: (capacity, 3, H, W) float16; the n-th image that ever entered is at n % capacity.
        masks: (M, h, w) bool, cells of the objects of all images, the oldest image's first.
        boxes: (M, 4) float32 xyxy in pixels.
        labels: (M,) int64.
        scores: (M,) float32, 0 for an object that cannot be drawn because its mask is empty.
        counts: objects per image, the oldest image first; at least 1.
        entered: images that ever entered.
    """

    def __init__(self, capacity: int, device: torch.device, power: float = 3.0) -> None:
        self.capacity, self.power = capacity, power
        self.images = torch.zeros(capacity, 3, 0, 0, dtype=torch.float16, device=device)
        self.masks = torch.zeros(0, 0, 0, dtype=torch.bool, device=device)
        self.boxes = torch.zeros(0, 4, device=device)
        self.labels = torch.zeros(0, dtype=torch.int64, device=device)
        self.scores = torch.zeros(0, device=device)
        self.counts: list[int] = []
        self.entered = 0

    def __len__(self) -> int:
        """The images in the bank."""
        return len(self.counts)

    @torch.no_grad()
    def add(self, images: Tensor, objects: Targets, masks: Tensor, scores: Tensor) -> None:
        """Enter every image of a batch that has objects, once; the oldest leave.

        Args:
            images: (B, 3, H, W), as the network got them; H and W are multiples of 4.
            objects: the T objects of the batch.
            masks: (T, h, w) pseudo masks at stride 4, bool or probabilities, positive above one half.
            scores: (T,) from 0 to 1.
        """
        self._grow(*images.shape[-2:])
        height, width = self.images.shape[-2:]
        masks = _fit(masks > 0.5, height // STRIDE, width // STRIDE)
        scores = scores.float() * masks.flatten(1).any(1)

        entering = [i for i, count in enumerate(objects.counts) if count]
        counts = self.counts + [objects.counts[i] for i in entering]
        leaving = max(len(counts) - self.capacity, 0)
        old = sum(counts[:leaving])
        new = max(old - len(self.scores), 0)  # of this batch itself, when it is larger than the bank
        self.masks = torch.cat([self.masks[old:], masks[new:]])
        self.boxes = torch.cat([self.boxes[old:], objects.boxes[new:].float()])
        self.labels = torch.cat([self.labels[old:], objects.labels[new:]])
        self.scores = torch.cat([self.scores[old:], scores[new:]])
        self.counts = counts[leaving:]
        self.entered += len(entering)

        staying = torch.tensor(entering[-self.capacity :], dtype=torch.int64)
        slots = torch.arange(self.entered - len(staying), self.entered) % self.capacity
        pixels = images.index_select(0, staying.to(images.device, non_blocking=True)).half()
        self.images.index_copy_(0, slots.to(images.device, non_blocking=True), _fit(pixels, height, width))

    def _grow(self, height: int, width: int) -> None:
        height, width = max(height, self.images.shape[-2]), max(width, self.images.shape[-1])
        if self.images.shape[-2:] != (height, width):
            self.images = _fit(self.images, height, width)
            self.masks = _fit(self.masks, height // STRIDE, width // STRIDE)

    @property
    def slots(self) -> Tensor:
        """(M,) int64: where in ``images`` each object's image is."""
        oldest = self.entered - len(self)
        image = torch.arange(oldest, self.entered).repeat_interleave(torch.tensor(self.counts))
        return (image % self.capacity).to(self.labels.device, non_blocking=True)

    def draw(self, times: int, most: int) -> tuple[Tensor, Tensor]:
        """Draw objects without replacement by score^power, several times independently.

        The objects race: each needs a random time, exponential with rate score^power; the first ones win.

        Args:
            times: R draws.
            most: objects a draw, fewer when the bank has not so many.

        Returns:
            (R, K) int64 objects in the order of the draw, and (R, K) bool, False where none was left to draw.
        """
        weights = self.scores**self.power
        speed = weights / weights.new_empty(times, len(weights)).exponential_()
        first = speed.topk(min(most, len(weights)), dim=1)
        return first.indices, first.values > 0

    def state_dict(self) -> dict[str, Any]:
        """All attributes but the settings, without copies."""
        return {name: getattr(self, attribute) for name, attribute in STATE.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the state of a bank of the same capacity.

        Raises:
            ValueError: the capacity differs.
            KeyError: something is missing.
        """
        capacity = len(state["pictures"])
        if capacity != self.capacity:
            raise ValueError(f"its bank holds {capacity} images, this one {self.capacity}")
        for name, own in self.state_dict().items():
            value = state[name]
            setattr(self, STATE[name], value.to(own.device, copy=True) if isinstance(own, Tensor) else value)


@dataclass(frozen=True)
class Jitter:
    """Random place and scale of a pasted object, around the centre of its box, with bilinear resampling.

    Attributes:
        shift: most way to move, in shares of the receiving image's width and height; whole cells.
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
            masks: (R, h0, w0) bool, the objects' cells.
            boxes: (R, 4) xyxy in pixels.
            size: (H, W) of the receiving images.

        Returns:
            (R, 3, H, W) and (R, H / 4, W / 4) bool.
        """
        device, (height, width) = pixels.device, size
        cells = torch.tensor([width // STRIDE, height // STRIDE])
        shift = STRIDE * ((2 * torch.rand(len(boxes), 2) - 1) * self.shift * cells).round()
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


@torch.no_grad()
def paste(
    images: Tensor,
    targets: list[Target],
    bank: PasteBank,
    probability: float,
    most_objects: int,
    jitter: Jitter | None = None,
) -> tuple[Tensor, list[Target]]:
    """Give each image, with ``probability``, 1 to ``most_objects`` objects of the bank.

    Any number is as likely. Without jitter an object keeps its place and is cut to (H, W); a later one lies
    on the earlier ones. An annotated object gets the smallest box around the uncovered pixels of its box (a
    pixel belongs to a box when its centre does; every box owns at least one); a side that keeps an uncovered
    pixel stays as it is. A pasted object gets the box around its visible pixels. An object without such a
    pixel is dropped.

    Receivers and numbers are drawn from torch's global random state of the CPU, the objects from that of the
    device. One transfer from the device: the boxes of the whole batch.

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
        images' device, the visible cells of pasted objects, False for all others; and, if it had it, "valid",
        now also True where something was pasted (on the images' device if an image of the batch received).
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
    table = torch.cat([_remaining(targets, covered), _pasted(visible, bank.labels[drawn])]).cpu()
    image = torch.cat([_images(targets), receivers.repeat_interleave(drawn.shape[1])])
    return images, _collect(targets, table, image, visible.flatten(0, 1), _to_pixels(covered))


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
        (R, 3, H, W) and (R, K, h, w) bool: the images, and each object's cells that no later one covers.
    """
    height, width = canvas.shape[-2:]
    visible: list[Tensor] = []
    slots = bank.slots
    for objects, here in zip(drawn.unbind(1), exist.unbind(1), strict=True):
        pixels, masks = bank.images[slots[objects]], bank.masks[objects]
        if jitter:
            pixels, masks = jitter(pixels, masks, bank.boxes[objects], (height, width))
        masks = _fit(masks, height // STRIDE, width // STRIDE) & here[:, None, None]
        pixels = _fit(pixels, height, width).to(canvas.dtype)
        canvas = torch.where(_to_pixels(masks)[:, None], pixels, canvas)
        visible = [*(earlier & ~masks for earlier in visible), masks]
    return canvas, torch.stack(visible, dim=1)


def _images(targets: list[Target]) -> Tensor:
    """(T,) int64: the image of every annotated object, in order."""
    counts = torch.tensor([len(target["labels"]) for target in targets])
    return torch.arange(len(targets)).repeat_interleave(counts)


def _remaining(targets: list[Target], covered: Tensor) -> Tensor:
    """(T, 6): box, label, and 1 if something is left, of annotated objects under ``covered`` (B, h, w)."""
    device, (height, width) = covered.device, covered.shape[1:]
    boxes = torch.cat([target["boxes"].reshape(-1, 4).float() for target in targets])
    labels = torch.cat([target["labels"] for target in targets])
    # On boxes magnified by the stride, box_ranges counts pixels instead of cells.
    pixels = box_ranges(STRIDE * boxes, (STRIDE * height, STRIDE * width))
    cells = torch.cat([pixels[:, :2] // STRIDE, -(-pixels[:, 2:] // STRIDE)], dim=1)
    image = _images(targets).to(device, non_blocking=True)
    boxes, labels, cells = (tensor.to(device, non_blocking=True) for tensor in (boxes, labels, cells))

    x1, y1, x2, y2 = cells[:, :, None].unbind(1)
    columns, rows = torch.arange(width, device=device), torch.arange(height, device=device)
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
    left = mask_extents(inside & ~covered[image])
    boxes = torch.where(left == cells, boxes, STRIDE * left.float())
    return torch.cat([boxes, labels[:, None], left[:, 2:3] > left[:, :1]], dim=1)


def _pasted(visible: Tensor, labels: Tensor) -> Tensor:
    """(R * K, 6): box, label, and 1 if something is visible, from masks (R, K, h, w) and labels (R, K)."""
    extents = mask_extents(visible.flatten(0, 1))
    return torch.cat(
        [STRIDE * extents.float(), labels.reshape(-1, 1), extents[:, 2:3] > extents[:, :1]], dim=1
    )


def _collect(
    targets: list[Target], table: Tensor, image: Tensor, masks: Tensor, painted: Tensor
) -> list[Target]:
    """The new targets.

    Args:
        targets: the old ones, T objects.
        table: (T + P, 6) on the CPU: box, label, and 1 for one that stays; the last P are the pasted ones.
        image: (T + P,) their images, on the CPU.
        masks: (P, h, w) bool, the pasted objects' visible cells.
        painted: (B, H, W) bool, pixels where something was pasted.
    """
    annotated = len(table) - len(masks)
    order = image.argsort(stable=True)
    order = order[table[order, 5] > 0]
    counts = image[order].bincount(minlength=len(targets)).tolist()
    which = (order - annotated + 1).clamp(min=0).to(masks.device, non_blocking=True)
    masks = torch.cat([torch.zeros_like(masks[:1]), masks]).index_select(0, which)
    columns = table[order, 4].long(), table[order, :4], order >= annotated, masks
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


def _to_pixels(cells: Tensor) -> Tensor:
    """(N, h, w) to (N, 4 h, 4 w): each cell as its 4 x 4 pixels."""
    return cells.repeat_interleave(STRIDE, dim=-1).repeat_interleave(STRIDE, dim=-2)


def _fit(maps: Tensor, height: int, width: int) -> Tensor:
    """Cut or zero-pad the last two dimensions at the bottom and right to (height, width)."""
    return F.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]))
