"""Targets after pasting: what it leaves of the objects, the device knows before the host does."""

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from sim_m2f.structures import Target
from sim_m2f.supervision.matcher import of_images
from sim_m2f.supervision.targets import Boxes, Targets, box_ranges, flatten_targets, numbered


class PastedTargets(Sequence[Target]):
    """The targets of a batch in which something was pasted.

    Whoever looks at them waits for the device, unless the criterion has had them transferred with its costs.

    Args:
        table: (T, 7) on the device: box, label, 1 for an object that stays, 1 for one whose mask is
            known; one image's after the other's.
        counts: objects per image, those included that do not stay.
        collect: the targets that a table on the CPU describes.
    """

    def __init__(self, table: Tensor, counts: list[int], collect: Callable[[Tensor], list[Target]]) -> None:
        self.table, self.counts, self.collect = table, counts, collect
        self.known: list[Target] | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> list[Target]: ...
    def __getitem__(self, index: int | slice) -> Target | list[Target]:
        if self.known is None:
            self.known = self.collect(self.table.cpu())
        return self.known[index]

    def boxes(self, size: tuple[int, int]) -> Boxes:
        """All objects, those included that do not stay; ``size`` (h, w) is that of the maps."""
        boxes, device = self.table[:, :4], self.table.device
        image_index = numbered(self.counts).to(device, non_blocking=True)
        labels = self.table[:, 4].long()
        return Boxes(labels, image_index, boxes, box_ranges(boxes, size), self.counts, size)

    def settle(self, cost: Tensor) -> list[Tensor]:
        """Per image the cost (L, Q, N) of the objects that stay, of (L, B, Q, N) on the device."""
        numbers, table = (
            torch.cat([cost.flatten(), self.table.flatten()]).cpu().split([cost.numel(), self.table.numel()])
        )
        table = table.view_as(self.table)
        self.known = self.collect(table)
        stays = (table[:, 5] > 0).split(self.counts)
        each = zip(numbers.view_as(cost).unbind(1), stays, strict=True)
        return [of_image[..., : len(kept)][..., kept] for of_image, kept in each]


def settled(
    targets: Sequence[Target],
    size: tuple[int, int],
    device: torch.device,
    cost: Callable[[Boxes], Tensor],
) -> tuple[Targets, list[Tensor]]:
    """The objects of a batch, and per image what they cost, (L, Q, N) on the CPU, by one transfer.

    Args:
        targets: one per image.
        size: (h, w) of the maps at stride 4.
        device: of the maps.
        cost: (L, B, Q, N) costs of boxes.
    """
    if isinstance(targets, PastedTargets):
        costs = targets.settle(cost(targets.boxes(size)))
        return flatten_targets(targets, size, device), costs
    objects = flatten_targets(targets, size, device)
    return objects, of_images(cost(objects), objects.counts)
