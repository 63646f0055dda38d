"""Opening of any image by its content."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from histoseg_fast.errors import ImageError, one_line
from histoseg_fast.extras import has
from histoseg_fast.images import openslide_source, tiff_slide
from histoseg_fast.images.companions import BY_NAME
from histoseg_fast.images.content import JPEG, PNG, Content, read_head
from histoseg_fast.images.jpeg import JpegSource
from histoseg_fast.images.png import PngSource
from histoseg_fast.images.slide import NATIVE, Resolution, SlideSource
from histoseg_fast.images.source import DECODE_ERRORS, ImageSource, OverLimit
from histoseg_fast.images.tiff import TiffSource

if TYPE_CHECKING:
    import tifffile

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
"""Suffixes that a search of folders takes for images; opening looks at the suffix of MRXS, VMS and VMU alone."""

SLIDE_SUFFIXES = {".svs", ".svslide", ".ndpi", ".mrxs", ".vms", ".vmu", ".scn", ".bif", ".dcm"}
"""Suffixes of slides, beside .tif and .tiff."""

_DICOM = b"DICM"

Levels = tuple[Sequence[ImageSource], tuple[float, float] | None]
"""Resolution levels, finest first, and micrometres a pixel (down, across) of the finest, if known."""


def open_image(path: str | os.PathLike[str], resolution: Resolution = NATIVE) -> ImageSource:
    """Open a PNG, JPEG, TIFF or slide, recognised by its first bytes, to be read at `resolution`.

    Only headers are parsed; pixels are decoded by `read_rows`. Raises ImageError for anything that is no readable image
    of these formats, is over the limits, or cannot be read at `resolution`.
    """
    levels, mpp = _open_levels(path)
    finest = levels[0]
    if not finest.slide and resolution.mpp is None and not resolution.level:
        finest.mpp = None if mpp is None else (mpp[0] * mpp[1]) ** 0.5
        return finest
    try:
        return SlideSource(levels, mpp, resolution)
    except BaseException:
        for level in levels:
            level.close()
        raise


def _open_levels(path: str | os.PathLike[str]) -> Levels:
    head = read_head(path)
    if Path(path).suffix.lower() in BY_NAME or head.endswith(_DICOM):
        return openslide_source.open_levels(path)
    content = Content(path)
    try:
        if content.magic.startswith(PNG):
            return [PngSource(content)], None
        if content.magic.startswith(JPEG):
            return [JpegSource(content)], None
        return _open_tiff(content)
    except BaseException:
        content.close()
        raise


def _open_tiff(content: Content) -> Levels:
    """By our own reader, which gives each level's pixels as they are stored; else by OpenSlide."""
    try:
        file = tiff_slide.open_pages(content)
    except DECODE_ERRORS as error:
        reason = str(error).strip() or type(error).__name__
        raise ImageError(
            f"damaged TIFF data ({reason[:200]})", where=content.path, fix="copy or export it again"
        ) from error
    first = file.pages.first
    try:
        other, pages, mpp = tiff_slide.vendor(first), tiff_slide.level_pages(file), tiff_slide.stated_mpp(first)
        slide = len(pages) > 1 or first.is_svs
    except DECODE_ERRORS:  # odd tags, which need not keep the pixels from being read
        other, pages, mpp, slide = None, [first], None, False
    if other is None:
        try:
            finest = TiffSource(content, pages[0], slide=slide)
            return [finest, *_further(content, finest, pages[1:])], mpp
        except ImageError as error:
            refused = error
            if isinstance(error, OverLimit) or not has("openslide"):
                raise
    content.close()
    try:
        return openslide_source.open_levels(content.path, content)
    except ImageError:
        if other is None:
            raise refused from None
        raise


def _further(content: Content, finest: TiffSource, pages: Sequence[tifffile.TiffPage]) -> list[TiffSource]:
    """The coarser levels; one that cannot be read is left out, and `finest` warns of it."""
    levels = []
    for page in pages:
        try:
            levels.append(TiffSource(content, page, slide=True))
        except ImageError as error:
            size = f"{page.imagewidth} x {page.imagelength}"
            finest.warnings.append(f"its level of {size} pixels is left out: {one_line(error.what)}")
    return levels
