"""Instance maps: a 16-bit PNG per image, 0 for none, and a JSON that says which annotation a number is."""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sim_m2f.data.formats.base import Labelled, Record, file_for, mask_of, objects, write_list
from sim_m2f.files import atomic_write, write_file


def write_png(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/png: the maps, where a small object lies on a large one, and instances.json."""
    with atomic_write(folder / "png" / "instances.json") as file:
        write_list(file, _maps(folder / "png", images))


def _maps(folder: Path, images: Iterable[Labelled]) -> Iterator[Record]:
    """Write each image's map; its file and the annotation ids of the numbers 1, 2 and so on."""
    for image, annotations in images:
        numbers = np.zeros((image["height"], image["width"]), np.uint16)
        own = objects(annotations)
        areas: dict[int, int] = {}
        for number, annotation in enumerate(own, start=1):  # decoded twice: all masks would fill the memory
            mask = mask_of(image, annotation)
            if mask is not None:
                areas[number] = mask.sum()
        for number in sorted(areas, key=areas.__getitem__, reverse=True):
            numbers[mask_of(image, own[number - 1])] = number
        buffer = io.BytesIO()
        Image.fromarray(numbers).save(buffer, "PNG")
        path = file_for(folder, image, ".png")
        write_file(path, buffer.getvalue())
        ids = [annotation["id"] for annotation in own]
        yield {"file": path.relative_to(folder).as_posix(), "image_id": image["id"], "annotation_ids": ids}
