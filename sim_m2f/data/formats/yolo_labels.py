"""Where YOLO's labels lie: which text is that of which image, and the file with the names of classes."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from sim_m2f.errors import UserError

LISTS = "data.yaml", "classes.txt"


def names_file(path: Path) -> Path | None:
    """data.yaml or classes.txt in the folder of labels or up to two above; or the data.yaml that is given."""
    if path.suffix in (".yaml", ".yml"):
        return path
    folder = path if path.is_dir() else path.parent
    places = [Path(os.path.normpath(folder / up / name)) for up in ("", "..", "../..") for name in LISTS]
    return next((place for place in places if place.is_file()), None)


def texts_of_images(root: Path, images: Path, files: list[Path], listed: Path | None) -> dict[Path, Path]:
    """The text of each image that has one: of the same path below the two folders, but for parts that are
    called "labels" or "images"; else of the same name, where no other image has it.

    Args:
        root: folder of the labels.
        images, files: folder of the images, and they.
        listed: the file with the names of classes. Beside a data.yaml, texts that lie in no folder "labels"
            and have no image are passed over, with a note: exports bring a README along.

    Raises:
        UserError: a text has no image, may belong to several, or is not the only one of its image.
    """
    by_path, by_name = _grouped(files, images), _grouped(files)
    texts = [file for file in sorted(root.rglob("*.txt")) if file.name != "classes.txt"]
    found: dict[Path, Path] = {}
    others = []
    for text in texts:
        own = by_path.get(_key(text, root)) or by_name.get((text.stem,)) or []
        if not own and listed and listed.name != "classes.txt" and not _is_label(text, listed.parent):
            others.append(text)
        elif not own:
            raise UserError(f"{text}: no image of its name in {images}; add it or remove the text")
        elif len(own) > 1:
            fault = f"may belong to {own[0]} or to {own[1]}"
            raise UserError(f"{text}: {fault}; put it into a folder named as that of its image")
        elif own[0] in found:
            raise UserError(f"{text}: belongs to {own[0]}, and so does {found[own[0]]}; remove one of them")
        else:
            found[own[0]] = text
    if others:
        print(f"note: {root}: {len(others)} texts without an image, such as {others[0]}", file=sys.stderr)
    return found


def _grouped(files: Iterable[Path], folder: Path | None = None) -> dict[tuple[str, ...], list[Path]]:
    """Files by their paths below a folder, or by their names alone."""
    found: dict[tuple[str, ...], list[Path]] = {}
    for file in files:
        found.setdefault(_key(file, folder) if folder else (file.stem,), []).append(file)
    return found


def _key(file: Path, folder: Path) -> tuple[str, ...]:
    parts = file.relative_to(folder).with_suffix("").parts
    return *(part for part in parts[:-1] if part not in ("images", "labels")), file.stem


def _is_label(text: Path, folder: Path) -> bool:
    return "labels" in Path(os.path.abspath(text)).relative_to(os.path.abspath(folder)).parts
