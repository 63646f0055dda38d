"""An image with resolution levels, read at the resolution that is asked for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from histoseg_fast.errors import UsageError
from histoseg_fast.images.resample import Resampler
from histoseg_fast.images.segments import OVERLAP_ROWS
from histoseg_fast.images.source import ImageSource
from histoseg_fast.images.tiff import MAX_PIXELS
from histoseg_fast.plan import MAX_MPP, MIN_MPP

TOLERANCE = 0.05
"""A level this close to the resolution asked for is read as it is: no network can tell, and nothing is blurred."""

MAX_ENLARGEMENT = 2.0
"""How far the finest level is enlarged where it is too coarse; more would be guessing."""


@dataclass(frozen=True)
class Resolution:
    """The grid an image is read on.

    level : the level as it is stored, 0 the finest. mpp : micrometres a pixel, for slides and for plain images that
    state theirs. trained : micrometres a pixel for slides alone, where neither is given; plain images are then read as
    they are. Raises UsageError for both level and mpp, or values out of range.
    """

    level: int | None = None
    mpp: float | None = None
    trained: float | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.mpp is not None:
            raise UsageError("--level and --mpp both choose the resolution", fix="give one of them")
        if self.level is not None and self.level < 0:
            raise UsageError(f"there is no level {self.level}", where="--level", fix="0 is the finest")
        if self.mpp is not None and not MIN_MPP <= self.mpp <= MAX_MPP:
            raise UsageError(f"{self.mpp:g} is not {MIN_MPP:g} to {MAX_MPP:g}", where="--mpp")


NATIVE = Resolution(level=0)
"""As stored, in full detail."""


class SlideSource(ImageSource):
    """An image read at a resolution, from the nearest level that is fine enough.

    Where that level is finer than asked for, its pixels are averaged by area, each axis by its own factor; any cut into
    bands gives the same pixels. A level within `TOLERANCE` is read as it is. One that is too coarse is enlarged by
    linear interpolation, with a warning, up to `MAX_ENLARGEMENT`.
    """

    def __init__(
        self,
        levels: Sequence[ImageSource],
        mpp: tuple[float, float] | None,
        resolution: Resolution,
    ):
        """levels : of one image, finest first; closed with this. mpp : micrometres a pixel (down, across) of the first.

        Raises ImageError where the image cannot be read at `resolution`.
        """
        finest = levels[0]
        super().__init__(finest._content)
        self.format, self.slide, self.warnings = finest.format, finest.slide, finest.warnings
        self._levels, self._finest = levels, mpp
        self.level, scale = self._choose(resolution)
        self._source = source = levels[self.level]
        self._scale = scale or (1.0, 1.0)
        self._resampler: Resampler | None = None
        self._tail: tuple[int, np.ndarray, Sequence[tuple[int, int]]] = (0, np.empty((0, 0, 3), np.uint8), ())
        if scale is None:
            self.width, self.height = source.width, source.height
            self.mpp = None if mpp is None else math.sqrt(math.prod(self._mpp_of(self.level)))
        else:
            width, height = (max(1, round(n / s)) for n, s in ((source.width, scale[1]), (source.height, scale[0])))
            self._check_size(width, height, MAX_PIXELS, "use a larger --mpp")
            self._resampler = Resampler(source, height, width, scale)
            self.mpp = resolution.mpp or resolution.trained
        self.scale = finest.height / self.height, finest.width / self.width

    def _choose(self, resolution: Resolution) -> tuple[int, tuple[float, float] | None]:
        """The level, and its pixels a pixel (down, across); None for its own grid."""
        count = len(self._levels)
        as_it_is = (
            "use --level 0 to read it as it is"
            if count == 1
            else f"use --level N (0 to {count - 1}) to read one as it is"
        )
        if resolution.level is not None:
            if resolution.level >= count:
                self._refuse(f"has no level {resolution.level}", as_it_is)
            return resolution.level, None
        wanted = resolution.mpp or resolution.trained
        if wanted is None:
            self._refuse("the plan does not record the resolution it was trained at", f"give --mpp, or {as_it_is}")
        if self._finest is None:
            self._refuse("the file does not state its resolution (micrometres a pixel)", as_it_is)
        fine_enough = [i for i in range(count) if max(self._mpp_of(i)) <= wanted * (1 + TOLERANCE)]
        level = max(fine_enough, default=0)
        down, across = (wanted / mpp for mpp in self._mpp_of(level))
        if max(down, across) <= 1 + TOLERANCE and min(down, across) >= 1 - TOLERANCE:
            return level, None
        if min(down, across) < 1 - TOLERANCE:
            self._note_enlargement(wanted, 1 / min(down, across), as_it_is)
        return level, (down, across)

    def _note_enlargement(self, wanted: float, times: float, as_it_is: str) -> None:
        has = f"has {max(self._mpp_of(0)):.4g} micrometres a pixel at best, {wanted:.4g} are asked for"
        if times > MAX_ENLARGEMENT:
            self._refuse(has, as_it_is)
        self.warnings.append(f"{has}: enlarged {times:.2f} times")

    def _mpp_of(self, level: int) -> tuple[float, float]:
        """Micrometres a pixel (down, across)."""
        assert self._finest is not None
        finest, other = self._levels[0], self._levels[level]
        return self._finest[0] * finest.height / other.height, self._finest[1] * finest.width / other.width

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        self._read_columns(y0, y1, out, ((0, self.width),))

    def _read_columns(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]]) -> None:
        if self._resampler is None:
            self._source.read_rows(y0, y1, out, columns)
            return
        first, tail, spans = self._tail  # what bands share is resampled once
        there = all(any(left <= column[0] and column[1] <= right for left, right in spans) for column in columns)
        known = min(max(first + len(tail) - y0, 0), y1 - y0) if there and y0 >= first else 0
        if known:
            out[:known] = tail[y0 - first : y0 - first + known]
        if known < y1 - y0:
            packed = out.strides[1:] == (3, 1)
            fresh = out[known:] if packed else np.empty((y1 - y0 - known, self.width, 3), np.uint8)
            self._resampler.read(y0 + known, y1, fresh, columns)
            if not packed:
                out[known:] = fresh
        start = max(y0, y1 - OVERLAP_ROWS)
        self._tail = start, out[start - y0 :].copy(), columns

    def overview(self, step: int) -> np.ndarray | None:
        if not self.slide:
            return None
        height, width = -(-self.height // step), -(-self.width // step)
        for source in reversed(self._levels):
            scale = self._pixels_of(source, step)
            if min(scale) >= 1 or source is self._levels[0]:
                break
        out = np.empty((height, width, 3), np.uint8)
        Resampler(source, height, width, scale).read(0, height, out)
        return out

    def _pixels_of(self, source: ImageSource, step: int) -> tuple[float, float]:
        """How many pixels of `source` (down, across) lie under `step` pixels of this grid."""
        down, across = self._scale
        return (
            step * down * source.height / self._source.height,
            step * across * source.width / self._source.width,
        )

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for level in self._levels:
                stack.callback(level.close)
