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
from sim_m2f.supervision.losses import dice_cost
from sim_m2f.supervision.targets import Targets


@dataclass(frozen=True)
class Match:
    """Which query claims which object after each decoder layer.

    Attributes:
        query: (L, T) int64, the query of every object; 0 where it has none.
        matched: (L, T) bool, False for objects left over when an image holds more objects than queries.
    """

    query: Tensor
    matched: Tensor


# Takes class logits (L, B, Q, C+1), the masks' projections (L, B, Q, w) and (L, B, Q, h), and the objects.
Matcher = Callable[[Tensor, Tensor, Tensor, Targets], Match]


class BoxMatcher:
    """cost = class_weight * -probability + projection_weight * (dice along x + dice along y)
    + box_weight * (L1 + 1 - GIoU).

    L1 and GIoU compare the box around the mask with the annotated box, both in shares of the image.
    """

    def __init__(self, class_weight: float, projection_weight: float, box_weight: float) -> None:
        self.class_weight = class_weight
        self.projection_weight = projection_weight
        self.box_weight = box_weight

    def __call__(self, logits: Tensor, along_x: Tensor, along_y: Tensor, targets: Targets) -> Match:
        """
        Raises:
            UserError: a cost is not finite, because the network has diverged.
        """
        return assign(self.cost(logits, along_x, along_y, targets), targets)

    @torch.no_grad()
    def cost(self, logits: Tensor, along_x: Tensor, along_y: Tensor, targets: Targets) -> Tensor:
        """(L, B, Q, N): what each query costs for each of the image's objects.

        Args:
            logits: (L, B, Q, C+1) class logits of L layers.
            along_x: (L, B, Q, w), largest mask probability of every column, stride 4.
            along_y: (L, B, Q, h), likewise of every row.
            targets: the objects of the batch.
        """
        columns, rows = (_padded(projection, targets) for projection in targets.projections)
        cost = self.class_weight * class_cost(logits, targets)
        cost = cost + self.projection_weight * (dice_cost(along_x, columns) + dice_cost(along_y, rows))
        if self.box_weight:
            cost = cost + self.box_weight * _box_cost(along_x, along_y, targets)
        return cost


class TogetherMatcher:
    """A ``Matcher`` that assigns, when it is called, what has waited for that too: one transfer for both.

    Args:
        matcher: whose costs count.
        waiting: (L, B, Q, N) costs of the same batch.

    Attributes:
        waited: the match of the waiting costs.
    """

    def __init__(self, matcher: BoxMatcher, waiting: Tensor) -> None:
        self.matcher, self.waiting = matcher, waiting

    def __call__(self, logits: Tensor, along_x: Tensor, along_y: Tensor, targets: Targets) -> Match:
        both = assign(
            torch.cat([self.waiting, self.matcher.cost(logits, along_x, along_y, targets)]), targets
        )
        layers = len(self.waiting)
        self.waited = Match(both.query[:layers], both.matched[:layers])
        return Match(both.query[layers:], both.matched[layers:])


def class_cost(logits: Tensor, targets: Targets) -> Tensor:
    """(L, B, Q, N): minus the probability of each object's class, from logits (L, B, Q, C+1)."""
    labels = _padded(targets.labels, targets)
    index = labels[None, :, None].expand(*logits.shape[:3], -1)
    return -logits.softmax(-1).gather(-1, index)


@torch.no_grad()
def mask_projections(mask_logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(L, B, Q, w) and (L, B, Q, h): the largest mask probability of every column and of every row."""
    along_x = torch.stack([layer.amax(-2) for layer in mask_logits]).float().sigmoid()
    along_y = torch.stack([layer.amax(-1) for layer in mask_logits]).float().sigmoid()
    return along_x, along_y


def assign(cost: Tensor, targets: Targets) -> Match:
    """The cheapest assignment per layer and image of a cost (L, B, Q, N), transferred to the CPU once."""
    host_cost = cost.cpu().numpy()
    layers = len(host_cost)
    query = np.zeros((layers, len(targets)), dtype=np.int64)
    matched = np.zeros((layers, len(targets)), dtype=bool)
    start = 0
    for image, count in enumerate(targets.counts):
        for layer in range(layers):
            image_cost = host_cost[layer, image, :, :count]
            if not np.isfinite(image_cost).all():
                raise UserError(
                    "the network's outputs are not finite any more; lower SOLVER.BASE_LR, or, in fp16, set "
                    "SOLVER.AMP.DTYPE bf16"
                )
            queries, objects = linear_sum_assignment(image_cost)
            query[layer, start + objects] = queries
            matched[layer, start + objects] = True
        start += count
    return Match(
        torch.from_numpy(query).to(cost.device, non_blocking=True),
        torch.from_numpy(matched).to(cost.device, non_blocking=True),
    )


def _padded(values: Tensor, targets: Targets) -> Tensor:
    """(T, ...) to (B, N, ...), zeros where an image has fewer than N objects."""
    return pad_sequence(values.split(targets.counts), batch_first=True)


def _box_cost(along_x: Tensor, along_y: Tensor, targets: Targets) -> Tensor:
    """(L, B, Q, N): L1 + (1 - GIoU) of the boxes around the masks and the annotated ones."""
    predicted = projection_boxes(along_x, along_y)[..., None, :]
    annotated = _padded(targets.relative_boxes, targets)[:, None]
    distance = box_convert(predicted, "xyxy", "cxcywh") - box_convert(annotated, "xyxy", "cxcywh")
    return distance.abs().sum(-1) + 1 - generalized_iou(predicted, annotated)
