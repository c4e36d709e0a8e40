"""LabelMe: a JSON beside each image, with rectangles, polygons and masks (https://github.com/wkentaro/labelme)."""

import base64
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import (
    BOX,
    Collected,
    Labelled,
    Record,
    box_of,
    file_for,
    mask_of,
    objects,
    own_box,
)
from sim_m2f.data.polygons import around_mask, mask_polygons
from sim_m2f.errors import UserError, first_line
from sim_m2f.files import read_json, write_file

PARTS = "polygon", "mask"  # of which several make up an object


def read_labelme(path: Path, images: Path, limits: CfgNode) -> Record:
    """A folder of JSON files, or one: rectangles, polygons, masks, and circles and turned rectangles by the
    upright ones around them.

    Raises:
        UserError: a file is none of LabelMe's; names it.
    """
    data = Collected(images, limits)
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        content = read_json(file)
        try:
            name = _file_name(data, file, path, content["imagePath"].replace("\\", "/"))
            width, height = content.get("imageWidth"), content.get("imageHeight")
            data.add_image(name, None if None in (width, height) else (int(width), int(height)))
            for label, shapes in _objects(content["shapes"]):
                _add(data, label, shapes)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            fault = f"no LabelMe file ({type(error).__name__}: {error})"
            raise UserError(f"{file}: {fault}; correct it or take it out of the folder") from error
    return data.content(path)


def _file_name(data: Collected, file: Path, root: Path, told: str) -> str:
    """The image's path in the folder: where the JSON tells, as seen from its own place; else as the JSON lies
    among the others, by its name.
    """
    place = file.parent / told
    for resolved in (os.path.abspath, os.path.realpath):  # links of images stay, of folders are followed
        image, folder = Path(resolved(place.parent), place.name), Path(resolved(data.folder))
        if image.is_relative_to(folder) and os.path.isfile(image):
            return image.relative_to(folder).as_posix()
    name = PurePosixPath(told).name
    below = file.parent.relative_to(root) if root.is_dir() else Path()
    beside = os.path.relpath(os.path.realpath(place.parent), os.path.realpath(data.folder))
    return data.find((below / name).as_posix(), (Path(beside) / place.name).as_posix(), told, name)


def _kind(shape: Record) -> str:
    return shape.get("shape_type") or "polygon"


def _objects(shapes: list[Record]) -> list[tuple[str, list[Record]]]:
    """The shapes of each object with its label: polygons, or masks, of one label and group are one."""
    parts: dict[object, list[Record]] = {}
    for number, shape in enumerate(shapes):
        group, kind = shape.get("group_id"), _kind(shape)
        apart = group is None or kind not in PARTS
        parts.setdefault(("alone", number) if apart else (shape["label"], group, kind), []).append(shape)
    return [(own[0]["label"], own) for own in parts.values()]


def _add(data: Collected, label: str, shapes: list[Record]) -> None:
    """An object of polygons or masks, or of one rectangle or circle; lines and points are no objects."""
    points, kind, box = shapes[0]["points"], _kind(shapes[0]), shapes[0].get(BOX)
    if kind == "polygon":
        data.add_polygons(label, [shape["points"] for shape in shapes], box)
    elif kind == "mask":
        mask = _mask(data.images[-1], shapes)
        left, top, right, bottom = around_mask(mask)
        data.add_mask(label, left, top, mask[top:bottom, left:right], box)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[1] if len(points) == 2 else points[2]
        data.add_box(label, (x0, y0, x1, y1))
    elif kind == "oriented_rectangle":
        x, y = zip(*points, strict=True)
        data.add_around(label, (min(x), min(y), max(x), max(y)))
    elif kind == "circle":
        (x, y), (x1, y1) = points
        radius = ((x1 - x) ** 2 + (y1 - y) ** 2) ** 0.5
        data.add_around(label, (x - radius, y - radius, x + radius, y + radius))
    else:
        data.left_out[kind] += 1


def _mask(image: Record, shapes: list[Record]) -> np.ndarray:
    """(H, W) bool: PNGs in base64, each with its corner at the first point of its shape.

    Raises:
        ValueError: one of them is no mask within the image, or there is no pixel.
    """
    mask = np.zeros((image["height"], image["width"]), bool)
    for shape in shapes:
        left, top = (round(value) for value in shape["points"][0])
        try:
            with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as stored:
                right, bottom = left + stored.width, top + stored.height
                if min(left, top) < 0 or right > image["width"] or bottom > image["height"]:
                    raise ValueError("reaches out of its image")
                mask[top:bottom, left:right] |= np.asarray(stored).astype(bool)
        except Exception as error:  # Pillow's decoders raise anything on a broken file
            raise ValueError(f"mask of {shape['label']!r}: {first_line(error)}") from error
    if not mask.any():
        raise ValueError(f"mask of {shapes[0]['label']!r} is empty")
    return mask


def write_labelme(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/labelme: a JSON per image, to be put beside it; parts of an object share a group."""
    names = {category["id"]: category["name"] for category in categories}
    for image, annotations in images:
        shapes = []
        for annotation in objects(annotations):
            mask, box = mask_of(image, annotation), box_of(image, annotation)
            polygons = [] if mask is None else mask_polygons(mask)
            rectangle = "rectangle", [box[:2], box[2:]]
            parts = [("polygon", points.tolist()) for points in polygons] or [rectangle]
            apart = own_box(mask, box)
            more = {BOX: apart} if apart else {}
            shapes += [
                {
                    "label": names[annotation["category_id"]],
                    "points": points,
                    "group_id": annotation["id"] if len(parts) > 1 else None,
                    "description": f"annotation {annotation['id']}",
                    "shape_type": kind,
                    "flags": {},
                    **more,
                }
                for kind, points in parts
            ]
        content: Record = {"version": "5.5.0", "flags": {}, "shapes": shapes}
        content["imagePath"] = PurePosixPath(image["file_name"]).name  # as seen from the JSON
        content |= {"imageData": None, "imageHeight": image["height"], "imageWidth": image["width"]}
        write_file(file_for(folder / "labelme", image, ".json"), json.dumps(content))
