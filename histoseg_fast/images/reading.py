"""Opening of any raster by its content."""

from __future__ import annotations

import os

from histoseg_fast.errors import ImageError
from histoseg_fast.images.content import Content
from histoseg_fast.images.jpeg import JpegSource
from histoseg_fast.images.png import PngSource
from histoseg_fast.images.source import ImageSource
from histoseg_fast.images.tiff import TiffSource

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
"""Suffixes that a search of folders takes for images; opening never looks at the suffix."""

_KINDS: tuple[tuple[bytes, type[ImageSource]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngSource),
    (b"\xff\xd8\xff", JpegSource),
    (b"II*\0", TiffSource),
    (b"MM\0*", TiffSource),
    (b"II+\0", TiffSource),
    (b"MM\0+", TiffSource),
)


def open_image(path: str | os.PathLike[str]) -> ImageSource:
    """Open a PNG, JPEG or TIFF file, recognised by its first bytes.

    Only the header is parsed; pixels are decoded by `read_rows`. Raises ImageError for anything that
    is no readable image of these formats or is over the limits.
    """
    content = Content(path)
    try:
        for magic, kind in _KINDS:
            if content.magic.startswith(magic):
                return kind(content)
        raise ImageError("is not a PNG, JPEG or TIFF file", where=path, fix="convert it, or leave it out")
    except BaseException:
        content.close()
        raise
