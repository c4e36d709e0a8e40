"""What the formats share: data sets as COCO's records, names of files, streamed JSON."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np

from sim_m2f.data.polygons import joined, mask_polygons
from sim_m2f.data.segmentation import decode_segmentation, encode_masks
from sim_m2f.errors import UserError

Record = dict[str, Any]  # an object of COCO's JSON
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
        UserError: the segmentation cannot be decoded.
    """
    if not annotation.get("segmentation"):
        return None
    try:
        return decode_segmentation(annotation["segmentation"], image["height"], image["width"]).astype(bool)
    except ValueError as error:
        fault = f"segmentation cannot be decoded ({error}); correct it"
        raise UserError(f"annotation id {annotation['id']}: {fault}") from error


def polygons_of(image: Record, annotation: Record) -> list[np.ndarray]:
    """A polygon (n, 2) per part of the mask; none for an annotation that has a box alone."""
    mask = mask_of(image, annotation)
    return [] if mask is None else mask_polygons(mask)


def polygon_of(image: Record, annotation: Record) -> np.ndarray | None:
    """All parts of the mask as one polygon (n, 2)."""
    polygons = polygons_of(image, annotation)
    return joined(polygons) if polygons else None


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
    """A data set that a reader puts together, with ids from 1 on."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.category_ids = {name: number for number, name in enumerate(names, start=1)}
        self.images: list[Record] = []
        self.annotations: list[Record] = []

    def add_image(self, file_name: str, width: int, height: int) -> None:
        """What is added next lies on this image, of this size in pixels."""
        size = {"width": width, "height": height}
        self.images.append({"id": len(self.images) + 1, "file_name": file_name, **size})

    def add_box(self, name: str, corners: Iterable[float]) -> None:
        """An object of the last image: the name of its class and its box xyxy in pixels."""
        x0, y0, x1, y1 = (float(value) for value in corners)
        x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": self.images[-1]["id"],
                "category_id": self.category_ids.setdefault(name, len(self.category_ids) + 1),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
            }
        )

    def add_polygons(self, name: str, polygons: Iterable[Iterable[Iterable[float]]]) -> None:
        """An object of the last image by its outlines (n, 2), in pixels: its box and its segmentation."""
        rings = [np.array([[float(v) for v in point] for point in ring]).reshape(-1, 2) for ring in polygons]
        corners = np.concatenate(rings)
        self.add_box(name, (*corners.min(0), *corners.max(0)))
        if all(len(ring) >= 3 for ring in rings):
            self.annotations[-1]["segmentation"] = [ring.ravel().tolist() for ring in rings]

    def add_mask(self, name: str, left: int, top: int, part: np.ndarray) -> None:
        """An object of the last image by its mask (h, w) bool at a place in pixels."""
        image = self.images[-1]
        mask = np.zeros((image["height"], image["width"]), bool)
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
        self.add_box(name, (left, top, left + part.shape[1], top + part.shape[0]))
        self.annotations[-1]["segmentation"] = encode_masks(mask[None])[0]

    def content(self, path: Path) -> Record:
        """The COCO JSON.

        Raises:
            UserError: there is no object; names the path.
        """
        if not self.images or not self.annotations:
            raise UserError(f"{path}: holds no object in this format; check --from and the path")
        categories = [{"id": number, "name": name} for name, number in self.category_ids.items()]
        return {"images": self.images, "annotations": self.annotations, "categories": categories}
