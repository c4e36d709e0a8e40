"""Level set: a mask splits its box into two regions, each of one colour (BoxLevelSet, https://arxiv.org/abs/2207.09055)."""

import torch
from torch import Tensor

from sim_m2f.structures import STRIDE
from sim_m2f.supervision.affinity import lab_at
from sim_m2f.supervision.matched import MatchedBoxes, per_object
from sim_m2f.supervision.targets import BoxPixels, box_pixels


def level_set(matched: MatchedBoxes) -> Tensor:
    """The energy of every object's mask in its box, per annotated object, summed over the layers.

    The colours are CIELAB at stride 4. With FEATURES the teacher's mask features are a second image whose
    energy is added, where a loss that needs the teacher is in use too.
    """
    supervision, objects = matched.supervision, matched.objects
    pixels = box_pixels(objects)
    image = objects.image_index[pixels.target]
    maps = [lab_at(supervision.images, STRIDE)]
    if supervision.sim.LEVEL_SET.FEATURES and supervision.teacher_features is not None:
        maps.append(supervision.teacher_features.float())
    masks = matched.logits.pixels.index_select(1, matched.pixels.places(pixels)).sigmoid()
    energy = sum(
        (region_energy(masks, values[image, :, pixels.y, pixels.x], pixels, len(objects)) for values in maps),
        start=masks.new_zeros(len(masks), len(objects)),
    )
    return per_object(energy, matched.by_box, objects)


def region_energy(masks: Tensor, values: Tensor, pixels: BoxPixels, objects: int) -> Tensor:
    """What two regions leave unexplained of the variance in each box (Chan and Vese, without a length term).

    E = sum(p |v - v1|^2 + (1 - p) |v - v2|^2) / sum |v - v0|^2, with the weighted means v1 and v2 of both
    regions and the mean v0 of the box: 0 where each region has one colour, 1 where the mask tells nothing.

    Args:
        masks: (L, P) probabilities at the pixels of the boxes.
        values: (P, C) colours or features.
        pixels: the P pixels.
        objects: T.

    Returns:
        (L, T).
    """

    def total(weights: Tensor) -> Tensor:
        """(..., P) to (..., T): the sum over each object's pixels."""
        return weights.new_zeros(*weights.shape[:-1], objects).index_add(-1, pixels.target, weights)

    area = total(torch.ones_like(values[:, 0]))
    away = values - (total(values.T) / area)[:, pixels.target].T
    variance = total(away.square().sum(1))
    # sum p |v - v1|^2 = sum p |v|^2 - |sum p v|^2 / sum p, so means need not be taken to the pixels
    explained = masks.new_zeros(len(masks), objects)
    sizes = pixels.areas.tolist()
    for region in (masks, 1 - masks):
        # one object's after the other's, because all layers' weighted values together would be (L, C, P)
        own = [r @ v for r, v in zip(region.split(sizes, 1), away.split(sizes), strict=True)]
        moments = torch.stack(own, 1) if own else region.new_zeros(*explained.shape, values.shape[1])
        explained = explained + moments.square().sum(-1) / total(region).clamp(min=1e-6)
    return (variance - explained) / variance.clamp(min=1e-6)
