"""Images that somebody sends: limited in size, and decoded only where their kind is a common one."""

from pathlib import Path

import numpy as np
from PIL import Image

from sim_m2f.data.image import read_image
from sim_m2f.errors import UserError, first_line

KINDS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")  # Pillow's decoders of other kinds are not let near a file
MOST_MEGABYTES, MOST_MEGAPIXELS = 30, 40  # of a file, of what it holds


def read_upload(path: Path) -> np.ndarray:
    """Decode an uploaded image, of which nothing but the header is read before its size is known.

    Returns:
        (H, W, 3) uint8 RGB, upright.

    Raises:
        UserError: the file is none of ``KINDS``, is damaged, or holds too many pixels; names the file alone.
    """
    try:
        with Image.open(path, formats=KINDS) as stored:
            width, height = stored.size
    except Exception as error:  # Pillow raises anything on a broken file
        reason = first_line(error).replace(f"{path.parent}/", "")
        raise UserError(f"{path.name}: {reason}; give one of {', '.join(KINDS)}") from error
    if width * height > MOST_MEGAPIXELS * 1e6:
        size = f"{width} x {height} pixels"
        raise UserError(f"{path.name}: {size} are more than {MOST_MEGAPIXELS} megapixels; reduce it")
    try:
        return read_image(path, kinds=KINDS)
    except UserError as error:
        raise UserError(str(error).replace(f"{path.parent}/", "")) from error
