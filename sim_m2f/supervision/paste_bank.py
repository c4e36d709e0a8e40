"""The bank of recent training images that copy-paste draws its objects from."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.draws import Seed, uniform
from sim_m2f.pixels import Pixels
from sim_m2f.structures import STRIDE
from sim_m2f.supervision.targets import numbered

# What a checkpoint calls the attributes of a bank.
STATE = {
    "pictures": "images",
    **{name: name for name in ("masks", "boxes", "labels", "scores", "counts", "entered")},
}

TRUE_MASK = 2.0  # score of an object that is cut out by its true mask
FIRST = 2.0**64  # factor of its speed in a draw, beyond the ratio of any two


class PasteBank:
    """The last training images with their objects, first in, first out.

    Images of all sizes share one buffer, which grows to the largest; beyond an image all is zero.

    Args:
        capacity: most images, at least 1.
        pixels: how the network's images are normalised; on their device, which is the bank's.
        power: objects are drawn in proportion to score^power.

    Attributes:
        images: (capacity, 3, H, W) uint8 RGB; the n-th image that ever entered is at n % capacity.
        masks: (M, h, w) bool, pixels of the objects of all images, the oldest image's first.
        boxes: (M, 4) float32 xyxy in pixels.
        labels: (M,) int64.
        scores: (M,) float32, 0 for an object that cannot be drawn because its mask is empty, TRUE_MASK for
            one whose mask is true.
        counts: objects per image, the oldest image first; at least 1.
        entered: images that ever entered.
    """

    def __init__(self, capacity: int, pixels: Pixels, power: float = 3.0) -> None:
        self.capacity, self.pixels, self.power = capacity, pixels, power
        device = pixels.mean.device
        self.images = torch.zeros(capacity, 3, 0, 0, dtype=torch.uint8, device=device)
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
    def add(
        self,
        counts: Sequence[int],
        images: Tensor,
        boxes: Tensor,
        labels: Tensor,
        masks: Tensor,
        scores: Tensor,
    ) -> None:
        """Enter every image of a batch that has objects, once; the oldest leave.

        Args:
            counts: objects per image, T in all.
            images: (B, 3, H, W) uint8 RGB; H and W are multiples of 4.
            boxes: (T, 4) xyxy in pixels.
            labels: (T,) int64.
            masks: (T, h, w) bool, pseudo masks at stride 4.
            scores: (T,) from 0 to 1, or TRUE_MASK.
        """
        self._grow(*images.shape[-2:])
        height, width = self.images.shape[-2:]
        masks = fit_to(masks, height // STRIDE, width // STRIDE)
        scores = scores.float() * masks.flatten(1).any(1)

        entering = [i for i, count in enumerate(counts) if count]
        counts = self.counts + [counts[i] for i in entering]
        leaving = max(len(counts) - self.capacity, 0)
        old = sum(counts[:leaving])
        new = max(old - len(self.scores), 0)  # of this batch itself, when it is larger than the bank
        self.masks = torch.cat([self.masks[old:], masks[new:]])
        self.boxes = torch.cat([self.boxes[old:], boxes[new:].float()])
        self.labels = torch.cat([self.labels[old:], labels[new:]])
        self.scores = torch.cat([self.scores[old:], scores[new:]])
        self.counts = counts[leaving:]
        self.entered += len(entering)

        staying = torch.tensor(entering[-self.capacity :], dtype=torch.int64)
        slots = torch.arange(self.entered - len(staying), self.entered) % self.capacity
        pixels = images.index_select(0, staying.to(images.device, non_blocking=True))
        self.images.index_copy_(0, slots.to(images.device, non_blocking=True), fit_to(pixels, height, width))

    def _grow(self, height: int, width: int) -> None:
        height, width = max(height, self.images.shape[-2]), max(width, self.images.shape[-1])
        if self.images.shape[-2:] != (height, width):
            self.images = fit_to(self.images, height, width)
            self.masks = fit_to(self.masks, height // STRIDE, width // STRIDE)

    @property
    def slots(self) -> Tensor:
        """(M,) int64: where in ``images`` each object's image is."""
        oldest = self.entered - len(self)
        return ((oldest + numbered(self.counts)) % self.capacity).to(self.labels.device, non_blocking=True)

    @property
    def known(self) -> Tensor:
        """(M,) bool: objects that are cut out by their true masks."""
        return self.scores > 1

    def pictures(self, objects: Tensor) -> Tensor:
        """(R, 3, H, W) float32: the images of (R,) objects, as the network got them."""
        return self.pixels.normalise(self.images[self.slots[objects]])

    def draw(self, seeds: Sequence[Seed], most: int) -> tuple[Tensor, Tensor]:
        """Draw objects without replacement by score^power, for several images independently.

        The objects race: each needs a random time, exponential with rate score^power; the first ones win.
        Those with true masks start before all others.

        Args:
            seeds: of R images.
            most: objects a draw, fewer when the bank has not so many.

        Returns:
            (R, K) int64 objects in the order of the draw, and (R, K) bool, False where none was left to draw.
        """
        weights = self.scores.clamp(max=1) ** self.power * (self.scores > 0)  # 0 ** 0 is 1
        times = -(1 - uniform(seeds, "race", len(weights))).log()
        speed = weights / times.clamp(min=1e-9).to(weights.device, non_blocking=True)
        speed = torch.where(self.known, FIRST * speed, speed)
        first = speed.topk(min(most, len(weights)), dim=1)
        return first.indices, first.values > 0

    def state_dict(self) -> dict[str, Any]:
        """All attributes but the settings, without copies."""
        return {name: getattr(self, attribute) for name, attribute in STATE.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the state of a bank; of one that held more images, with its newest.

        Raises:
            KeyError: something is missing.
        """
        pictures, device = state["pictures"], self.images.device
        self.entered, self.counts = state["entered"], state["counts"][-self.capacity :]
        gone = sum(state["counts"]) - sum(self.counts)
        for name in ("masks", "boxes", "labels", "scores"):
            setattr(self, name, state[name][gone:].to(device, copy=True))
        numbers = torch.arange(self.entered - len(self.counts), self.entered)
        self.images = torch.zeros(self.capacity, *pictures.shape[1:], dtype=pictures.dtype, device=device)
        self.images[numbers % self.capacity] = pictures[numbers % len(pictures)].to(device)


def fit_to(maps: Tensor, height: int, width: int) -> Tensor:
    """Cut or zero-pad the last two dimensions at the bottom and right to (height, width)."""
    return F.pad(maps, (0, width - maps.shape[-1], 0, height - maps.shape[-2]))
