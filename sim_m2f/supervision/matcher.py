"""Hungarian matching of queries and boxes; it never sees a mask of the annotation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert

from sim_m2f.errors import UserError
from sim_m2f.geometry import generalized_iou, projection_boxes
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.losses import dice_cost
from sim_m2f.supervision.targets import Boxes, Targets


@dataclass(frozen=True)
class Match:
    """Which query claims which object after each decoder layer.

    Attributes:
        query: (L, T) int64, the query of every object; 0 where it has none.
        matched: (L, T) bool, False for objects left over when an image holds more objects than queries.
    """

    query: Tensor
    matched: Tensor

    def split(self, layers: int) -> tuple["Match", "Match"]:
        """That of the first layers, and that of all others."""
        first = Match(self.query[:layers], self.matched[:layers])
        return first, Match(self.query[layers:], self.matched[layers:])


Matcher = Callable[[Layers, Targets], Match]


class BoxMatcher:
    """cost = class_weight * -probability + projection_weight * (dice along x + dice along y)
    + box_weight * (L1 + 1 - GIoU).

    L1 and GIoU compare the box around the mask with the annotated box, both in shares of the image.
    """

    def __init__(self, class_weight: float, projection_weight: float, box_weight: float) -> None:
        self.class_weight = class_weight
        self.projection_weight = projection_weight
        self.box_weight = box_weight

    def __call__(self, layers: Layers, targets: Targets) -> Match:
        """
        Raises:
            UserError: a cost is not finite, because the network has diverged.
        """
        return assign(of_images(self.cost(*layers.seen, targets), targets.counts), targets)

    @torch.no_grad()
    def cost(self, logits: Tensor, along_x: Tensor, along_y: Tensor, boxes: Boxes) -> Tensor:
        """(L, B, Q, N): what each query costs for each of the image's objects.

        Args:
            logits: (L, B, Q, C+1) class logits of L layers.
            along_x: (L, B, Q, w), largest mask probability of every column, stride 4.
            along_y: (L, B, Q, h), likewise of every row.
            boxes: those of the batch.
        """
        columns, rows = (_padded(projection, boxes) for projection in boxes.projections)
        cost = self.class_weight * class_cost(logits, boxes)
        cost = cost + self.projection_weight * (dice_cost(along_x, columns) + dice_cost(along_y, rows))
        if self.box_weight:
            cost = cost + self.box_weight * _box_cost(along_x, along_y, boxes)
        return cost


def class_cost(logits: Tensor, boxes: Boxes) -> Tensor:
    """(L, B, Q, N): minus the probability of each object's class, from logits (L, B, Q, C+1)."""
    labels = _padded(boxes.labels, boxes)
    index = labels[None, :, None].expand(*logits.shape[:3], -1)
    return -logits.softmax(-1).gather(-1, index)


def of_images(cost: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Per image the cost (L, Q, N) of its objects, of (L, B, Q, N), transferred to the CPU once."""
    each = zip(cost.cpu().unbind(1), counts, strict=True)
    return [of_image[..., :count] for of_image, count in each]


def assign(costs: Sequence[Tensor], targets: Targets) -> Match:
    """The cheapest assignment per layer and image of costs (L, Q, N) that are on the CPU."""
    shape = len(costs[0]), len(targets)
    query, matched = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    start = 0
    for image_costs in costs:
        for layer, cost in enumerate(image_costs.numpy()):
            if not np.isfinite(cost).all():
                raise UserError(
                    "the network's outputs are not finite any more; lower SOLVER.BASE_LR, or, in fp16, set "
                    "SOLVER.AMP.DTYPE bf16"
                )
            queries, objects = linear_sum_assignment(cost)
            query[layer, start + objects] = queries
            matched[layer, start + objects] = True
        start += image_costs.shape[-1]
    device = targets.labels.device
    return Match(
        torch.from_numpy(query).to(device, non_blocking=True),
        torch.from_numpy(matched).to(device, non_blocking=True),
    )


def _padded(values: Tensor, boxes: Boxes) -> Tensor:
    """(T, ...) to (B, N, ...), zeros where an image has fewer than N objects."""
    return pad_sequence(values.split(boxes.counts), batch_first=True)


def _box_cost(along_x: Tensor, along_y: Tensor, boxes: Boxes) -> Tensor:
    """(L, B, Q, N): L1 + (1 - GIoU) of the boxes around the masks and the annotated ones."""
    predicted = projection_boxes(along_x, along_y)[..., None, :]
    annotated = _padded(boxes.relative_boxes, boxes)[:, None]
    distance = box_convert(predicted, "xyxy", "cxcywh") - box_convert(annotated, "xyxy", "cxcywh")
    return distance.abs().sum(-1) + 1 - generalized_iou(predicted, annotated)
