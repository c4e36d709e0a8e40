"""Where the data sets are: the names that DATASETS.TRAIN and DATASETS.TEST may hold, or any two paths.

The names are in ``catalog.yaml`` beside this file; those of COCO, and its folders, are detectron2's.
"""

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sim_m2f.config import CfgNode
from sim_m2f.config.defaults import read_yaml
from sim_m2f.data.image import LIMITS
from sim_m2f.data.shapes import cached_shapes
from sim_m2f.errors import UserError
from sim_m2f.files import expanded


@dataclass(frozen=True)
class DatasetSource:
    """A data set: its name, its COCO JSON, the folder of the JSON's file names, and INPUT.LIMITS."""

    name: str
    annotations: Path
    image_root: Path
    limits: CfgNode = field(default_factory=lambda: LIMITS)


KNOWN = read_yaml(Path(__file__).with_suffix(".yaml"))


def find_source(name: str, limits: CfgNode = LIMITS) -> DatasetSource:
    """The data set of a name; the shapes set is written into its cache folder if it is not there yet.

    COCO lies in ``$DETECTRON2_DATASETS/coco`` (default ``datasets/coco``), or in ``$DETECTRON2_DATASETS``
    when that has the annotations itself; nuclei, people, pennfudan and coco_more in their own folders there.
    Whether the files are there is seen when they are read.

    Raises:
        UserError: the name is unknown.
    """
    if name not in KNOWN:
        nearest = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
        raise UserError(f"data set {name!r} is unknown; did you mean {nearest}?")
    kind, annotations, images = KNOWN[name]
    root = expanded(os.environ.get("DETECTRON2_DATASETS") or "datasets")
    if kind == "shapes":
        folder = cached_shapes()
    elif kind == "coco" and (root / "annotations").is_dir() and not (root / "coco").is_dir():
        folder = root
    else:
        folder = root / kind
    return DatasetSource(name, folder / "annotations" / f"{annotations}.json", folder / images, limits)


def data_sources(cfg: CfgNode, split: Literal["TRAIN", "TEST"]) -> list[DatasetSource]:
    """What to train or evaluate on: DATASETS.TRAIN_ANNOTATIONS and TRAIN_IMAGES if set, else the names in
    DATASETS.TRAIN; or the same with TEST.

    Raises:
        UserError: one of the two paths is missing, a name is unknown, or nothing is named.
    """
    annotations, images = cfg.DATASETS[f"{split}_ANNOTATIONS"], cfg.DATASETS[f"{split}_IMAGES"]
    if annotations and images:
        file = expanded(annotations)
        return [DatasetSource(file.stem, file, expanded(images), cfg.INPUT.LIMITS)]
    key = f"DATASETS.{split}"
    if annotations or images:
        missing = f"{key}_IMAGES" if annotations else f"{key}_ANNOTATIONS"
        raise UserError(f"{missing} is not set; a data set of your own needs both its JSON and its images")
    if not cfg.DATASETS[split]:
        raise UserError(f"{key} names no data set; name one, or give {key}_ANNOTATIONS and _IMAGES")
    return [find_source(name, cfg.INPUT.LIMITS) for name in cfg.DATASETS[split]]
