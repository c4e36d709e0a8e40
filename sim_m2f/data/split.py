"""A data set in two, for training and validation, so that both hold their share of every class."""

from collections.abc import Mapping
from typing import Any

import numpy as np


def split_images(content: Mapping[str, Any], share: float, seed: int) -> set[int]:
    """The ids of the images for validation.

    Images are shuffled by the seed; then, the rarest class first, images with a class go to validation until
    it has its share of the class's objects, as long as the other part keeps some. Images without objects
    are shared out alike.

    Args:
        content: a COCO JSON.
        share: of the objects of each class, above 0 and below 1.
        seed: the same one gives the same split.
    """
    places = {image["id"]: place for place, image in enumerate(content["images"])}
    labels = {item["id"]: label for label, item in enumerate(content["categories"])}
    counts = np.zeros((len(places), len(labels)), np.int64)
    for annotation in content.get("annotations", []):
        if not annotation.get("iscrowd"):
            counts[places[annotation["image_id"]], labels[annotation["category_id"]]] += 1
    counts = np.column_stack([counts, counts.sum(1) == 0])  # images without objects as one more class
    order = np.random.default_rng(seed).permutation(len(places))
    total = counts.sum(0)
    taken = np.zeros_like(total)  # objects of each class on the chosen images
    chosen = np.zeros(len(places), bool)
    for label in np.argsort(total, kind="stable"):
        wanted = share * total[label]
        for place in order[counts[order, label] > 0]:
            own, lacking = counts[place], wanted - taken[label]
            if chosen[place] or own[label] >= 2 * lacking:
                continue
            rest = total - taken - own
            if (rest[own > 0] > 0).all():
                chosen[place] = True
                taken += own
    ids = [image["id"] for image in content["images"]]
    return {ids[place] for place in np.flatnonzero(chosen)}


def part(content: Mapping[str, Any], image_ids: set[int]) -> dict[str, Any]:
    """The JSON with these images alone and their annotations; ids and order stay."""
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in image_ids],
        "annotations": [each for each in content.get("annotations", []) if each["image_id"] in image_ids],
    }
