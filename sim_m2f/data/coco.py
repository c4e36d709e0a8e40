"""Reading COCO JSON: every record checked, every problem told by file and id, before anything is computed.

The format is that of cocodataset.org/#format-data. Boxes are needed; ``segmentation`` fields are looked at
for mask supervision only.
"""

import contextlib
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.catalog import DatasetSource
from sim_m2f.data.image import LIMITS, check_header, links_outside, names_outside, read_image
from sim_m2f.data.segmentation import decode_segmentation, segmentation_problem
from sim_m2f.errors import UserError, is_line
from sim_m2f.files import read_json, refuse_special

WHERE_FROM = "check DATASETS.* and $DETECTRON2_DATASETS"
MAX_LINES = 20  # problems that one error tells one by one
DECODED = 300  # images of a set that are decoded to check it; of a larger one, headers are read
OUTSIDE = "is not in the folder of images; set INPUT.LIMITS.OUTSIDE True"
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
    segmentations: list[Any] | None  # as in the JSON, None where there is none; None: not read
    proposals: list[tuple[Any, float] | None] | None = None  # masks from elsewhere with a confidence, if any


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
    limits: CfgNode  # INPUT.LIMITS

    def read_image(self, image: ImageRecord) -> np.ndarray:
        """The pixels of one of its images; see ``image.read_image``."""
        return read_image(self.image_root / image.file_name, image.height, image.width, self.limits)


def check_images(data: CocoData) -> None:
    """Decode the images of a set of at most ``DECODED``; of a larger one, read their headers.

    Raises:
        UserError: one line for each that cannot be decoded or has another size, 20 lines at the most.
    """
    decode = len(data.images) <= DECODED

    def problem(image: ImageRecord) -> str | None:
        try:
            if decode:
                data.read_image(image)
            else:
                check_header(data.image_root / image.file_name, image.height, image.width, data.limits)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        refuse(list(filter(None, pool.map(problem, data.images))))


def refuse(problems: list[str]) -> None:
    """Raises UserError where there are problems: one line each, 20 at most."""
    if problems:
        more = [f"... and {len(problems) - MAX_LINES} more"] if len(problems) > MAX_LINES else []
        raise UserError("\n".join(problems[:MAX_LINES] + more))


def read_coco(
    source: DatasetSource,
    read_masks: bool,
    some_masks: bool = False,
    content: dict[str, Any] | None = None,
) -> CocoData:
    """Read and check a data set.

    Args:
        source: where it is.
        read_masks: keep the segmentations and check them; if False they are never looked at.
        some_masks: annotations may lack them.
        content: its JSON, where the annotations are in another format.

    Raises:
        UserError: one line for each problem of the JSON or missing image, 20 lines at the most.
    """
    data, problems = inspect_coco(source, read_masks, some_masks, content)
    refuse(problems)
    return data


def inspect_coco(
    source: DatasetSource,
    read_masks: bool,
    some_masks: bool = False,
    content: dict[str, Any] | None = None,
) -> tuple[CocoData, list[str]]:
    """Like ``read_coco``, but all problems are returned, beside what could be read.

    Raises:
        UserError: the file is not a COCO JSON at all.
    """
    reader = _Reader(source, content or load_json(source.annotations, source.limits), read_masks, some_masks)
    names = reader.class_names()
    images = {item["id"]: item for item in reader.records("images")}
    reader.report_images(images.values())
    category_ids = sorted(names)
    data = CocoData(
        name=source.name,
        annotations_file=source.annotations,
        image_root=source.image_root,
        images=reader.image_records(images, category_ids),
        category_ids=category_ids,
        class_names=[names[category] for category in category_ids],
        has_annotations="annotations" in reader.content,
        zero_area=reader.zero_area,
        limits=source.limits,
    )
    return data, reader.problems


def load_json(path: Path, limits: CfgNode = LIMITS) -> dict[str, Any]:
    """The content of a COCO JSON: an object with the lists "images", "categories" and perhaps "annotations".

    Raises:
        UserError: the file cannot be read, is larger than ``limits`` (INPUT.LIMITS) allow, is not JSON, or is
            not such an object.
    """
    refuse_special(path, limits.FILE_SIZE)
    if not path.exists():
        raise UserError(f"{path}: no such file; {WHERE_FROM}")
    content = read_json(path)
    for key in ("images", "categories", *(["annotations"] if "annotations" in content else [])):
        if not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list {key!r}; give the path of a COCO JSON")
        if not content[key] and key != "annotations":
            raise UserError(f"{path}: the list {key!r} is empty; a data set needs at least one of them")
    return content


Record = dict[str, Any]  # an object in one of the lists of the JSON
Check = tuple[str, Callable[[Any], bool]]  # what a value has to be, in words, and whether it is
WHOLE: Check = ("a whole number of 64 bits", lambda value: type(value) is int and abs(value) < 2**63)
SIZE: Check = ("a positive whole number", lambda value: type(value) is int and 0 < value < 2**31)
LINE: Check = ("a text of one line", lambda value: is_line(value) and value != "")
PRESENT: Check = ("", lambda value: True)
# For each list of the JSON: what one record is called and what its keys must hold.
RECORDS: dict[str, tuple[str, dict[str, Check]]] = {
    "categories": ("category", {"id": WHOLE, "name": LINE}),
    "images": ("image", {"id": WHOLE, "file_name": LINE, "height": SIZE, "width": SIZE}),
    "annotations": ("annotation", {"id": WHOLE, "image_id": WHOLE, "category_id": WHOLE, "bbox": PRESENT}),
}


class _Reader:
    """Goes through the lists of one JSON, gives what is right and collects what is wrong."""

    def __init__(
        self, source: DatasetSource, content: dict[str, Any], read_masks: bool, some_masks: bool
    ) -> None:
        self.source, self.read_masks, self.some_masks = source, read_masks, some_masks
        self.content = content
        self.problems: list[str] = []
        self.zero_area = 0

    def report(self, where: str, what: str) -> None:
        self.problems.append(f"{self.source.annotations}: {where}: {what}")

    def records(self, key: str) -> Iterator[Record]:
        """The well-formed records of a list, each id once."""
        kind, checks = RECORDS[key]
        seen: set[int] = set()
        for index, item in enumerate(self.content.get(key, [])):
            if not isinstance(item, dict):
                self.report(f"{key}[{index}]", f"is {reprlib.repr(item)}, not an object; remove it")
                continue
            where = f"{kind} id {item['id']}" if type(item.get("id")) is int else f"{key}[{index}]"
            before = len(self.problems)
            for name, (expected, check) in checks.items():
                if name not in item:
                    self.report(where, f"has no {name}; add it")
                elif not check(item[name]):
                    self.report(where, f"{name} is {reprlib.repr(item[name])}, not {expected}; correct it")
            if len(self.problems) > before:
                continue
            if item["id"] in seen:
                self.report(where, "is there more than once; give each its own id")
                continue
            seen.add(item["id"])
            yield item

    def class_names(self) -> dict[int, str]:
        """The name of each category id; no two are the same, since scores go by them."""
        names: dict[int, str] = {}
        for item in self.records("categories"):
            if item["name"] in names.values():
                self.report(f"category id {item['id']}", f"another one is named {item['name']!r}; rename it")
            names[item["id"]] = item["name"]
        return names

    def report_images(self, images: Iterable[Record]) -> None:
        """What is missing, too large or outside of the folder.

        Each folder is listed once: asking for 118,000 files one by one takes minutes on a network disk.
        """
        root, limits = self.source.image_root, self.source.limits
        if not root.is_dir():
            self.problems.append(f"{root}: no such folder of images; {WHERE_FROM}")
            return
        listed: dict[Path, dict[str, str]] = {}
        for image in images:
            path, where = root / image["file_name"], f"image id {image['id']}"
            if problem := limit_problem(image["file_name"], image["height"], image["width"], root, limits):
                self.report(where, problem)
                continue
            if path.parent not in listed:
                listed[path.parent] = self.faulty_entries(path.parent)
            if fault := listed[path.parent].get(path.name, "is missing; add it or remove the record"):
                self.report(where, f"{path} {fault}")

    def faulty_entries(self, folder: Path) -> dict[str, str]:
        """The name of each entry of a folder, and why it is no image that may be read, if it is none."""
        root, allowed = self.source.image_root, self.source.limits.OUTSIDE
        outside = not allowed and links_outside(root, folder)
        faults = {}
        with contextlib.suppress(OSError, ValueError), os.scandir(folder) as entries:
            for entry in entries:
                faults[entry.name] = ""
                if _is_folder(entry):
                    faults[entry.name] = "is a folder, not an image; replace it"
                elif outside or (not allowed and entry.is_symlink() and links_outside(root, entry.path)):
                    faults[entry.name] = OUTSIDE
        return faults

    def segmentations(self, items: Iterable[Record]) -> list[Any] | None:
        return [item.get("segmentation") or None for item in items] if self.read_masks else None

    def image_records(self, images: dict[int, Record], category_ids: list[int]) -> list[ImageRecord]:
        """The images with their targets, in the order of the JSON."""
        labels = {category: label for label, category in enumerate(category_ids)}
        targets: dict[int, list[tuple[Record, list[float]]]] = {number: [] for number in images}
        for item in self.records("annotations"):
            box = self.target_box(item, images.get(item["image_id"]), labels)
            if box is not None:
                targets[item["image_id"]].append((item, box))
        return [
            ImageRecord(
                **{key: image[key] for key in RECORDS["images"][1]},
                boxes=np.array([box for _, box in own], np.float64).reshape(-1, 4),
                labels=np.array([labels[item["category_id"]] for item, _ in own], np.int64),
                annotation_ids=[item["id"] for item, _ in own],
                segmentations=self.segmentations(item for item, _ in own),
            )
            for image, own in zip(images.values(), targets.values(), strict=True)
        ]

    def target_box(self, item: Record, image: Record | None, labels: dict[int, int]) -> list[float] | None:
        """The box xyxy of an annotation, in its image; None where it is no target. Faults are reported."""
        crowd, faults, box = item.get("iscrowd", 0), [], None
        if item["category_id"] not in labels:
            faults.append(f"category_id {item['category_id']} is not in categories; correct it")
        if crowd not in (0, 1):
            faults.append(f"iscrowd is {reprlib.repr(crowd)}, not 0 or 1; correct it")
        if image is None:
            faults.append(f"image_id {item['image_id']} is not in images; correct it")
        elif fault := box_problem(item["bbox"], image["height"], image["width"]):
            faults.append(f"bbox {reprlib.repr(item['bbox'])} {fault}")
        elif not faults and not crowd:
            box = clipped_xyxy(item["bbox"], image["height"], image["width"])
            if box[0] == box[2] or box[1] == box[3]:
                self.zero_area += 1
                return None
            shape, size = item.get("segmentation"), (image["height"], image["width"])
            wanted = self.read_masks and (shape or not self.some_masks)
            if wanted and (fault := segmentation_problem(shape, *size)):
                faults.append(f"segmentation {fault}")
        for fault in faults:
            self.report(f"annotation id {item['id']}", fault)
        return None if faults else box


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Without asking the disk again, links aside, which may lead in a circle."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def limit_problem(file_name: str, height: int, width: int, root: Path, limits: CfgNode) -> str | None:
    """Why an image in ``root`` must not be read, if its record says so; ``limits`` are INPUT.LIMITS."""
    if width * height > limits.PIXELS:
        most = f"more than INPUT.LIMITS.PIXELS ({limits.PIXELS:,})"
        return f"has {width} x {height} pixels, {most}; raise it, or make the image smaller"
    if not limits.OUTSIDE and names_outside(root, file_name):
        return f"{root / file_name} {OUTSIDE}"
    return None


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


def xyxy(bbox: list[float]) -> list[float]:
    """A COCO box as [x1, y1, x2, y2]."""
    x, y, w, h = bbox
    return [x, y, x + w, y + h]


def clipped_xyxy(bbox: list[float], height: int, width: int) -> list[float]:
    """A COCO box as [x1, y1, x2, y2], clipped to its image."""
    corners = zip(xyxy(bbox), (width, height) * 2, strict=True)
    return [min(max(position, 0.0), length) for position, length in corners]


def check_categories(data: Sequence[CocoData]) -> None:
    """Raises UserError unless all data sets have the same categories."""
    first = data[0]
    for other in data[1:]:
        if (other.category_ids, other.class_names) != (first.category_ids, first.class_names):
            files = f"{other.annotations_file}: its categories differ from those of {first.annotations_file}"
            raise UserError(f"{files}{_difference(first, other)}; give them the same ids and names")


def _difference(first: CocoData, other: CocoData) -> str:
    """The first category that is not the same, where numbers are."""
    pairs = [zip(data.category_ids, data.class_names, strict=True) for data in (other, first)]
    for theirs, ours in zip(*pairs, strict=False):
        if theirs != ours:
            return f": id {theirs[0]} {theirs[1]!r}, not id {ours[0]} {ours[1]!r}"
    return ""


def read_mask(data: CocoData, record: ImageRecord, index: int) -> np.ndarray:
    """The mask (H, W) uint8 of one object of an image whose masks were read; empty where it has none.

    Raises:
        UserError: the segmentation cannot be decoded.
    """
    assert record.segmentations is not None
    return decoded(data, record, index, record.segmentations[index])


def decoded(data: CocoData, record: ImageRecord, index: int, segmentation: Any) -> np.ndarray:
    """The mask (H, W) uint8 that a segmentation gives an object of an image; empty for None.

    Raises:
        UserError: the segmentation cannot be decoded.
    """
    if segmentation is None:
        return np.zeros((record.height, record.width), np.uint8)
    try:
        return decode_segmentation(segmentation, record.height, record.width)
    except ValueError as error:
        where = f"{data.annotations_file}: annotation id {record.annotation_ids[index]}"
        raise UserError(f"{where}: segmentation cannot be decoded ({error}); correct it") from error
