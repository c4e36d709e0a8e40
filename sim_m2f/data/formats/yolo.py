"""YOLO: a text per image, a line per object: its class and its box or polygon in shares of the image."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import Collected, Labelled, Record, box_of, file_for, mask_of, objects
from sim_m2f.data.formats.yolo_labels import names_file, texts_of_images
from sim_m2f.data.image import image_files
from sim_m2f.data.polygons import joined, mask_polygons
from sim_m2f.errors import UserError, first_line
from sim_m2f.files import read_text, write_file


def read_yolo(path: Path, images: Path, limits: CfgNode) -> Record:
    """A folder with labels (texts, in it or below) and perhaps data.yaml or classes.txt; or its data.yaml.

    Raises:
        UserError: a line or the names of classes have a fault, a text has no image or several, or an image
            cannot be read; names the place.

    Where data.yaml tells of keypoints (kpt_shape), lines are boxes, and what follows these is left out.
    """
    root, listed = path if path.is_dir() else path.parent, names_file(path)
    names, pose = _classes(listed) if listed else ([], False)
    data, files = Collected(images, limits, names), image_files(images, limits.OUTSIDE)
    labels = texts_of_images(root, images, files, listed)
    for image in files:
        try:
            data.add_image(image.relative_to(images).as_posix())
        except ValueError as error:
            raise UserError(f"{images}: image {error}") from error
        size = data.images[-1]["width"], data.images[-1]["height"]
        lines = read_text(labels[image]).splitlines() if image in labels else []
        for number, line in enumerate(lines, start=1):
            try:
                _add(data, names, line.split(), *size, pose)
            except (ValueError, IndexError, OverflowError) as error:
                fault = f"is no line of YOLO ({first_line(error)})"
                raise UserError(f"{labels[image]}:{number}: {fault}; write class x y width height") from error
    return data.content(path)


def _classes(file: Path) -> tuple[list[str], bool]:
    """The names of the classes in data.yaml or classes.txt, and whether their objects have keypoints.

    Raises:
        UserError: it has none, two are the same, or their numbers are not those from 0 on.
    """
    if file.suffix == ".txt":
        return _apart(file, read_text(file).rstrip().splitlines()), False
    try:
        content: Any = yaml.safe_load(read_text(file))
        names: Any = content["names"]
        if not isinstance(names, dict | list):
            raise TypeError("they are no list")
        found = _by_number(file, names) if isinstance(names, dict) else names
        if any(isinstance(name, bool) for name in found):
            raise UserError(
                f"{file}: a class is named on, off, yes, no, true or false; put its name in quotes"
            )
        if not all(isinstance(name, str | int | float) for name in found):
            raise TypeError("one of them is no text")
        return _apart(file, [str(name) for name in found]), bool(content.get("kpt_shape"))
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: has no names of classes ({first_line(error)}); add them") from error


def _apart(file: Path, names: list[str]) -> list[str]:
    """The names of classes; UserError where two are the same."""
    for number, name in enumerate(names):
        if name in names[:number]:
            fault = f"classes {names.index(name)} and {number} are both named {name!r}"
            raise UserError(f"{file}: {fault}; rename one of them")
    return names


def _by_number(file: Path, names: dict[Any, Any]) -> list[Any]:
    """The names in the order of their numbers, which may be texts.

    Raises:
        UserError: they are not 0, 1 and so on, each of them once.
    """
    numbers = [str(number) for number in range(len(names))]
    given = {str(key): name for key, name in names.items()}
    if given.keys() != set(numbers):
        fault = f"{len(names)} names of classes have the numbers {', '.join(map(repr, names))}"
        raise UserError(f"{file}: {fault[:200]}; number them from 0 on and leave none out")
    return [given[number] for number in numbers]


def _add(data: Collected, names: list[str], words: list[str], width: int, height: int, pose: bool) -> None:
    if not words:
        return
    label, numbers = int(words[0]), [float(word) for word in words[1:]]
    if pose and len(numbers) > 4:
        data.left_out["keypoints"] += 1
        numbers = numbers[:4]
    if label < 0:
        raise ValueError("its class is negative")
    name = names[label] if names else f"class {label}"
    if len(numbers) == 4:
        x, y, w, h = numbers
        box = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
        data.add_box(name, box)
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        data.add_polygons(name, [np.reshape(numbers, (-1, 2)) * (width, height)])
    else:
        raise ValueError(f"{len(numbers)} numbers after the class")


def write_yolo(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/yolo: labels/ with a polygon per object, parts tied by seams, and data.yaml.

    An object without a mask has its box; beside polygons the four corners of it, since Ultralytics reads all
    lines of a text as polygons where one is.
    """
    ordered = sorted(categories, key=lambda category: category["id"])
    label = {category["id"]: number for number, category in enumerate(ordered)}
    for image, annotations in images:
        size, own = (image["width"], image["height"]), objects(annotations)
        polygons = [_polygon(mask_of(image, annotation)) for annotation in own]
        as_box = all(polygon is None for polygon in polygons)
        lines = []
        for annotation, polygon in zip(own, polygons, strict=True):
            x0, y0, x1, y1 = box_of(image, annotation)
            corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
            box = np.array([[(x0 + x1) / 2, (y0 + y1) / 2], [x1 - x0, y1 - y0]]) if as_box else corners
            shares = ((box if polygon is None else polygon) / size).ravel()
            lines.append(" ".join([str(label[annotation["category_id"]]), *(f"{s:.6f}" for s in shares)]))
        write_file(file_for(folder / "yolo" / "labels", image, ".txt"), "".join(f"{one}\n" for one in lines))
    names = {number: category["name"] for number, category in enumerate(ordered)}
    content = {"train": "images", "val": "images", "names": names}  # in the folder of this file
    write_file(folder / "yolo" / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def _polygon(mask: np.ndarray | None) -> np.ndarray | None:
    """All parts of a mask as one polygon (n, 2)."""
    polygons = [] if mask is None else mask_polygons(mask)
    return joined(polygons) if polygons else None
