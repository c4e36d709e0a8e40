"""Where the data sets are: the names that DATASETS.TRAIN and DATASETS.TEST may hold, or any two paths.

The names and folders of COCO are those of detectron2.
"""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from sim_m2f.config import CfgNode
from sim_m2f.data.shapes import cached_shapes
from sim_m2f.errors import UserError


@dataclass(frozen=True)
class DatasetSource:
    """A data set: its name, its COCO JSON and the folder that the JSON's file names are relative to."""

    name: str
    annotations: Path
    image_root: Path


COCO = {
    "coco_2017_train": ("instances_train2017.json", "train2017"),
    "coco_2017_val": ("instances_val2017.json", "val2017"),
    "coco_2017_test-dev": ("image_info_test-dev2017.json", "test2017"),
}
NUCLEI = {"nuclei_train": "train", "nuclei_val": "val"}
SHAPES = {"shapes_train": "train", "shapes_val": "val"}


def find_source(name: str) -> DatasetSource:
    """The data set of a name; the shapes set is written into its cache folder if it is not there yet.

    COCO lies in ``$DETECTRON2_DATASETS/coco`` (default ``datasets/coco``), or in ``$DETECTRON2_DATASETS``
    when that has the annotations itself; nuclei in ``$DETECTRON2_DATASETS/nuclei``. Whether the files are
    there is seen when they are read.

    Raises:
        UserError: the name is unknown.
    """
    if name in SHAPES:
        folder = cached_shapes()
        return DatasetSource(name, folder / "annotations" / f"{SHAPES[name]}.json", folder / SHAPES[name])
    root = Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()
    if name in NUCLEI:
        folder, split = root / "nuclei", NUCLEI[name]
        return DatasetSource(name, folder / "annotations" / f"{split}.json", folder / split)
    if name in COCO:
        folder = root if (root / "annotations").is_dir() and not (root / "coco").is_dir() else root / "coco"
        annotations, images = COCO[name]
        return DatasetSource(name, folder / "annotations" / annotations, folder / images)
    nearest = difflib.get_close_matches(name, [*COCO, *NUCLEI, *SHAPES], n=1, cutoff=0.0)[0]
    raise UserError(f"data set {name!r} is unknown; did you mean {nearest}?")


def train_sources(cfg: CfgNode) -> list[DatasetSource]:
    """What to train on: DATASETS.TRAIN_ANNOTATIONS and TRAIN_IMAGES if set, else the names in DATASETS.TRAIN.

    Raises:
        UserError: one of the two paths is missing, a name is unknown, or nothing is named.
    """
    return _sources(cfg, "TRAIN")


def eval_sources(cfg: CfgNode) -> list[DatasetSource]:
    """What to evaluate on, as ``train_sources`` with TEST for TRAIN."""
    return _sources(cfg, "TEST")


def _sources(cfg: CfgNode, split: str) -> list[DatasetSource]:
    annotations, images = cfg.DATASETS[f"{split}_ANNOTATIONS"], cfg.DATASETS[f"{split}_IMAGES"]
    if annotations and images:
        annotations = Path(annotations).expanduser()
        return [DatasetSource(annotations.stem, annotations, Path(images).expanduser())]
    if annotations or images:
        missing = f"DATASETS.{split}_" + ("IMAGES" if annotations else "ANNOTATIONS")
        raise UserError(
            f"{missing} is not set; a data set of your own needs its JSON and its folder of images"
        )
    if not cfg.DATASETS[split]:
        raise UserError(
            f"DATASETS.{split} names no data set; name one, or give DATASETS.{split}_ANNOTATIONS and _IMAGES"
        )
    return [find_source(name) for name in cfg.DATASETS[split]]
