"""A COCO data set of drawn ellipses on noise, for timing where COCO itself is not at hand."""

import json
import random
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

SIZE = (640, 480)  # width and height, COCO's most frequent
CORNERS = 24


@cache
def write(folder: Path, classes: int, objects: int, images: int = 32) -> list[str]:
    """Write pictures with so many ellipses each; returns the keys and values that train on them."""
    random.seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, list[dict]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, classes + 1)],
    }
    for number in range(1, images + 1):
        picture = noise(number)
        for _ in range(objects):
            outline = ellipse()
            ImageDraw.Draw(picture).polygon(outline, fill=tuple(random.randrange(256) for _ in range(3)))
            content["annotations"].append(
                annotation(len(content["annotations"]) + 1, number, random.randint(1, classes), outline)
            )
        picture.save(folder / f"{number}.jpg")
        size = dict(zip(("width", "height"), SIZE, strict=True))
        content["images"].append({"id": number, "file_name": f"{number}.jpg", **size})
    (folder / "set.json").write_text(json.dumps(content))
    return ["DATASETS.TRAIN_ANNOTATIONS", str(folder / "set.json"), "DATASETS.TRAIN_IMAGES", str(folder)]


def noise(seed: int) -> Image.Image:
    """A picture of soft random colours."""
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, SIZE[::-1], mode="bilinear")[0].permute(1, 2, 0)
    return Image.fromarray((255 * smooth).byte().numpy())


def ellipse() -> list[tuple[float, float]]:
    """The corners of an ellipse inside the picture, 30 to 250 pixels wide and high."""
    width, height = (random.uniform(15, 125) for _ in range(2))
    x, y = (random.uniform(radius, side - radius) for radius, side in zip((width, height), SIZE, strict=True))
    angles = 2 * torch.pi * torch.arange(CORNERS) / CORNERS
    corners = torch.stack([x + width * angles.cos(), y + height * angles.sin()], dim=1)
    return [(across, down) for across, down in corners.tolist()]


def annotation(number: int, image: int, category: int, outline: list[tuple[float, float]]) -> dict:
    columns, rows = zip(*outline, strict=True)
    left, top = min(columns), min(rows)
    width, height = max(columns) - left, max(rows) - top
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "area": 0.78 * width * height,
        "bbox": [left, top, width, height],
        "segmentation": [[coordinate for corner in outline for coordinate in corner]],
    }
