"""What a data set is like, in numbers that settings follow from."""

from dataclasses import dataclass

import numpy as np

from sim_m2f.data.coco import CocoData

SMALL, MANY = 1 / 12, 12  # a set is of many small objects below the first and above the second


@dataclass(frozen=True)
class Survey:
    """Counts of a data set without crowd regions and boxes of zero area.

    Attributes:
        images: with and without objects.
        objects: in all images.
        most: in one image.
        per_image: mean over the images that have some.
        side: median of the boxes' sides (roots of their areas), in shares of their image's longer side.
        per_class: objects by name of the class.
    """

    images: int
    objects: int
    most: int
    per_image: float
    side: float
    per_class: dict[str, int]

    @property
    def many_small(self) -> bool:
        """Whether images are better seen as tiles."""
        return self.side < SMALL and self.per_image > MANY


def survey(data: CocoData) -> Survey:
    """Count; a set without objects has the side 1."""
    counts = np.array([len(image.labels) for image in data.images])
    sides = [
        np.sqrt((image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)) / max(image.height, image.width)
        for image in data.images
    ]
    labels = np.concatenate([image.labels for image in data.images])
    of_class = np.bincount(labels.astype(int), minlength=len(data.class_names)).tolist()
    some = counts[counts > 0]
    return Survey(
        images=len(counts),
        objects=int(counts.sum()),
        most=int(counts.max()),
        per_image=float(some.mean()) if len(some) else 0.0,
        side=float(np.median(np.concatenate(sides))) if len(some) else 1.0,
        per_class=dict(zip(data.class_names, of_class, strict=True)),
    )
