"""The names of the classes that a configuration's data set has."""

from pathlib import Path

from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import data_sources
from sim_m2f.data.coco import load_json
from sim_m2f.errors import UserError, is_line
from sim_m2f.files import read_json

NO_CLASS = ("__background__", "N/A")  # entries of torchvision's list that are no class of COCO


def class_names(cfg: CfgNode) -> list[str]:
    """The names in the order of the labels, from the annotations of the first test set.

    Where these cannot be read, the names of COCO for COCO, else "class 0", "class 1" and so on.
    """
    number = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    try:
        source = data_sources(cfg, "TEST")[0]
        categories = load_json(source.annotations, source.limits)["categories"]
        names = [item["name"] for item in sorted(categories, key=lambda item: item["id"])]
    except (UserError, KeyError, TypeError):
        names = coco_names() if all(name.startswith("coco_") for name in cfg.DATASETS.TEST) else []
    return names if len(names) == number else [f"class {label}" for label in range(number)]


def coco_names() -> list[str]:
    """The 80 classes of COCO in the order of their ids."""
    return [name for name in FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"] if name not in NO_CLASS]


def read_class_names(path: Path) -> list[str]:
    """The names in a file {"class_names": [...]}.

    Raises:
        UserError: it is not such a file.
    """
    names = read_json(path).get("class_names")
    if not isinstance(names, list) or not all(map(is_line, names)):
        raise UserError(f"{path}: class_names is not a list of texts of one line; correct it")
    return names
