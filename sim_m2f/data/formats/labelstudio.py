"""Label Studio's JSON: tasks with boxes and polygons in percent of the image (https://labelstud.io/guide)."""

import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import (
    BOX,
    Collected,
    Labelled,
    Record,
    box_of,
    mask_of,
    objects,
    own_box,
    write_list,
)
from sim_m2f.data.formats.boxes import around_ellipse
from sim_m2f.data.polygons import joined, mask_polygons
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write, read_json

BARE = "rectangle", "polygon", "ellipse", "brush", "keypoint"  # a region beside its labels of the same id


def read_labelstudio(path: Path, images: Path, limits: CfgNode) -> Record:
    """An export of tasks: the rectangles, polygons and ellipses of each task's first annotation that was not
    cancelled, of its first prediction where there is none; where that has none, the image without objects.

    A rotated rectangle and an ellipse count as the upright box around them. A task may have several images.

    Raises:
        UserError: it is no such file, or it does not tell which image is whose; names file and task.
    """
    data = Collected(images, limits)
    for task in read_json(path, list):
        try:
            answers = task.get("annotations") or task.get("predictions") or []
            kept = [answer["result"] for answer in answers if not answer.get("was_cancelled")]
            shapes = [result for result in (kept[0] if kept else []) if "original_width" in result]
            if kept and not shapes:
                _add_empty(data, task["data"])
            for text, own in _by_image(task["data"], shapes):
                _add_image(data, task["data"], text, own)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            where = f"task {task.get('id', '?')}" if isinstance(task, dict) else "a task"
            fault = f"no task with an image ({type(error).__name__}: {error})"
            raise UserError(f"{path}: {where}: {fault}; export as JSON") from error
    return data.content(path)


def _by_image(fields: dict[str, Any], shapes: list[Record]) -> Iterator[tuple[Any, list[Record]]]:
    """The shapes on each image of a task, with what the field holds that is called as the image's control.

    Raises:
        ValueError: there are several controls, and one has no such field.
    """
    groups: dict[tuple[Any, int], list[Record]] = {}
    for shape in shapes:
        groups.setdefault((shape.get("to_name"), shape.get("item_index") or 0), []).append(shape)
    for (control, number), own in groups.items():
        text = fields.get(control)
        if text is None and len(groups) > 1:
            raise ValueError(f"which of several images {control!r} is cannot be told; call its field so")
        yield (text[number] if isinstance(text, list) else text), own


def _add_image(data: Collected, fields: dict[str, Any], text: Any, shapes: list[Record]) -> None:
    size = shapes[0]["original_width"], shapes[0]["original_height"]
    data.add_image(_file_name(data, fields, text), size)
    labelled = {shape.get("id") for shape in shapes if shape["type"].endswith("labels")}
    for shape in shapes:
        if shape["type"].endswith("labels"):
            _add(data, shape, *size)
        elif shape["type"] in BARE and shape.get("id") not in labelled:
            data.left_out[f"{shape['type']} without a label"] += 1


def _add_empty(data: Collected, fields: dict[str, Any]) -> None:
    """All images of a task in which somebody has found no object."""
    values = [each for value in fields.values() for each in (value if isinstance(value, list) else [value])]
    texts = [value for value in values if isinstance(value, str)]
    for name in _found(data, texts) or [_file_name(data, fields, None)]:
        data.add_image(name)


def _file_name(data: Collected, fields: dict[str, Any], named: Any) -> str:
    """The image's path in the folder: of the text that names it, else of the field whose file is there, else
    of the first text.

    Raises:
        ValueError: the files of several fields are there.
    """
    texts = [named] if isinstance(named, str) else [each for each in fields.values() if isinstance(each, str)]
    found = _found(data, texts)
    if len(found) > 1:
        fault = f"the image may be any of {', '.join(map(repr, found))}"
        raise ValueError(f"{fault}; call the field of the image as its control")
    return found[0] if found else data.find(*(_names(texts[0]) if texts else [""]))


def _found(data: Collected, texts: Iterable[str]) -> list[str]:
    """The images in the folder that texts name, each once."""
    names = (next(filter(data.has, _names(text)), None) for text in texts)
    return list(dict.fromkeys(name for name in names if name))


def _names(text: str) -> list[str]:
    """What an image may be called in the folder; uploads have a random prefix, the user's file has not."""
    try:
        address = urllib.parse.urlsplit(text)
    except ValueError:  # no address
        return [text]
    local = urllib.parse.parse_qs(address.query).get("d", [urllib.parse.unquote(address.path)])[0]
    name = PurePosixPath(local).name
    return [local.lstrip("/"), name, re.sub(r"^[0-9a-f]{8}-", "", name), name]


def _add(data: Collected, shape: Record, width: int, height: int) -> None:
    """An object of a rectangle, a polygon or an ellipse; ``labels`` have any shape."""
    kind, value, scale = shape["type"], shape["value"], np.array([width, height]) / 100
    degrees = value.get("rotation", 0)
    if "points" in value:
        box = (shape.get("meta") or {}).get(BOX)
        data.add_polygons(value[kind][0], [np.array(value["points"]) * scale], box)
    elif value.keys() >= {"x", "y", "width", "height"}:
        x, y, w, h = _pixels(value, "width", "height", scale)
        data.add_turned(value[kind][0], (x, y, x + w, y + h), degrees, (x, y))
    elif "radiusX" in value:
        x, y, rx, ry = _pixels(value, "radiusX", "radiusY", scale)
        data.add_around(value[kind][0], around_ellipse(x, y, (rx, ry), degrees))
    else:
        data.left_out[kind] += 1


def _pixels(value: dict[str, Any], right: str, down: str, scale: np.ndarray) -> list[float]:
    """The place and the two lengths of a shape."""
    percent = np.array([[value["x"], value["y"]], [value[right], value[down]]])
    return (percent * scale).ravel().tolist()


def write_labelstudio(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/labelstudio.json: tasks with predictions, a polygon with a score per object, to be reviewed.

    The labels' control is named "label", the image's "image"; images are addressed as local files.
    """
    names = {category["id"]: category["name"] for category in categories}
    with atomic_write(folder / "labelstudio.json") as file:
        write_list(file, (_task(image, objects(own), names) for image, own in images))


def _task(image: Record, annotations: list[Record], names: dict[int, str]) -> dict[str, Any]:
    results = [_result(image, each, names[each["category_id"]]) for each in annotations]
    scores = [annotation["score"] for annotation in annotations if annotation.get("score") is not None]
    prediction = {"model_version": "sim-m2f", "score": min(scores, default=0.0), "result": results}
    address = f"/data/local-files/?d={urllib.parse.quote(image['file_name'])}"
    return {"data": {"image": address}, "predictions": [prediction]}


def _result(image: Record, annotation: Record, name: str) -> dict[str, Any]:
    """The polygon of an object, all its parts in one; its box where it has no mask."""
    size = image["width"], image["height"]
    mask, box = mask_of(image, annotation), box_of(image, annotation)
    polygons = [] if mask is None else mask_polygons(mask)
    if polygons:
        kind = "polygonlabels"
        value = {"points": (100 * joined(polygons) / size).tolist(), "closed": True}
    else:
        kind = "rectanglelabels"
        x, y, right, bottom = (100 * np.reshape(box, (2, 2)) / size).ravel().tolist()
        value = {"x": x, "y": y, "width": right - x, "height": bottom - y, "rotation": 0}
    apart = own_box(mask, box)
    return {
        "id": f"{annotation['id']}_0",
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": image["width"],
        "original_height": image["height"],
        "image_rotation": 0,
        "score": annotation.get("score") or 0.0,
        "value": value | {kind: [name]},
    } | ({"meta": {BOX: apart}} if apart else {})
