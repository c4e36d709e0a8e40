"""Label Studio's JSON: tasks with boxes and polygons in percent of the image (https://labelstud.io/guide)."""

import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import Collected, Labelled, Record, objects, polygon_of, write_list
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write, read_json


def read_labelstudio(path: Path, images: Path, limits: CfgNode) -> Record:
    """An export of tasks: the rectangles and polygons of each task's first annotation that was not cancelled,
    of its first prediction where there is none.

    A rotated rectangle counts as the upright one around it.

    Raises:
        UserError: it is no such file; names file and task.
    """
    data = Collected(images, limits)
    for task in read_json(path, list):
        try:
            answers = task.get("annotations") or task.get("predictions") or []
            kept = [answer["result"] for answer in answers if not answer.get("was_cancelled")]
            shapes = [result for result in (kept[0] if kept else []) if "original_width" in result]
            if shapes:
                size = shapes[0]["original_width"], shapes[0]["original_height"]
                data.add_image(_file_name(task, images), size)
            for shape in shapes:
                _add(data, shape["type"], shape["value"], *size)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
            where = f"task {task.get('id', '?')}" if isinstance(task, dict) else "a task"
            fault = f"no task with an image ({type(error).__name__}: {error})"
            raise UserError(f"{path}: {where}: {fault}; export as JSON") from error
    return data.content(path)


def _file_name(task: dict[str, Any], images: Path) -> str:
    """The image's path in the folder; uploads have a random prefix that the user's own file has not."""
    address = urllib.parse.urlsplit(next((v for v in task["data"].values() if isinstance(v, str)), ""))
    local = urllib.parse.parse_qs(address.query).get("d", [urllib.parse.unquote(address.path)])[0]
    name = PurePosixPath(local).name
    candidates = [local.lstrip("/"), name, name.partition("-")[2]]
    return next((each for each in candidates if each and (images / each).is_file()), name)


def _add(data: Collected, kind: str, value: dict[str, Any], width: int, height: int) -> None:
    scale = np.array([width, height]) / 100
    if kind == "rectanglelabels":
        angle = np.deg2rad(value.get("rotation", 0))
        along = np.array([np.cos(angle), np.sin(angle)]) * value["width"] * width / 100
        down = np.array([-np.sin(angle), np.cos(angle)]) * value["height"] * height / 100
        first = np.array([value["x"], value["y"]]) * scale
        corners = np.stack([first, first + along, first + down, first + along + down])
        data.add_box(value[kind][0], (*corners.min(0), *corners.max(0)))
    elif kind == "polygonlabels":
        data.add_polygons(value[kind][0], [np.array(value["points"]) * scale])


def write_labelstudio(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/labelstudio.json: tasks with predictions, a polygon with a score per object, to be reviewed.

    The labels' control is named "label", the image's "image"; images are addressed as local files.
    """
    names = {category["id"]: category["name"] for category in categories}
    with atomic_write(folder / "labelstudio.json") as file:
        write_list(file, (_task(image, objects(own), names) for image, own in images))


def _task(image: Record, annotations: list[Record], names: dict[int, str]) -> dict[str, Any]:
    results = [result for each in annotations for result in _results(image, each, names[each["category_id"]])]
    scores = [annotation["score"] for annotation in annotations if "score" in annotation]
    prediction = {"model_version": "sim-m2f", "score": min(scores, default=0.0), "result": results}
    address = f"/data/local-files/?d={urllib.parse.quote(image['file_name'])}"
    return {"data": {"image": address}, "predictions": [prediction]}


def _results(image: Record, annotation: Record, name: str) -> Iterator[dict[str, Any]]:
    width, height = image["width"], image["height"]
    x, y, w, h = annotation["bbox"]
    box = {"x": 100 * x / width, "y": 100 * y / height, "width": 100 * w / width, "height": 100 * h / height}
    values: list[tuple[str, dict[str, Any]]] = [
        ("polygonlabels", {"points": (100 * polygon / (width, height)).tolist(), "closed": True})
        for polygon in [polygon_of(image, annotation)]
        if polygon is not None
    ]
    for number, (kind, value) in enumerate(values or [("rectanglelabels", box | {"rotation": 0})]):
        yield {
            "id": f"{annotation['id']}_{number}",
            "type": kind,
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "score": annotation.get("score", 0.0),
            "value": value | {kind: [name]},
        }
