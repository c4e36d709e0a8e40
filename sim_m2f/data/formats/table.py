"""CSV: a line per box, its columns named in the first line."""

import csv
from pathlib import Path

from sim_m2f.config import CfgNode
from sim_m2f.data.formats.base import Collected, Record
from sim_m2f.errors import UserError

# What a column may be called, in small letters; the corners are pixels of the image.
COLUMNS = {
    "image": ("image", "filename", "file_name", "image_path", "path", "image_id"),
    "label": ("label", "class", "class_name", "category", "name"),
    "x0": ("xmin", "x_min", "x0", "x1", "left"),
    "y0": ("ymin", "y_min", "y0", "y1", "top"),
    "x1": ("xmax", "x_max", "x1", "x2", "right"),
    "y1": ("ymax", "y_max", "y1", "y2", "bottom"),
}


def read_csv(path: Path, images: Path, limits: CfgNode) -> Record:
    """A table with image, class and the four corners; the sizes are those of the images.

    Raises:
        UserError: a column is missing, there is no box, a line has a fault, or an image cannot be read; names
            the place.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = list(reader.fieldnames or [])
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error}); check the path") from error
    columns = _columns(path, names)
    if not rows:
        raise UserError(f"{path}: has no box below the names of its columns; add them")
    of_image: dict[str, list[tuple[int, Record]]] = {}
    for number, row in rows:
        of_image.setdefault((row[columns["image"]] or "").strip(), []).append((number, row))
    data = Collected(images, limits)
    for name, own in of_image.items():
        place = own[0][0]
        try:
            data.add_image(name)
            for place, row in own:  # noqa: B007 (named where it fails)
                corners = [float(row[columns[key]]) for key in ("x0", "y0", "x1", "y1")]
                data.add_box((row[columns["label"]] or "").strip(), corners)
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}:{place}: is no box of an image ({error}); correct it") from error
    return data.content(path)


def _columns(path: Path, names: list[str]) -> dict[str, str]:
    """The table's own name of each column.

    Raises:
        UserError: one is missing, or they are not separated by commas.
    """
    if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), "")):
        raise UserError(f"{path}: columns are separated by {other!r}; separate them by commas")
    own = {(name or "").strip().lower(): name for name in names}
    found: dict[str, str] = {}
    for key, known in COLUMNS.items():
        free = [own[name] for name in known if name in own and own[name] not in found.values()]
        if not free:
            raise UserError(
                f"{path}: has no column for {key} (such as {known[0]}); name it in the first line"
            )
        found[key] = free[0]
    return found
