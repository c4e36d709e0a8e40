"""Reading one image as 8-bit RGB, whatever its file holds, upright as its annotations have it."""

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import IMAGELENGTH, IMAGEWIDTH, TiffImageFile

from sim_m2f.config import CfgNode, get_cfg
from sim_m2f.errors import UserError, first_line
from sim_m2f.files import refuse_special

LIMITS = get_cfg().INPUT.LIMITS  # the defaults
LYING = 5, 6, 7, 8  # orientations in the EXIF data that swap width and height
DARK = 4095  # 16 bits without a larger value are 12 or fewer, and would be nearly black

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # ``opened`` says it


def names_outside(folder: Path, name: str) -> bool:
    """Whether a name leads out of a folder by ".." or from the root; the disk is not asked."""
    return not Path(os.path.abspath(folder / name)).is_relative_to(os.path.abspath(folder))


def links_outside(folder: Path, path: str | Path) -> bool:
    """Whether links on a path, which ``folder`` begins, lead out of that folder."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def is_outside(folder: Path, name: str) -> bool:
    """Whether a name leads out of a folder by "..", from the root or by a link."""
    return names_outside(folder, name) or links_outside(folder, folder / name)


@contextlib.contextmanager
def opened(path: Path, limits: CfgNode, kinds: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet; of ``kinds``, as Pillow calls them, where these are given.

    Raises:
        UserError: it is larger than ``limits`` (INPUT.LIMITS) allow; it, or the block, cannot decode it.
    """
    refuse_special(path, limits.FILE_SIZE)
    if Image.MAX_IMAGE_PIXELS is not None:  # Pillow's own limit, which fails at twice as many
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limits.PIXELS)
    try:
        with Image.open(path, formats=kinds) as stored:
            if stored.width * stored.height > limits.PIXELS:
                raise Image.DecompressionBombError
            yield stored
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; give an image or leave it out") from error
    except Image.DecompressionBombError as error:
        fault = f"has more pixels than INPUT.LIMITS.PIXELS ({limits.PIXELS:,})"
        raise UserError(f"{path}: {fault}; raise it, or make the image smaller") from error
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise UserError(f"{path}: cannot be decoded ({reason}); give an image or leave it out") from error


def image_files(folder: Path, outside: bool = False) -> list[Path]:
    """The images in a folder and below, told by their names' ends, in the order of their names.

    Args:
        folder: where they are.
        outside: whether links to folders are followed that lead out of it, each of these folders once.
    """
    known, seen, found = Image.registered_extensions(), {os.path.realpath(folder)}, []
    for place, below, names in os.walk(folder, followlinks=outside):
        found += [Path(place, name) for name in names if Path(name).suffix.lower() in known]
        for path in [Path(place, name) for name in below]:
            real = os.path.realpath(path)
            if real in seen or (path.is_symlink() and not links_outside(folder, path)):
                below.remove(path.name)  # a circle, or a folder that is seen under its own name
            seen.add(real)
    return sorted(found)


def image_size(path: Path, limits: CfgNode) -> tuple[int, int]:
    """Width and height in pixels of the upright image: as ``read_image`` and labelling tools show it.

    Raises:
        UserError: see ``opened``.
    """
    with opened(path, limits) as stored:
        return _upright_size(stored)


def _upright_size(stored: Image.Image) -> tuple[int, int]:
    width, height = stored.size
    if isinstance(stored, TiffImageFile):  # decoded upright; what size is before depends on Pillow
        width, height = stored.tag_v2[IMAGEWIDTH], stored.tag_v2[IMAGELENGTH]
    exif = Image.Image.getexif(stored)  # PNG's own decodes every pixel where there is none
    return (height, width) if exif.get(ExifTags.Base.Orientation) in LYING else (width, height)


def check_header(path: Path, height: int, width: int, limits: CfgNode) -> None:
    """Look at an image as ``read_image`` would, without decoding it.

    Raises:
        UserError: it has no header of an image, is too large, or has another size than its record.
    """
    with opened(path, limits) as stored:
        as_stored = stored.size == (width, height) and not isinstance(stored, TiffImageFile)
        size = stored.size if as_stored else _upright_size(stored)
    _refuse_other_size(path, size, height, width)


def read_image(
    path: Path,
    height: int | None = None,
    width: int | None = None,
    limits: CfgNode = LIMITS,
    kinds: tuple[str, ...] | None = None,
) -> np.ndarray:
    """Decode an image.

    The orientation in the EXIF data is applied when the image then has the size of its record (as in
    detectron2); when only the stored orientation has that size, the annotations were made on that one.

    Args:
        path: the file.
        height, width: its size in the JSON, pixels; None for an image without a record.
        limits: INPUT.LIMITS.
        kinds: formats as Pillow calls them, whose decoders alone see the file; None for all.

    Returns:
        (height, width, 3) uint8 RGB. Alpha is dropped, 16-bit grey and colours of PNG files are scaled to 8
        bits, nearly black ones (12 bits or fewer) by their own range.

    Raises:
        UserError: the file cannot be decoded, is too large, or has another size, or is a nearly black TIFF
            of 16 bits a colour.
    """
    with opened(path, limits, kinds) as stored:
        upper_bits = _tiff_has_16_bits(stored)
        image = _of_16_bits(path, stored) if _has_16_bits(stored) else stored
        image.load()
        upright = ImageOps.exif_transpose(image)
        image = image if upright.size != (width, height) == image.size else upright
        size, pixels = image.size, to_rgb(image)
        if upper_bits and pixels.max() <= DARK >> 8:
            raise ValueError(f"16-bit colours of a TIFF without a value above {DARK}; convert it to PNG")
    if height and width:
        _refuse_other_size(path, size, height, width)
    return pixels


def _refuse_other_size(path: Path, size: tuple[int, int], height: int, width: int) -> None:
    if size != (width, height):
        sizes = f"is {size[0]} x {size[1]} pixels, but {width} x {height} in the JSON"
        raise UserError(f"{path}: {sizes}; correct the record or the file")


def _has_16_bits(stored: Image.Image) -> bool:
    """Whether it is a PNG whose colours, not its grey alone, have 16 bits; before it is decoded."""
    tiles = str(getattr(stored, "tile", ""))  # with the layout of the pixels that are to be decoded
    return stored.format == "PNG" and stored.mode != "I;16" and "16B" in tiles


def _tiff_has_16_bits(stored: Image.Image) -> bool:
    """Whether it is a TIFF of 16 bits a colour, of which Pillow takes the upper 8; before it is decoded."""
    tiles = str(getattr(stored, "tile", ""))
    return stored.format == "TIFF" and not stored.mode.startswith("I") and ";16" in tiles


def _of_16_bits(path: Path, stored: Image.Image) -> Image.Image:
    """A PNG with 16 bits a colour, of which Pillow would take the upper 8."""
    from torchvision.io import ImageReadMode, decode_image, read_file  # not for all that reads images

    values = decode_image(read_file(str(path)), ImageReadMode.RGB).permute(1, 2, 0)
    image = Image.fromarray(_in_8_bits(values.numpy()))
    image.info = stored.info
    return image


@functools.cache
def _tell_of_dark_images() -> None:
    """Once in a process; of a loader's workers the first one speaks for all."""
    torch = sys.modules.get("torch")  # without which there are no workers
    worker = torch.utils.data.get_worker_info() if torch else None
    if worker is not None and worker.id > 0:
        return
    note = f"16-bit images without a value above {DARK} are nearly black; each is scaled by its own range"
    print(f"note: {note}", file=sys.stderr)


def to_rgb(image: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of an image of any mode.

    Raises:
        ValueError: the values have no known range (32-bit integers or floats).
    """
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit grey has no known range; convert it to 8 or 16 bits")
        image = Image.fromarray(_in_8_bits(values))
    elif image.mode == "F":
        raise ValueError("floating-point grey has no known range; convert it to 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # a palette with transparency has no direct way to RGB
    return np.array(image.convert("RGB"))


def _in_8_bits(values: np.ndarray) -> np.ndarray:
    """uint8 of values of 16 bits."""
    brightest = 65535
    if values.max() <= DARK:
        brightest = max(int(values.max()), 1)
        _tell_of_dark_images()
    return np.rint(values * (255 / brightest)).astype(np.uint8)
