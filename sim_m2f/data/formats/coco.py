"""COCO JSON with masks as polygons, as older tools want it."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from sim_m2f.data.formats.base import Labelled, Record, mask_of, write_list
from sim_m2f.data.polygons import mask_polygons
from sim_m2f.files import atomic_write


def write_polygons(folder: Path, categories: list[Record], images: Iterable[Labelled]) -> None:
    """``folder``/masks_polygons.json; holes and parts that touch are tied by seams."""
    records: list[Record] = []

    def annotations() -> Iterator[Record]:
        for image, own in images:
            records.append(image)
            for annotation in own:
                mask = None if annotation.get("iscrowd") else mask_of(image, annotation)
                polygons = [] if mask is None else [shape.ravel().tolist() for shape in mask_polygons(mask)]
                yield annotation | ({"segmentation": polygons} if polygons else {})

    with atomic_write(folder / "masks_polygons.json") as file:
        file.write(f'{{"categories": {json.dumps(categories)}, "annotations": ')
        write_list(file, annotations())
        file.write(f', "images": {json.dumps(records)}}}\n')
