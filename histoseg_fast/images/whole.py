"""Small images in one call, where streaming by bands would be in the way."""

from __future__ import annotations

import hashlib
import os

import imagecodecs
import numpy as np

from histoseg_fast.errors import ImageError
from histoseg_fast.files import atomic_write
from histoseg_fast.images.reading import open_image


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The whole image as RGB uint8 (H, W, 3). Raises ImageError."""
    with open_image(path) as image:
        out = np.empty((image.height, image.width, 3), np.uint8)
        image.read_rows(0, image.height, out)
    return out


def write_png(path: str | os.PathLike[str], pixels: np.ndarray) -> str:
    """Write RGB uint8 (H, W, 3) or grey uint8 (H, W) as PNG, whole or not at all; the hex SHA-256 of the file.

    Raises ImageError (disk full, no permission).
    """
    data = imagecodecs.png_encode(np.ascontiguousarray(pixels), level=3)
    try:
        with atomic_write(path) as stream:
            stream.write(data)
    except OSError as error:
        raise ImageError(
            f"cannot be written: {error.strerror or error}", where=path, fix="free space or choose another folder"
        ) from error
    return hashlib.sha256(data).hexdigest()
