"""What the formats share: data sets as COCO's records, names of files, streamed JSON."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.coco import box_problem, clipped_xyxy
from sim_m2f.data.formats.boxes import Corners, around_rectangle
from sim_m2f.data.image import image_files, image_size, is_outside, names_outside
from sim_m2f.data.polygons import around_mask
from sim_m2f.data.segmentation import decode_segmentation, encode_masks, segmentation_problem
from sim_m2f.errors import UserError

Record = dict[str, Any]  # an object of COCO's JSON
BOX = "annotated_box"  # xyxy in pixels, where a format keeps values that it does not know
SLACK = 0.01  # pixels: boxes closer than that are the same
Labelled = tuple[Record, list[Record]]  # an image and its annotations


def images_of(content: Mapping[str, Any]) -> Iterator[Labelled]:
    """Every image of a COCO JSON with its annotations, in the order of the file."""
    own: dict[int, list[Record]] = {image["id"]: [] for image in content["images"]}
    for annotation in content.get("annotations", []):
        own[annotation["image_id"]].append(annotation)
    for image in content["images"]:
        yield image, own[image["id"]]


def objects(annotations: Iterable[Record]) -> list[Record]:
    """Those of single objects; other formats know no crowd regions."""
    return [annotation for annotation in annotations if not annotation.get("iscrowd")]


def mask_of(image: Record, annotation: Record) -> np.ndarray | None:
    """(H, W) bool; None for an annotation that has a box alone.

    Raises:
        UserError: its segmentation has a fault.
    """
    shape, size = annotation.get("segmentation"), (image["height"], image["width"])
    if not shape:
        return None
    try:
        if problem := segmentation_problem(shape, *size):
            raise ValueError(problem)
        return decode_segmentation(shape, *size).astype(bool)
    except ValueError as error:
        raise UserError(f"annotation id {annotation['id']}: segmentation: {error}") from error


def box_of(image: Record, annotation: Record) -> list[float]:
    """The box xyxy as far as it lies in the image: other tools take no other."""
    return clipped_xyxy(annotation["bbox"], image["height"], image["width"])


def own_box(mask: np.ndarray | None, box: list[float]) -> list[float] | None:
    """The box of an annotation, xyxy, where it is not the one around its mask (H, W); None where it is.

    No format but COCO's has both. Those that pass over what they do not know get it as a value of the mask
    named ``BOX``: as a shape beside the mask, other tools would count it as an object, or fill it.
    """
    if mask is None or not mask.any():
        return None
    return None if np.allclose(box, around_mask(mask), rtol=0, atol=SLACK) else box


def with_categories(content: Record, categories: list[Record], path: Path) -> Record:
    """A COCO JSON with the category ids of another one, by name.

    Raises:
        UserError: the other one has no class of a name; names the path.
    """
    ids = {category["name"]: category["id"] for category in categories}
    unknown = [category["name"] for category in content["categories"] if category["name"] not in ids]
    if unknown:
        fault = f"its class {unknown[0]!r} is none of the training set ({', '.join(list(ids)[:10])})"
        raise UserError(f"{path}: {fault}; rename it or leave it out")
    new = {category["id"]: ids[category["name"]] for category in content["categories"]}
    annotations = [
        each | {"category_id": new[each["category_id"]]} for each in content.get("annotations", [])
    ]
    return {**content, "categories": categories, "annotations": annotations}


def file_for(folder: Path, image: Record, suffix: str) -> Path:
    """Where an image's own file goes: below the folder, wherever the image lies, under the image's name."""
    parts = [part for part in PurePosixPath(image["file_name"]).parts if part not in ("..", "/")]
    return folder.joinpath(*parts).with_suffix(suffix)


def write_list(file: IO[str], items: Iterable[Any]) -> None:
    """A JSON list, item by item, each on a line."""
    file.write("[")
    for number, item in enumerate(items):
        file.write((",\n" if number else "\n") + json.dumps(item))
    file.write("\n]")


class Collected:
    """A data set that a reader puts together, with ids from 1 on.

    Args:
        folder: of the images.
        limits: INPUT.LIMITS.
        names: of the classes, where they are known.
    """

    def __init__(self, folder: Path, limits: CfgNode, names: Iterable[str] = ()) -> None:
        self.folder, self.limits = folder, limits
        self.category_ids = {name: number for number, name in enumerate(names, start=1)}
        self.images: list[Record] = []
        self.added: set[str] = set()  # the images' names
        self.annotations: list[Record] = []
        self.left_out: Counter[str] = Counter()  # shapes that are not read, by their kind

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        """The images in the folder and below by their names, with and without the end."""
        found: dict[str, list[str]] = {}
        for file in image_files(self.folder, self.limits.OUTSIDE):
            for name in {file.name, file.stem}:
                found.setdefault(name, []).append(file.relative_to(self.folder).as_posix())
        return found

    def has(self, name: str) -> bool:
        """Whether the folder has a file of this name; with INPUT.LIMITS.OUTSIDE, or one beside it."""
        return self._allowed(name) and os.path.isfile(self.folder / name)

    def _allowed(self, name: str) -> bool:
        return self.limits.OUTSIDE or not names_outside(self.folder, name)

    def find(self, *names: str) -> str:
        """The first of the names that the folder has; else the only image below with the name of one of them,
        which may lack its end; else the last name as it is.

        Raises:
            ValueError: several images below have the name.
        """
        for name in filter(self.has, names):
            return name
        for name in filter(self._allowed, names):
            found = self._by_name.get(PurePosixPath(name).name, [])
            if len(found) > 1:
                raise ValueError(f"{name!r} may be {found[0]!r} or {found[1]!r}; write the path of the image")
            if found:
                return found[0]
        return names[-1]

    def add_image(self, file_name: str, size: tuple[int, int] | None = None) -> None:
        """What is added next lies on this image, of this width and height in pixels; by default its file's.

        Raises:
            ValueError: it lies outside of the folder, has too many pixels or none, or is there already.
            UserError: its file cannot be read.
        """
        if os.path.normpath(file_name) in self.added:
            raise ValueError(f"{file_name!r} has other annotations already; keep those of one file or record")
        self.added.add(os.path.normpath(file_name))
        if not self.limits.OUTSIDE and is_outside(self.folder, file_name):
            raise ValueError(f"{file_name!r} is not in the folder of images; set INPUT.LIMITS.OUTSIDE True")
        width, height = size or image_size(self.folder / file_name, self.limits)
        if not 0 < width * height <= self.limits.PIXELS:
            most = f"INPUT.LIMITS.PIXELS is {self.limits.PIXELS:,}"
            raise ValueError(f"{file_name!r} has {width} x {height} pixels; {most}")
        record = {"id": len(self.images) + 1, "file_name": file_name, "width": width, "height": height}
        self.images.append(record)

    def add_box(self, name: str, corners: Iterable[float]) -> None:
        """An object of the last image: the name of its class and its box xyxy in pixels.

        Raises:
            ValueError: the box is not finite or reaches out of its image.
        """
        x0, y0, x1, y1 = (float(value) for value in corners)
        if not np.isfinite((x0, y0, x1, y1)).all():
            raise ValueError(f"box of {name!r} is not finite")
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        image = self.images[-1]
        if problem := box_problem([x0, y0, x1 - x0, y1 - y0], image["height"], image["width"]):
            raise ValueError(f"box of {name!r} {problem.partition(';')[0]}")
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image["id"],
                "category_id": self.category_ids.setdefault(name, len(self.category_ids) + 1),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
        )

    def add_around(self, name: str, corners: Iterable[float]) -> None:
        """An object by the upright box around a shape, as far as it lies in the last image."""
        values = np.array([float(value) for value in corners])
        self.add_box(name, np.clip(values, 0, (self.images[-1]["width"], self.images[-1]["height"]) * 2))

    def add_turned(self, name: str, corners: Corners, degrees: float, pivot: tuple[float, float]) -> None:
        """An object by a rectangle xyxy; by the box around it where it is turned, clockwise about a point."""
        add = self.add_around if degrees else self.add_box
        add(name, around_rectangle(corners, degrees, pivot))

    def add_polygons(
        self, name: str, polygons: Iterable[Iterable[Iterable[float]]], box: Iterable[float] | None = None
    ) -> None:
        """An object of the last image by its outlines (n, 2) in pixels: its segmentation and its box, the one
        around them unless another one (xyxy) is given that holds them.
        """
        rings = [np.array([[float(v) for v in point] for point in ring]).reshape(-1, 2) for ring in polygons]
        points = np.concatenate(rings)
        self.add_box(name, _holding(box, (*points.min(0), *points.max(0))))
        if all(len(ring) >= 3 for ring in rings):
            self.annotations[-1]["segmentation"] = [ring.ravel().tolist() for ring in rings]

    def add_mask(
        self, name: str, left: int, top: int, part: np.ndarray, box: Iterable[float] | None = None
    ) -> None:
        """An object of the last image by its mask (h, w) bool at a place in pixels, and its box as above."""
        image, (height, width) = self.images[-1], part.shape
        mask = np.zeros((image["height"], image["width"]), bool)
        mask[top : top + height, left : left + width] = part
        self.add_box(name, _holding(box, (left, top, left + width, top + height)))
        self.annotations[-1]["segmentation"] = encode_masks(mask[None])[0]

    def content(self, path: Path) -> Record:
        """The COCO JSON. A note tells how many shapes of which kind were left out.

        Raises:
            UserError: there is no object; names the path.
        """
        for kind, count in self.left_out.items():
            fault = f"{count} shapes of the kind {kind!r} cannot be read as boxes, polygons or masks"
            print(f"note: {path}: {fault}, and were left out", file=sys.stderr)
        if not self.images or not self.annotations:
            raise UserError(f"{path}: holds no object in this format; check --from and the path")
        categories = [{"id": number, "name": name} for name, number in self.category_ids.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}


def _holding(box: Iterable[float] | None, shape: Corners) -> Corners:
    """The box that was annotated, unless the shape has left it by more than a pixel since; all xyxy."""
    if box is None:
        return shape
    x0, y0, x1, y1 = (float(value) for value in box)
    inside = min(shape[0] - x0, shape[1] - y0, x1 - shape[2], y1 - shape[3]) >= -1
    return (x0, y0, x1, y1) if inside else shape
