"""A labelled set of pure colours and a network that sees them, for the tests of the page."""

import json
from pathlib import Path

from coloured_coco import CATEGORIES, ColourNetwork, coloured_cfg, write_coloured

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.labelling.quality import Quality
from sim_m2f.labelling.run import Labeller
from sim_m2f.segmenter import Segmenter
from sim_m2f.serving.review import Review

CROWD = {"id": 90, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1, "area": 9}


def write_labelled(folder: Path) -> dict:
    """Images and masks.json; annotation 4 has the lowest score, then 5 and so on to 12, then 1, 2, 3."""
    content = write_coloured(folder)
    for annotation in content["annotations"]:
        annotation["score"] = (annotation["id"] + 8) % 12 / 12
    content["annotations"].append(CROWD)
    (folder / "masks.json").write_text(json.dumps(content))
    return content


def colour_segmenter(folder: Path) -> Segmenter:
    cfg = coloured_cfg(folder)
    cfg.MODEL.SIM.PROMPTS.ENABLED = True
    return Segmenter(ColourNetwork(), cfg, list(CATEGORIES.values()))


def open_set(folder: Path) -> Review:
    labeller = Labeller(colour_segmenter(folder), Quality(colors=False), False, keep_overlaps=True)
    return Review(labeller, DatasetSource("masks", folder / "masks.json", folder))
