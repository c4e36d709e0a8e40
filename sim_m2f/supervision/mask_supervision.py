"""Mask2Former's own supervision by masks, at sampled points (paper, section 3.3; PointRend, section 4.2).

The upper bound for learning from boxes; used when MODEL.SIM.SUPERVISION is "mask".
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sim_m2f.draws import uniform
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.losses import linear_dice_cost, linear_dice_loss
from sim_m2f.supervision.matcher import Match, assign, class_cost, of_images
from sim_m2f.supervision.targets import Targets

# Random points (L, T, number, 2) on T masks after L layers, x and y from 0 to 1, for a purpose.
Points = Callable[[str, int], Tensor]


def sample_points(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps (N, C, h, w) at points (N, P, 2), x and y from 0 to 1, as (N, C, P)."""
    return F.grid_sample(maps, 2 * points[:, None] - 1, align_corners=False).squeeze(2)


def sample_together(maps: Tensor, points: Tensor) -> Tensor:
    """``sample_points`` of many maps (C, h, w) at the same points (P, 2), as (C, P)."""
    if maps.device.type != "cpu":
        return sample_points(maps[None], points[None])[0]
    height, width = maps.shape[-2:]
    size = points.new_tensor([width, height])
    place = points * size - 0.5
    first = place.floor()
    share = torch.stack([first + 1 - place, place - first])  # (2, P, 2) of the first and of the next pixel
    pixel = torch.stack([first, first + 1])
    share = share * ((pixel >= 0) & (pixel < size))
    pixel = pixel.clamp(min=0).minimum(size - 1).long()
    corners = (pixel[:, None, :, 1] * width + pixel[None, :, :, 0]).flatten(0, 1)
    weights = (share[:, None, :, 1] * share[None, :, :, 0]).flatten(0, 1)
    # one sum of four rows per point: PyTorch's grid_sample takes the maps one after the other on a CPU
    rows = maps.flatten(1).T.contiguous()
    return F.embedding_bag(corners.T, rows, per_sample_weights=weights.T, mode="sum").T


class MaskMatcher:
    """cost = class_weight * -probability + mask_weight * cross-entropy + dice_weight * dice at random points.

    Args:
        class_weight, mask_weight, dice_weight: weights of the three costs.
        num_points: points per image, drawn by its seed and the same for all queries and objects.
    """

    def __init__(self, class_weight: float, mask_weight: float, dice_weight: float, num_points: int) -> None:
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points

    @torch.no_grad()
    def __call__(self, layers: Layers, masks: list[Tensor], targets: Targets) -> Match:
        """
        Args:
            layers: the network's predictions.
            masks: per image (N, H, W) bool.
            targets: the objects of the batch.

        Raises:
            UserError: a cost is not finite, because the network has diverged.
        """
        cost = self.class_weight * class_cost(layers.logits, targets)
        for image, truth in enumerate(masks):
            seed = targets.seeds[image : image + 1]
            points = uniform(seed, "matching", self.num_points, 2, device=cost.device)
            maps = layers.masks[image]
            predicted = sample_together(maps.flatten(0, 1).float(), points[0]).view(*maps.shape[:2], -1)
            target = sample_points(truth[None].to(predicted.dtype), points)[0]
            mask_cost = self.mask_weight * _cross_entropy_cost(predicted, target)
            mask_cost += self.dice_weight * linear_dice_cost(predicted.sigmoid(), target)
            cost[:, image, :, : len(truth)] += mask_cost
        return assign(of_images(cost, targets.counts), targets)


def _cross_entropy_cost(logits: Tensor, target: Tensor) -> Tensor:
    """(L, Q, P) logits and (N, P) masks to (L, Q, N): mean binary cross-entropy over the points."""
    # softplus(-x) = softplus(x) - x
    return (F.softplus(logits).sum(-1)[..., None] - logits @ target.T) / logits.shape[-1]


@torch.no_grad()
def uncertain_points(
    logits: Tensor, points: Points, num_points: int, oversample: float, importance: float
) -> Tensor:
    """Points where masks are least certain, and some at random (PointRend).

    Args:
        logits: (N, 1, h, w) mask logits, those of all objects after one layer after the other.
        points: draws points on these masks.
        num_points: points per mask.
        oversample: candidates per point.
        importance: share of the points that are the candidates nearest to logit 0.

    Returns:
        (N, num_points, 2), x and y from 0 to 1.
    """
    candidates = points("candidate points", int(num_points * oversample)).flatten(0, 1)
    certainty = sample_points(logits, candidates).squeeze(1).abs()
    chosen = certainty.topk(int(num_points * importance), dim=1, largest=False, sorted=False).indices
    uncertain = candidates.gather(1, chosen[..., None].expand(-1, -1, 2))
    random = points("random points", num_points - uncertain.shape[1]).flatten(0, 1)
    return torch.cat([uncertain, random], dim=1)


def mask_losses(
    logits: Tensor, masks: Tensor, points: Points, num_points: int, oversample: float, importance: float
) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice at uncertain points.

    Args:
        logits: (L, T, h, w), stride 4: the matched mask of every object after every decoder layer.
        masks: (T, H, W) bool, or probabilities.
        points: draws points on these masks.
        num_points, oversample, importance: see ``uncertain_points``.

    Returns:
        (L, T) mean cross-entropy over the points and (L, T) dice loss.
    """
    layers, objects = logits.shape[:2]
    maps = logits.flatten(0, 1)[:, None]
    places = uncertain_points(maps, points, num_points, oversample, importance)
    predicted = sample_points(maps, places).view(layers, objects, num_points)
    per_object = places.view(layers, objects, num_points, 2).transpose(0, 1).flatten(1, 2)
    target = (
        sample_points(masks[:, None].to(logits.dtype), per_object)
        .view(objects, layers, num_points)
        .transpose(0, 1)
    )
    cross_entropy = F.binary_cross_entropy_with_logits(predicted, target, reduction="none").mean(-1)
    return cross_entropy, linear_dice_loss(predicted.sigmoid(), target)
