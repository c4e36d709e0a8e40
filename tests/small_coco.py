"""A small COCO data set of real files, for the tests to read and to break."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from sim_m2f.data.catalog import DatasetSource

SIZES = {11: (60, 80), 12: (64, 48), 15: (90, 90)}  # image id -> (height, width)


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return mask


def write_images(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (height, width) in SIZES.items():
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def small_coco(folder: Path) -> dict[str, Any]:
    """Write three images into folder/images; returns a right COCO JSON for them.

    It has sparse category ids, all three kinds of segmentation, a crowd region, a box of zero area, a box
    that reaches half a pixel out of its image and an image without annotations.
    """
    (folder / "images").mkdir(parents=True)
    write_images(folder / "images")
    compressed = coco_mask.encode(rectangle(SIZES[12], (5, 10, 20, 30)))
    compressed["counts"] = compressed["counts"].decode()
    uncompressed = {"size": [60, 80], "counts": [60 * 10 + 20, 20, 40, 20, 60 * 80 - 60 * 10 - 100]}
    objects = [
        (101, 11, 90, [10, 20, 30, 20], [[10, 20, 40, 20, 40, 40, 10, 40]], 0),
        (102, 11, 3, [10, 20, 2, 20], uncompressed, 0),
        (103, 12, 7, [5, 10, 20, 30], compressed, 0),
        (104, 12, 7, [0, 0, 40, 60], compressed, 1),
        (105, 12, 3, [7, 9, 0, 12], [[7, 9, 7, 21, 7, 15]], 0),
        (106, 12, 3, [8, 30, 40.5, 34.5], [[8, 30, 48, 30, 48, 64]], 0),
    ]
    keys = ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd")
    return {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            for number, (height, width) in SIZES.items()
        ],
        "categories": [{"id": 90, "name": "c"}, {"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
        "annotations": [dict(zip(keys, values, strict=True)) for values in objects],
    }


def save(folder: Path, content: Any) -> DatasetSource:
    """Write ``content`` as the JSON of the set in ``folder``."""
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return DatasetSource("set", path, folder / "images")
