"""LabelMe: a JSON beside each image, with rectangles and polygons (https://github.com/wkentaro/labelme)."""

import json
from collections.abc import Iterable
from pathlib import Path

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import Collected, Labelled, Record, file_for, objects, polygons_of
from sim_m2f.errors import UserError
from sim_m2f.files import read_json, write_file


def read_labelme(path: Path, images: Path, limits: CfgNode) -> Record:
    """A folder of JSON files, or one: rectangles, polygons, and circles by the square around them.

    Raises:
        UserError: a file is none of LabelMe's; names it.
    """
    data = Collected(images, limits)
    for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
        content = read_json(file)
        try:
            name = file.parent / content["imagePath"].replace("\\", "/")
            inside = images in name.parents and name.is_file()
            file_name = name.relative_to(images).as_posix() if inside else name.name
            data.add_image(file_name, (int(content["imageWidth"]), int(content["imageHeight"])))
            for label, shapes in _objects(content["shapes"]):
                _add(data, label, shapes)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            fault = f"no LabelMe file ({type(error).__name__}: {error})"
            raise UserError(f"{file}: {fault}; correct it or take it out of the folder") from error
    return data.content(path)


def _objects(shapes: list[Record]) -> list[tuple[str, list[Record]]]:
    """The shapes of each object with its label: those of one label and one group are parts of one."""
    parts: dict[object, list[Record]] = {}
    for number, shape in enumerate(shapes):
        group = shape.get("group_id")
        key = ("alone", number) if group is None else (shape["label"], group)
        parts.setdefault(key, []).append(shape)
    return [(own[0]["label"], own) for own in parts.values()]


def _add(data: Collected, label: str, shapes: list[Record]) -> None:
    """An object of polygons, or of one rectangle or circle; lines and points are no objects."""
    points, kind = shapes[0]["points"], shapes[0].get("shape_type") or "polygon"
    if kind == "polygon":
        polygons = [shape["points"] for shape in shapes if (shape.get("shape_type") or kind) == kind]
        data.add_polygons(label, polygons)
    elif kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[1] if len(points) == 2 else points[2]
        data.add_box(label, (x0, y0, x1, y1))
    elif kind == "circle":
        (x, y), (x1, y1) = points
        radius = ((x1 - x) ** 2 + (y1 - y) ** 2) ** 0.5
        data.add_box(label, (x - radius, y - radius, x + radius, y + radius))


def write_labelme(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/labelme: a JSON per image, to be put beside it; parts of an object share a group."""
    names = {category["id"]: category["name"] for category in categories}
    for image, annotations in images:
        shapes = []
        for annotation in objects(annotations):
            x, y, width, height = annotation["bbox"]
            box = "rectangle", [[x, y], [x + width, y + height]]
            parts = [("polygon", points.tolist()) for points in polygons_of(image, annotation)] or [box]
            shapes += [
                {
                    "label": names[annotation["category_id"]],
                    "points": points,
                    "group_id": annotation["id"] if len(parts) > 1 else None,
                    "description": f"annotation {annotation['id']}",
                    "shape_type": kind,
                    "flags": {},
                }
                for kind, points in parts
            ]
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image["file_name"]}
        content |= {"imageData": None, "imageHeight": image["height"], "imageWidth": image["width"]}
        write_file(file_for(folder / "labelme", image, ".json"), json.dumps(content))
