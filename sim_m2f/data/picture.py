"""Reading one picture as 8-bit RGB, whatever its file holds, upright as its annotations have it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sim_m2f.errors import UserError


def read_picture(path: Path, height: int, width: int) -> np.ndarray:
    """Decode a picture.

    The orientation in the EXIF data is applied when the picture then has the size of its record (as in
    detectron2); when only the stored orientation has that size, the annotations were made on that one.

    Args:
        path: the file.
        height, width: its size in the JSON, pixels.

    Returns:
        (height, width, 3) uint8 RGB. Alpha is dropped, 16-bit grey is scaled to 8 bits.

    Raises:
        UserError: the file cannot be decoded, or has another size.
    """
    try:
        with Image.open(path) as stored:
            stored.load()
            picture = _oriented(stored, (width, height))
            size, pixels = picture.size, to_rgb(picture)
    except Exception as error:  # Pillow's decoders raise anything on a broken file
        reason = (
            "not a picture"
            if isinstance(error, UnidentifiedImageError)
            else str(error) or type(error).__name__
        )
        raise UserError(
            f"{path}: cannot be decoded ({reason}); replace the file or remove its record"
        ) from error
    if size != (width, height):
        sizes = f"is {size[0]} x {size[1]} pixels, but {width} x {height} in the JSON"
        raise UserError(f"{path}: {sizes}; correct the record or the file")
    return pixels


def _oriented(stored: Image.Image, size: tuple[int, int]) -> Image.Image:
    upright = ImageOps.exif_transpose(stored)
    return stored if upright.size != size and stored.size == size else upright


def to_rgb(picture: Image.Image) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of a picture of any mode.

    Raises:
        ValueError: the values have no known range (32-bit integers or floats).
    """
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit grey has no known range; convert it to 8 or 16 bits")
        picture = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    elif picture.mode == "F":
        raise ValueError("floating-point grey has no known range; convert it to 8 or 16 bits")
    elif picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette with transparency has no direct way to RGB
    return np.array(picture.convert("RGB"))
