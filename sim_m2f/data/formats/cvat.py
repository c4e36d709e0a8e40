"""CVAT's XML for images 1.1: boxes, polygons and masks (https://docs.cvat.ai, "CVAT for image")."""

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import BOX, Collected, Labelled, Record, box_of, mask_of, objects, own_box
from sim_m2f.data.formats.boxes import around_ellipse
from sim_m2f.data.polygons import around_mask
from sim_m2f.errors import UserError
from sim_m2f.files import atomic_write


def read_cvat(path: Path, images: Path, limits: CfgNode) -> Record:
    """An annotations.xml: its boxes, polygons and masks; turned boxes and ellipses by the upright box around.

    Raises:
        UserError: it is no such file; names it.
    """
    try:
        root = ElementTree.parse(path).getroot()
        names = (name.text or "" for name in root.iterfind("meta//labels/label/name"))
        data = Collected(images, limits, names)
        for image in root.iter("image"):
            size = int(image.attrib["width"]), int(image.attrib["height"])
            data.add_image(image.attrib["name"], size)
            for shape in image:
                _add(data, shape.tag, shape.attrib)
    except (OSError, LookupError, ElementTree.ParseError, ValueError) as error:
        fault = f"no CVAT XML for images ({type(error).__name__}: {error})"
        raise UserError(f"{path}: {fault}; export it from CVAT again") from error
    return data.content(path)


def _add(data: Collected, kind: str, values: dict[str, str]) -> None:
    degrees = float(values.get("rotation", 0))
    if kind == "box":
        x0, y0, x1, y1 = (float(values[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
        centre = (x0 + x1) / 2, (y0 + y1) / 2
        data.add_turned(values["label"], (x0, y0, x1, y1), degrees, centre)
    elif kind == "ellipse":
        x, y, rx, ry = (float(values[key]) for key in ("cx", "cy", "rx", "ry"))
        data.add_around(values["label"], around_ellipse(x, y, (rx, ry), degrees))
    elif kind == "polygon":
        points = [[float(number) for number in point.split(",")] for point in values["points"].split(";")]
        data.add_polygons(values["label"], [points])
    elif kind == "mask":
        left, top, width, height = (int(values[key]) for key in ("left", "top", "width", "height"))
        runs, image = [int(run) for run in values["rle"].split(",")], data.images[-1]
        fits = left + width <= image["width"] and top + height <= image["height"]
        if min(left, top, *runs) < 0 or not fits or sum(runs) != width * height:
            raise ValueError("a mask that does not fit its image or its size")
        pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        box = [float(value) for value in values[BOX].split(",")] if BOX in values else None
        data.add_mask(values["label"], left, top, pixels.reshape(height, width), box)
    else:
        data.left_out[kind] += 1


def write_cvat(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/cvat.xml, with exact masks; to be uploaded to a task of the same images and classes."""
    names = {category["id"]: category["name"] for category in categories}
    with atomic_write(folder / "cvat.xml", "wb") as file:
        file.write(
            b'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task>'
        )
        labels = ElementTree.Element("labels")
        for name in names.values():
            ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
        file.write(ElementTree.tostring(labels, "utf-8") + b"</task></meta>\n")
        for number, (image, annotations) in enumerate(images):
            values = {
                "id": number,
                "name": image["file_name"],
                "width": image["width"],
                "height": image["height"],
            }
            element = ElementTree.Element("image", {key: str(value) for key, value in values.items()})
            for annotation in objects(annotations):
                mask, box = mask_of(image, annotation), box_of(image, annotation)
                shape = _shape(mask, box)
                if apart := own_box(mask, box):
                    shape[BOX] = ",".join(map(str, apart))
                kind = "mask" if "rle" in shape else "box"
                common = {"label": names[annotation["category_id"]], "source": "auto", "occluded": "0"}
                ElementTree.SubElement(element, kind, common | shape | {"z_order": "0"})
            file.write(ElementTree.tostring(element, "utf-8") + b"\n")
        file.write(b"</annotations>\n")


def _shape(mask: np.ndarray | None, box: list[float]) -> dict[str, str]:
    """The attributes of a mask: run lengths along the rows of its extent, from the first run of zeros on."""
    if mask is None or not mask.any():
        return {key: f"{side}" for key, side in zip(("xtl", "ytl", "xbr", "ybr"), box, strict=True)}
    left, top, right, bottom = around_mask(mask)
    part = mask[top:bottom, left:right]
    changes = np.flatnonzero(np.diff(part.ravel(), prepend=False, append=not part[-1, -1]))
    runs = np.diff(changes, prepend=0)
    values = {"rle": ", ".join(map(str, runs)), "left": left, "top": top}
    values |= {"width": right - left, "height": bottom - top}
    return {key: str(value) for key, value in values.items()}
