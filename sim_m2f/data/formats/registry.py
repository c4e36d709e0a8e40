"""The formats by name, read into COCO JSON beside a run and written from it."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from sim_m2f.config import CfgNode
from sim_m2f.data.coco import load_json
from sim_m2f.data.formats.base import Labelled, Record, file_for
from sim_m2f.data.formats.coco import write_polygons
from sim_m2f.data.formats.cvat import read_cvat, write_cvat
from sim_m2f.data.formats.labelme import read_labelme, write_labelme
from sim_m2f.data.formats.labelstudio import read_labelstudio, write_labelstudio
from sim_m2f.data.formats.png import write_png
from sim_m2f.data.formats.table import read_csv
from sim_m2f.data.formats.voc import read_voc
from sim_m2f.data.formats.yolo import read_yolo, write_yolo
from sim_m2f.data.image import LIMITS
from sim_m2f.errors import UserError
from sim_m2f.files import refuse_inputs, refuse_special, write_file

COCO = "coco"
READERS: dict[str, Callable[[Path, Path, CfgNode], Record]] = {
    "yolo": read_yolo,
    "voc": read_voc,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "labelstudio": read_labelstudio,
    "csv": read_csv,
}


class Writer(NamedTuple):
    """A format that is written.

    write: from the folder of the output, the categories, and the images with their annotations.
    place: what it writes below that folder.
    file_per_image: whether that is a file under each image's name with another end.
    """

    write: Callable[[Path, list[Record], Iterable[Labelled]], None]
    place: str
    file_per_image: bool


WRITERS = {
    "polygons": Writer(write_polygons, "masks_polygons.json", False),
    "yolo": Writer(write_yolo, "yolo", True),
    "labelme": Writer(write_labelme, "labelme", True),
    "cvat": Writer(write_cvat, "cvat.xml", False),
    "labelstudio": Writer(write_labelstudio, "labelstudio.json", False),
    "png": Writer(write_png, "png", True),
}
# What all of them write below that folder, as patterns.
WRITTEN = tuple(f"{each.place}/**/*" if each.file_per_image else each.place for each in WRITERS.values())
READ_AGAIN = {"yolo": "yolo", "voc": "cvat"}  # what is read by the end of its files' names: what else has it
INPUTS = COCO, *READERS
BOXES = ".boxes.json"  # behind the stem of what is made of boxes in another format: these as COCO's


def output_formats(text: str) -> list[str]:
    """The formats in a text such as "labelme,yolo".

    Raises:
        UserError: one of them is none of ``WRITERS``.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise UserError(f"--format: {unknown[0]!r} is unknown; take some of {','.join(WRITERS)}")
    return names


def refuse_shared_files(path: Path, images: Iterable[str], formats: Iterable[str]) -> None:
    """Look whether every image gets a file of its own in each format; nothing is written.

    Args:
        path: of the annotations.
        images: their file names.
        formats: of ``WRITERS``.

    Raises:
        UserError: two images would share a file, which would hold the labels of one alone.
    """
    apart = [name for name in formats if WRITERS[name].file_per_image]
    owners: dict[Path, str] = {}
    for image in images if apart else ():
        place = file_for(Path(), {"file_name": image}, "")
        if place in owners:
            fault = f"images {owners[place]!r} and {image!r} would share a file in the format {apart[0]}"
            advice = f"rename one of them, or leave {','.join(apart)} out of --format"
            raise UserError(f"{path}: {fault}; {advice}")
        owners[place] = image


def refuse_read_again(
    output: Path, name: str, annotations: Path, images: Path, formats: Collection[str] = ()
) -> None:
    """Look whether the next call would take what is written for data: readers go through whole folders.

    Args:
        output: folder to write to.
        name: one of ``INPUTS``, the format of what is read.
        annotations, images: where that is.
        formats: of ``WRITERS``; "png" also where figures are written.

    Raises:
        UserError: it would.
    """
    walked = [images] if name == "yolo" and "png" in formats else []
    if name == "labelme" or READ_AGAIN.get(name) in formats:
        walked.append(annotations.parent if annotations.name == "data.yaml" else annotations)
    place = output.resolve()
    around = [each for each in walked if each.is_dir() and each.resolve() in (place, *place.parents)]
    if around:
        outermost = min(around, key=lambda each: len(each.resolve().parts))
        fault = f"would lie in {outermost}, which is read with all that lies below"
        advice = f"give an --output outside, such as {outermost.resolve().parent / output.name}"
        raise UserError(f"{output}: {fault}; {advice}")


def read_annotations(path: Path, images: Path, name: str, limits: CfgNode = LIMITS) -> Record:
    """Annotations in any format as the content of a COCO JSON, whose records are not checked.

    Args:
        path: file or folder of the annotations.
        images: folder of the images.
        name: one of ``INPUTS``.
        limits: INPUT.LIMITS.

    Raises:
        UserError: there is nothing of the kind, it is too large, or it has a fault.
    """
    if name == COCO:
        return load_json(path, limits)
    for given in (path, images):
        if not given.exists():
            raise UserError(f"{given}: no such file or folder; check the path")
    if not images.is_dir():
        raise UserError(f"{images}: is no folder; give the folder of the images")
    for file in path.rglob("*") if path.is_dir() else [path]:
        refuse_special(file, limits.FILE_SIZE)
    return READERS[name](path, images, limits)


def as_coco(path: Path, images: Path, name: str, output: Path, limits: CfgNode = LIMITS) -> Path:
    """The COCO JSON of annotations in any format; written to ``output`` where they are none.

    Raises:
        UserError: see ``read_annotations``; or they lie where ``output`` does.
    """
    if name == COCO:
        return path
    refuse_inputs([output], [path], [images])
    write_file(output, json.dumps(read_annotations(path, images, name, limits)))
    return output
