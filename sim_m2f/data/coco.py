"""Reading COCO JSON: every record checked, every problem told by file and id, before anything is computed.

The format is that of cocodataset.org/#format-data. Boxes are needed; ``segmentation`` fields are looked at
for mask supervision only.
"""

import json
import os
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.segmentation import segmentation_problem
from sim_m2f.errors import UserError

MAX_LINES = 20  # problems that one error tells one by one
TOLERANCE = 1.0  # a box may reach this many pixels beyond its image; it is clipped


@dataclass(frozen=True)
class ImageRecord:
    """One image and the N objects on it that are targets (no crowd regions, no boxes of zero area)."""

    id: int
    file_name: str
    height: int
    width: int
    boxes: np.ndarray  # (N, 4) float64 xyxy, pixels of the image, within it
    labels: np.ndarray  # (N,) int64, 0..C-1
    annotation_ids: list[int]
    segmentations: list[Any] | None  # as in the JSON; None: not read


@dataclass(frozen=True)
class CocoData:
    """A data set as read from its JSON. Classes are numbered 0..C-1 in the order of the category ids."""

    name: str
    annotations_file: Path
    image_root: Path
    images: list[ImageRecord]
    category_ids: list[int]  # (C,) the JSON's category id of each class
    class_names: list[str]
    has_annotations: bool  # False for a JSON without the key, such as COCO's test-dev
    zero_area: int  # boxes of zero area that were left out


def read_coco(source: DatasetSource, read_masks: bool) -> CocoData:
    """Read and check a data set.

    Args:
        source: where it is.
        read_masks: keep the segmentations and check them; if False they are never looked at.

    Raises:
        UserError: one line for each problem of the JSON or missing image, 20 lines at the most.
    """
    data, problems = inspect_coco(source, read_masks)
    if problems:
        more = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        raise UserError("\n".join(problems[:MAX_LINES] + more))
    return data


def inspect_coco(source: DatasetSource, read_masks: bool) -> tuple[CocoData, list[str]]:
    """Like ``read_coco``, but all problems are returned, beside what could be read.

    Raises:
        UserError: the file is not a COCO JSON at all.
    """
    content = load_json(source.annotations)
    reader = _Reader(source, read_masks)
    categories = {item["id"]: item["name"] for item in reader.records(content, "categories")}
    images = {item["id"]: item for item in reader.records(content, "images")}
    reader.report_missing_images(images)
    objects = reader.objects(content, images, sorted(categories))
    data = CocoData(
        name=source.name,
        annotations_file=source.annotations,
        image_root=source.image_root,
        images=[_record(item, objects[item["id"]], read_masks) for item in images.values()],
        category_ids=sorted(categories),
        class_names=[categories[category] for category in sorted(categories)],
        has_annotations="annotations" in content,
        zero_area=reader.zero_area,
    )
    return data, reader.problems


def load_json(path: Path) -> dict[str, Any]:
    """The content of a COCO JSON: an object with the lists "images", "categories" and perhaps "annotations".

    Raises:
        UserError: the file cannot be read, is not JSON, or is not such an object.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; check DATASETS.* and $DETECTRON2_DATASETS") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a COCO JSON") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); is the file complete?") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: a {type(content).__name__}, not a COCO data set (an object); give the path of one"
        )
    for key in ("images", "categories", *(["annotations"] if "annotations" in content else [])):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list {key!r}; give the path of a COCO JSON")
    for key in ("images", "categories"):
        if not content[key]:
            raise UserError(f"{path}: the list {key!r} is empty; a data set needs at least one of them")
    return content


class _Object(NamedTuple):
    annotation_id: int
    box: list[float]
    label: int
    segmentation: Any


def _record(image: dict[str, Any], objects: list[_Object], read_masks: bool) -> ImageRecord:
    return ImageRecord(
        id=image["id"],
        file_name=image["file_name"],
        height=image["height"],
        width=image["width"],
        boxes=np.array([item.box for item in objects], dtype=np.float64).reshape(-1, 4),
        labels=np.array([item.label for item in objects], dtype=np.int64),
        annotation_ids=[item.annotation_id for item in objects],
        segmentations=[item.segmentation for item in objects] if read_masks else None,
    )


def _is_id(value: Any) -> bool:
    return type(value) is int


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_present(value: Any) -> bool:
    return True


# For each list of the JSON: what one record is called and what its keys must hold.
RECORDS: dict[str, tuple[str, dict[str, Callable[[Any], bool]]]] = {
    "categories": ("category", {"id": _is_id, "name": _is_text}),
    "images": ("image", {"id": _is_id, "file_name": _is_text, "height": _is_size, "width": _is_size}),
    "annotations": (
        "annotation",
        {"id": _is_id, "image_id": _is_id, "category_id": _is_id, "bbox": _is_present},
    ),
}
EXPECTED: dict[Callable[[Any], bool], str] = {
    _is_id: "a whole number",
    _is_size: "a positive whole number",
    _is_text: "a text",
}


class _Reader:
    """Goes through the lists of one JSON, yields what is right and collects what is wrong."""

    def __init__(self, source: DatasetSource, read_masks: bool) -> None:
        self.source = source
        self.read_masks = read_masks
        self.problems: list[str] = []
        self.zero_area = 0

    def report(self, where: str, what: str) -> None:
        self.problems.append(f"{self.source.annotations}: {where}: {what}")

    def records(self, content: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
        """The well-formed records of a list, each id once."""
        kind, checks = RECORDS[key]
        seen: set[int] = set()
        for index, item in enumerate(content.get(key, [])):
            if not isinstance(item, dict):
                self.report(f"{key}[{index}]", f"is {reprlib.repr(item)}, not an object; remove it")
                continue
            where = f"{kind} id {item['id']}" if _is_id(item.get("id")) else f"{key}[{index}]"
            faults = [name for name, check in checks.items() if name not in item or not check(item[name])]
            for name in faults:
                if name not in item:
                    self.report(where, f"has no {name}; add it")
                else:
                    expected = EXPECTED[checks[name]]
                    self.report(where, f"{name} is {reprlib.repr(item[name])}, not {expected}; correct it")
            if faults:
                continue
            if item["id"] in seen:
                self.report(where, "is there more than once; give each its own id")
                continue
            seen.add(item["id"])
            yield item

    def report_missing_images(self, images: dict[int, dict[str, Any]]) -> None:
        """Each folder is listed once: asking for 118,000 files one by one takes minutes on a network disk."""
        root = self.source.image_root
        if not root.is_dir():
            where = "check DATASETS.* and $DETECTRON2_DATASETS"
            self.problems.append(f"{root}: no such folder of images; {where}")
            return
        listed: dict[Path, dict[str, bool]] = {}
        for image in images.values():
            path = root / image["file_name"]
            if path.parent not in listed:
                listed[path.parent] = _list_folder(path.parent)
            is_folder = listed[path.parent].get(path.name)
            if is_folder is None:
                self.report(f"image id {image['id']}", f"{path} is missing; add it or remove the record")
            elif is_folder:
                self.report(f"image id {image['id']}", f"{path} is a folder, not an image; replace it")

    def objects(
        self, content: dict[str, Any], images: dict[int, dict[str, Any]], category_ids: list[int]
    ) -> dict[int, list[_Object]]:
        """The targets of each image, by image id."""
        labels = {category: label for label, category in enumerate(category_ids)}
        objects: dict[int, list[_Object]] = {image: [] for image in images}
        for item in self.records(content, "annotations"):
            where = f"annotation id {item['id']}"
            image = images.get(item["image_id"])
            if item["category_id"] not in labels:
                self.report(where, f"category_id {item['category_id']} is not in categories; correct it")
            if item.get("iscrowd", 0) not in (0, 1):
                self.report(where, f"iscrowd is {reprlib.repr(item['iscrowd'])}, not 0 or 1; correct it")
            if image is None:
                self.report(where, f"image_id {item['image_id']} is not in images; correct it")
                continue
            what = box_problem(item["bbox"], image["height"], image["width"])
            if what:
                self.report(where, f"bbox {reprlib.repr(item['bbox'])} {what}")
                continue
            if item.get("iscrowd", 0) or item["category_id"] not in labels:
                continue
            box = clipped_xyxy(item["bbox"], image["height"], image["width"])
            if box[0] == box[2] or box[1] == box[3]:
                self.zero_area += 1
                continue
            segmentation = item.get("segmentation") if self.read_masks else None
            if self.read_masks:
                what = segmentation_problem(segmentation, image["height"], image["width"])
                if what:
                    self.report(where, f"segmentation {what}")
                    continue
            objects[image["id"]].append(_Object(item["id"], box, labels[item["category_id"]], segmentation))
        return objects


def _list_folder(folder: Path) -> dict[str, bool]:
    """Name of each entry -> whether it is a folder; empty when there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name: entry.is_dir() for entry in entries}
    except OSError:
        return {}


def box_problem(bbox: Any, height: int, width: int) -> str | None:
    """What is wrong with a COCO box [x, y, width, height] on an image of this size, if anything."""
    if not isinstance(bbox, list) or len(bbox) != 4 or any(type(value) not in (int, float) for value in bbox):
        return "is not four numbers; write [x, y, width, height]"
    if not all(abs(value) < 1e9 for value in bbox):
        return "is not finite or far too large; correct it"
    x, y, w, h = bbox
    if w < 0 or h < 0:
        return "has a negative size; write [x, y, width, height]"
    if x < -TOLERANCE or y < -TOLERANCE or x + w > width + TOLERANCE or y + h > height + TOLERANCE:
        return f"reaches out of its image, {width} x {height}; correct it"
    return None


def clipped_xyxy(bbox: list[float], height: int, width: int) -> list[float]:
    """A COCO box as [x1, y1, x2, y2], clipped to its image."""
    x, y, w, h = bbox
    return [
        min(max(x, 0.0), width),
        min(max(y, 0.0), height),
        min(max(x + w, 0.0), width),
        min(max(y + h, 0.0), height),
    ]
