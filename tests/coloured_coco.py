"""A small COCO data set whose objects have pure colours, and a network that needs no training to see them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pycocotools import mask as mask_utils
from torch import Tensor, nn

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.structures import Prompts

CATEGORIES = {3: "disc", 7: "ring", 90: "star & bar"}  # sparse ids; drawn red, green, blue
SIZES = {5: (64, 96), 2: (80, 64), 9: (128, 128), 4: (50, 70), 8: (96, 96)}  # image id -> (height, width)


class ColourNetwork(nn.Module):
    """Three queries, one per class, whose mask is the red, the green or the blue of the image.

    A prompted box has the mask of its class.
    """

    def __init__(self, scores: tuple[float, ...] = (0.9, 0.8, 0.7)) -> None:
        super().__init__()
        self.head = nn.Dropout(0.5)
        classes = torch.full((3, 4), -20.0)
        classes[range(3), range(3)] = torch.tensor(scores).logit()
        classes[:, 3] = 0.0
        self.register_buffer("classes", classes)

    def forward(
        self, images: Tensor, auxiliary: bool = True, prompts: Prompts | None = None
    ) -> dict[str, Any]:
        masks = self.head(F.avg_pool2d(images, 4))  # in training mode the dropout would spoil the masks
        found = {"pred_logits": self.classes.expand(len(images), 3, 4), "pred_masks": 10 * (masks - 0.5)}
        if prompts:
            places = torch.arange(len(images))[:, None], prompts.labels
            found["prompted"] = {key: value[places] for key, value in found.items()}
        return found


def coloured_cfg(folder: Path, annotations: str = "set.json") -> CfgNode:
    """A configuration that evaluates on the set in ``folder``; pixels reach the network as 0..1."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("DATASETS.TEST_ANNOTATIONS", str(folder / annotations), "DATASETS.TEST_IMAGES", str(folder)),
            *("MODEL.PIXEL_MEAN", "[0.0, 0.0, 0.0]", "MODEL.PIXEL_STD", "[255.0, 255.0, 255.0]"),
            *("MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(len(CATEGORIES))),
            *("MODEL.SIM.SUPERVISION", "box"),
            *("INPUT.MIN_SIZE_TEST", "0", "INPUT.MAX_SIZE_TEST", "1333", "DATALOADER.NUM_WORKERS", "0"),
            *("TEST.DETECTIONS_PER_IMAGE", "3"),
        ]
    )
    return cfg


def write_coloured(folder: Path) -> dict[str, Any]:
    """Write five images and their JSON ``set.json``; returns its content. Image 4 has no object."""
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            for number, (height, width) in SIZES.items()
        ],
        "categories": [{"id": number, "name": name} for number, name in CATEGORIES.items()],
        "annotations": [],
    }
    for place, (number, (height, width)) in enumerate(SIZES.items()):
        pixels = np.zeros((height, width, 3), np.uint8)
        masks = {} if number == 4 else _masks(height, width, place)
        for channel, (category, mask) in enumerate(masks.items()):
            pixels[mask, channel] = 255
            content["annotations"].append(
                _annotation(len(content["annotations"]) + 1, number, category, mask)
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "set.json").write_text(json.dumps(content))
    return content


def _masks(height: int, width: int, place: int) -> dict[int, np.ndarray]:
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - 0.7 * height, x - 0.6 * width)
    star = (y < 24) & (np.abs(x - 30) < 3 + y / (2 + place))
    return {3: np.hypot(y - 25, x - 22) < 13 + place, 7: (distance < 24) & (distance > 12), 90: star}


def _annotation(number: int, image_id: int, category: int, mask: np.ndarray) -> dict[str, Any]:
    rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": mask_utils.toBbox(rle).tolist(),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }
