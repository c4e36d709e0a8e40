"""Pseudo masks: where prototypes see the class, corrected by where the teacher sees the object (SIM, 3.3).

Everything is computed once per step, for the pixels inside the boxes only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sim_m2f.config import CfgNode
from sim_m2f.distributed import sum_over_ranks
from sim_m2f.draws import uniform
from sim_m2f.geometry import iou, projection_boxes
from sim_m2f.supervision.layers import Layers
from sim_m2f.supervision.matcher import Match
from sim_m2f.supervision.prototypes import Prototypes
from sim_m2f.supervision.targets import BoxPixels, Targets, box_pixels

IGNORED = -1
CHUNK = 65536  # pixels that are gathered together
LEAST_WEIGHT = 1e-6  # of the mask of an object's own query


@dataclass(frozen=True)
class PositiveMasks:
    """K masks of every object that the teacher offers.

    Attributes:
        layer: decoder layer of each of the K masks.
        query: (K, T) int64, its query.
        weight: (K, T), 0 for a mask that does not count.
    """

    layer: list[int]
    query: Tensor
    weight: Tensor

    @property
    def quality(self) -> Tensor:
        """(T,): the weight of the last layer's mask of the object's own query."""
        return self.weight[self.layer.index(self.layer[-1])]


@dataclass(frozen=True)
class Evidence:
    """What the labels of P pixels are made from.

    Attributes:
        pixels: the P pixels.
        semantic: (P,) M_S.
        instance: (P,) M_I.
        positive: the masks whose weighted mean M_I is.
        proposal: (P,) masks from elsewhere and (T,) their quality, if there are any.
    """

    pixels: BoxPixels
    semantic: Tensor
    instance: Tensor
    positive: PositiveMasks
    proposal: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class PseudoLabels:
    """Labels of P pixels: 1 positive, 0 negative, -1 ignored.

    Attributes:
        final: (P,) labels of the blended mask.
        semantic: (P,) labels that the semantic mask alone would give.
        blend: (P,) M, the probability from which the final labels come.
        instance: (P,) M_I, the instance mask in it.
        pixels: the P pixels.
        quality: (T,) the teacher's probability of the object's class times IoU of its mask's box and the
            annotated one; with a proposal the mean of both qualities, weighted by themselves.
    """

    final: Tensor
    semantic: Tensor
    blend: Tensor
    instance: Tensor
    pixels: BoxPixels
    quality: Tensor

    def soft_masks(self, targets: Targets) -> Tensor:
        """(T, h, w): the labels of the pixels of the boxes, M itself where they are ignored; 0 elsewhere."""
        values = torch.where(self.final == IGNORED, self.blend.float(), self.final.float())
        masks = torch.zeros(len(targets), *targets.size, device=values.device)
        return masks.index_put((self.pixels.target, self.pixels.y, self.pixels.x), values)

    def masks(self, targets: Targets) -> tuple[Tensor, Tensor]:
        """(T, h, w) bool: the positive pixels of each object; (T,): their mean M, 0 where there is none."""
        positive, target = self.final == 1, self.pixels.target
        masks = torch.zeros(len(targets), *targets.size, dtype=torch.bool, device=positive.device)
        masks[target, self.pixels.y, self.pixels.x] = positive
        empty = torch.zeros(len(targets), device=positive.device)
        total = empty.index_add(0, target, self.blend.float() * positive)
        return masks, total / empty.index_add(0, target, positive.float()).clamp(min=1)


class PseudoMasks(nn.Module):
    """Makes the labels of a step from the teacher's outputs; keeps the prototypes (in ``state_dict``)."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.sim = cfg.MODEL.SIM
        classes, width = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        self.prototypes = Prototypes(classes, width, self.sim.PROTOTYPES)

    @torch.no_grad()
    def forward(self, layers: Layers, features: Tensor, targets: Targets, match: Match) -> PseudoLabels:
        """The labels of the pixels of the boxes; see ``evidence`` for the arguments."""
        return self.labels(self.evidence(layers, features, targets, match))

    @torch.no_grad()
    def update(self, parts: Sequence[tuple[Tensor, Targets, PseudoLabels]]) -> None:
        """Let the prototypes follow the teacher's features (B, d, h, w) at pixels with a confident M_I.

        Features, objects and labels are those of the parts of a rank's images.
        """
        prototypes, least = self.prototypes, self.sim.PROTOTYPES.CONFIDENT
        pixels = []
        for _, targets, labels in parts:
            target = labels.pixels.target
            pixels.append((targets.labels[target], targets.image_index[target], labels.instance > least))
        own = [
            prototypes.counts(classes, images, len(targets.counts), confident)
            for (classes, images, confident), (_, targets, _) in zip(pixels, parts, strict=True)
        ]
        total = sum_over_ranks(torch.cat(own).sum(0)).clamp(min=1)
        chosen = []
        for (features, targets, labels), part, count in zip(parts, pixels, own, strict=True):
            draws = pixel_draws(targets)
            index, classes = prototypes.sample(*part, draws, count / total, len(targets.classes))
            chosen.append((features_at(features, targets, labels.pixels, index), classes))
        prototypes.update(*map(torch.cat, zip(*chosen, strict=True)))

    @torch.no_grad()
    def evidence(self, layers: Layers, features: Tensor, targets: Targets, match: Match) -> Evidence:
        """M_S and M_I at the pixels of the boxes.

        Args:
            layers: the teacher's, see ``SIMCriterion.teacher_layers``.
            features: (B, d, h, w) its mask features.
            targets: the T objects.
            match: the teacher's queries of the objects.
        """
        pixels = box_pixels(targets)
        prototypes = self.sim.PROTOTYPES
        similarity = self.similarity(features, targets, pixels)
        semantic = ((similarity - prototypes.CENTER) / prototypes.TEMPERATURE).sigmoid()
        keys = self.sim.POSITIVE_MASKS
        further = keys.QUERIES if keys.WEIGHTING else 0
        masks = positive_masks(*layers.seen, match, targets, further, keys.MIN_IOU)
        instance = instance_probability(layers.masks, masks, targets, pixels)
        given = targets.proposals
        proposal = (given.masks[pixels.target, pixels.y, pixels.x], given.quality) if given else None
        return Evidence(pixels, semantic, instance, masks, proposal)

    def similarity(self, features: Tensor, targets: Targets, pixels: BoxPixels) -> Tensor:
        """(P,): that of each pixel's feature with the nearest prototype of its object's class, -1 to 1.

        Class by class, and ``CHUNK`` pixels at a time, so that no more features than theirs are in memory.
        """
        index = targets.class_index.to(features.device, non_blocking=True)
        order = index[pixels.target].argsort(stable=True)
        sizes = torch.zeros_like(targets.classes).index_add(0, targets.class_index, targets.areas).tolist()
        parts = [
            self.prototypes.similarity(features_at(features, targets, pixels, part), label)
            for label, own in zip(targets.classes.tolist(), order.split(sizes), strict=True)
            for part in own.split(CHUNK)
        ]
        similarity = torch.cat([features.new_zeros(0, dtype=torch.float32), *parts])
        return torch.empty_like(similarity).index_copy_(0, order, similarity)

    def labels(self, evidence: Evidence) -> PseudoLabels:
        """The labels of the pixels of the boxes; proposals below GATED_MASKS.MIN_QUALITY do not count."""
        pseudo, proposal = self.sim.PSEUDO_MASKS, evidence.proposal
        masks = evidence.semantic, evidence.instance
        bounds = pseudo.POSITIVE, pseudo.NEGATIVE, pseudo.CONFIDENT
        if proposal:
            proposed, quality = proposal
            proposal = proposed, quality * (quality >= self.sim.GATED_MASKS.MIN_QUALITY)
        quality = evidence.positive.quality
        return pseudo_labels(*masks, evidence.pixels, quality, pseudo.ALPHA, *bounds, proposal)


def pixel_draws(targets: Targets) -> Tensor:
    """(P,): a random number of every pixel of every box."""
    pixels = [int(areas.sum()) for areas in targets.areas.split(targets.counts)]
    device, seeds = targets.labels.device, targets.seeds
    drawn = [uniform([seed], "prototypes", n, device=device) for seed, n in zip(seeds, pixels, strict=True)]
    return torch.cat(drawn, dim=1)[0]


def features_at(features: Tensor, targets: Targets, pixels: BoxPixels, index: Tensor) -> Tensor:
    """(N, d): maps (B, d, h, w) at those of the pixels that (N,) ``index`` names."""
    return features[targets.image_index[pixels.target[index]], :, pixels.y[index], pixels.x[index]]


def positive_masks(
    logits: Tensor,
    along_x: Tensor,
    along_y: Tensor,
    match: Match,
    targets: Targets,
    queries: int,
    min_iou: float,
) -> PositiveMasks:
    """The object's query in every decoder layer, and unmatched ones of the last that claim the same object.

    A mask weighs its probability of the object's class times the IoU of its own box and the annotated box.

    Args:
        logits: (L, B, Q, C+1) the teacher's class logits.
        along_x, along_y: (L, B, Q, w) and (L, B, Q, h), largest mask probability per column and row.
        match: the teacher's queries of the objects.
        targets: the T objects.
        queries: most further queries per object.
        min_iou: least IoU of a further query.

    Returns:
        K = L + ``queries`` masks (fewer when there are fewer queries).
    """
    layers, batch, count, _ = logits.shape
    probability = logits.softmax(-1)[:, targets.image_index, :, targets.labels].transpose(0, 1)
    boxes = projection_boxes(along_x, along_y)[:, targets.image_index]
    overlap = iou(boxes, targets.relative_boxes[:, None])
    weight = probability * overlap
    matched = (weight.gather(2, match.query[..., None])[..., 0] + LEAST_WEIGHT) * match.matched
    free = match.matched.new_ones(batch, count + 1)  # a column more is that of the objects left over
    own = targets.image_index, torch.where(match.matched[-1], match.query[-1], count)
    free = free.index_put(own, free.new_zeros(()))[targets.image_index, :count]
    claims = torch.where(free & (overlap[-1] >= min_iou), weight[-1], 0.0)
    further, further_query = claims.topk(min(queries, count), dim=1)
    return PositiveMasks(
        layer=[*range(layers), *[layers - 1] * further.shape[1]],
        query=torch.cat([match.query, further_query.T]),
        weight=torch.cat([matched, further.T]),
    )


def instance_probability(
    predicted: Tensor, masks: PositiveMasks, targets: Targets, pixels: BoxPixels
) -> Tensor:
    """M_I: the weighted mean of the object's positive masks at the pixels of its box.

    Args:
        predicted: (B, L, Q, h, w) mask logits, stride 4.
        masks: which of them are the object's, and their weights.
        targets: the T objects.
        pixels: the P pixels.

    Returns:
        (P,) probabilities; 0 for an object without a mask.
    """
    _, layers, queries, height, width = predicted.shape
    layer = torch.tensor(masks.layer).to(predicted.device, non_blocking=True)[:, None]
    rows = (targets.image_index * layers + layer) * queries + masks.query
    share = masks.weight / masks.weight.sum(0).clamp(min=LEAST_WEIGHT)
    flat, place = predicted.flatten(), pixels.y * width + pixels.x
    parts = []
    for target, pixel in zip(pixels.target.split(CHUNK), place.split(CHUNK), strict=True):
        places = rows.index_select(1, target) * (height * width) + pixel
        values = flat.index_select(0, places.view(-1)).view(places.shape).float().sigmoid()
        parts.append((values * share.index_select(1, target)).sum(0))
    return torch.cat(parts)


def positive_thresholds(
    blend: Tensor,
    instance: Tensor,
    target: Tensor,
    objects: int,
    bounds: tuple[float, float],
    confident: float,
) -> Tensor:
    """t_pos per object: M at rank n_pos, its number of pixels with M_I > ``confident``, within ``bounds``.

    Args:
        blend, instance: (P,) M and M_I at the pixels of the boxes.
        target: (P,) int64, the object of each pixel, ascending.
        objects: T.
        bounds: least and largest threshold; the largest where n_pos is 0.
        confident: the M_I above which a pixel counts.

    Returns:
        (T,).
    """
    empty = torch.zeros(objects, dtype=torch.int64, device=target.device)
    positives = empty.index_add(0, target, (instance > confident).long())
    areas = empty.index_add(0, target, torch.ones_like(target))
    descending = (2 * target.double() - blend.double()).argsort()
    rank = areas.cumsum(0) - areas + (positives - 1).clamp(min=0)
    value = blend[descending[rank]].clamp(*bounds)
    return torch.where(positives > 0, value, torch.full_like(value, bounds[1]))


def pseudo_labels(
    semantic: Tensor,
    instance: Tensor,
    pixels: BoxPixels,
    quality: Tensor,
    alpha: float,
    positive: tuple[float, float],
    negative: float,
    confident: float,
    proposal: tuple[Tensor, Tensor] | None = None,
) -> PseudoLabels:
    """M = alpha M_S + (1 - alpha) M_I: positive from t_pos on, negative below t_neg, ignored between.

    With a mask M_P from elsewhere, of quality q_P, it is (q M + q_P M_P) / (q + q_P).

    Args:
        semantic, instance: (P,) M_S and M_I at the pixels of the boxes.
        pixels: the P pixels, one object's after the other's.
        quality: (T,) of the objects' masks, see ``PseudoLabels``.
        alpha: weight of the semantic mask.
        positive: least and largest value of the adaptive t_pos.
        negative: t_neg.
        confident: the M_I above which a pixel counts for the rank that t_pos is taken at.
        proposal: (P,) M_P and (T,) q_P, 0 for an object without.
    """
    blend = alpha * semantic + (1 - alpha) * instance
    if proposal:
        proposed, proposed_quality = proposal
        share = proposed_quality / (quality + proposed_quality).clamp(min=LEAST_WEIGHT)
        blend = blend + share[pixels.target] * (proposed - blend)
        quality = quality + share * (proposed_quality - quality)
    thresholds = positive_thresholds(blend, instance, pixels.target, len(quality), positive, confident)
    threshold = thresholds[pixels.target]

    def label(mask: Tensor) -> Tensor:
        undecided = torch.full_like(pixels.target, IGNORED)
        return torch.where(mask >= threshold, 1, torch.where(mask < negative, 0, undecided))

    return PseudoLabels(label(blend), label(semantic), blend, instance, pixels, quality)
