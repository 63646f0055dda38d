"""Slides that OpenSlide reads: one source a resolution level."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from histoseg_fast.errors import ImageError
from histoseg_fast.images.companions import companions
from histoseg_fast.images.content import FileSet
from histoseg_fast.images.segments import SegmentedSource
from histoseg_fast.images.source import to_rgb
from histoseg_fast.images.tiff import MAX_PIXELS
from histoseg_fast.images.tiff_slide import plausible_mpp

if TYPE_CHECKING:
    import os

    import openslide

MAX_LEVELS = 64
SEGMENT_WIDTH, SEGMENT_HEIGHT = 1024, 256
"""Regions of about this size are asked for, in whole tiles of the file, so that each tile is decoded once."""

MAX_TILE_SIDE = 4096
"""Larger tiles are cut up: a region, its copy as RGBA and its RGB have to be held for each thread."""


def load_openslide() -> Any:
    """The module. ImportError where it or its library is not installed."""
    import openslide

    return openslide


def open_levels(path: str | os.PathLike[str]) -> tuple[list[OpenSlideSource], tuple[float, float] | None]:
    """The levels of a slide, finest first, and micrometres a pixel (down, across) of the finest, if it says.

    Raises ImageError where OpenSlide is not installed, or does not read this.
    """
    try:
        library = load_openslide()
    except ImportError as error:
        raise ImageError(
            "this slide format needs OpenSlide", where=path, fix="pip install 'histoseg-fast[slides]'"
        ) from error
    files = FileSet(path, companions(path))
    try:
        slide = library.OpenSlide(path)
    except (library.OpenSlideError, OSError, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise ImageError(
            f"OpenSlide cannot read it ({reason[:200]})", where=path, fix="copy or export it again"
        ) from None
    try:
        levels = [OpenSlideSource(files, slide, level) for level in range(min(slide.level_count, MAX_LEVELS))]
        down, across = (_number(slide.properties.get(f"openslide.mpp-{axis}")) for axis in "yx")
    except BaseException:
        slide.close()
        raise
    return levels, plausible_mpp(down, across)


class OpenSlideSource(SegmentedSource):
    """One level. What lies outside of the scanned areas is glass."""

    format = "openslide"
    slide = True

    def __init__(self, files: FileSet, slide: openslide.OpenSlide, level: int):
        super().__init__(files)
        self.level = level
        self._slide: openslide.OpenSlide | None = slide
        width, height = slide.level_dimensions[level]
        self._check_size(width, height, MAX_PIXELS, "export a part of it")
        self._downsample = slide.level_downsamples[level]
        if not 1 <= self._downsample < math.inf:
            self._refuse(f"level {level} claims a downsample of {self._downsample}", "copy or export it again")
        tile = [_number(slide.properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("width", "height")]
        self._seg_width = _whole_tiles(tile[0], SEGMENT_WIDTH)
        self._seg_height = _whole_tiles(tile[1], SEGMENT_HEIGHT)

    def _segment(self, row: int, column: int) -> np.ndarray:
        top, left = row * self._seg_height, column * self._seg_width
        size = min(self._seg_width, self.width - left), min(self._seg_height, self.height - top)
        corner = round(left * self._downsample), round(top * self._downsample)
        assert self._slide is not None
        try:
            samples = np.asarray(self._slide.read_region(corner, self.level, size))
        except load_openslide().OpenSlideError as error:
            raise ValueError(str(error)) from error
        pixels = np.empty((*samples.shape[:2], 3), np.uint8)
        to_rgb(samples, pixels, alpha=True)
        return pixels

    def close(self) -> None:
        super().close()
        if self._slide is not None and self.level == 0:  # the levels share it
            self._slide.close()
        self._slide = None


def _number(text: str | None) -> float:
    """A number of a property; NaN where there is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _whole_tiles(tile: float, least: int) -> int:
    """A side of at least `least` pixels, a multiple of the tile's where that is not too large."""
    if not 1 <= tile <= MAX_TILE_SIDE:
        return least
    return math.ceil(least / int(tile)) * int(tile)
