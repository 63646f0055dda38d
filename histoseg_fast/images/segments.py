"""Images stored in pieces (strips, tiles): only those that a band needs are decoded, on several threads."""

from __future__ import annotations

import abc
import concurrent.futures
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from histoseg_fast.images.content import Content, FileSet
from histoseg_fast.images.source import ImageSource
from histoseg_fast.machine import available_cores

OVERLAP_ROWS = 512
"""Segments that reach into this many last rows of a band are kept for the next one."""

MAX_DECODERS = 8
"""Most threads that decode the segments of one image; the decoders release the GIL."""

PARALLEL_PIXELS = 2**21
"""A band with fewer pixels is decoded by the thread that reads it: small images come many at a time anyway."""


class SegmentedSource(ImageSource):
    """A grid of segments of `_seg_height` x `_seg_width` pixels; the subclass sets these and the image's size."""

    _seg_height: int
    _seg_width: int

    def __init__(self, content: Content | FileSet):
        super().__init__(content)
        self._kept: dict[tuple[int, int], np.ndarray] = {}
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    @abc.abstractmethod
    def _segment(self, row: int, column: int) -> np.ndarray:
        """One segment as RGB uint8, cropped to the image. Called from several threads."""

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        self._read_columns(y0, y1, out, ((0, self.width),))

    def _read_columns(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]]) -> None:
        height, width = self._seg_height, self._seg_width
        self._kept = {at: kept for at, kept in self._kept.items() if (at[0] + 1) * height > y0 and at[0] * height < y1}

        def fill(at: tuple[int, int]) -> None:
            top, left = at[0] * height, at[1] * width
            pixels = self._kept.get(at)
            if pixels is None:
                pixels = self._segment(*at)
                if top + height > y1 - OVERLAP_ROWS and y1 < self.height:
                    self._kept[at] = pixels
            first, last = max(y0, top), min(y1, top + height)
            out[first - y0 : last - y0, left : left + width] = pixels[first - top : last - top]

        rows = range(y0 // height, (y1 - 1) // height + 1)
        wanted = sorted({at for first, end in columns for at in range(first // width, math.ceil(end / width))})
        self._each(fill, list(itertools.product(rows, wanted)))

    def _each(self, fill: Callable[[tuple[int, int]], None], segments: list[tuple[int, int]]) -> None:
        """Fill in all segments; the first error is raised when no thread works on any of them any more."""
        threads = min(MAX_DECODERS, available_cores(), len(segments))
        if threads == 1 or len(segments) * self._seg_height * self._seg_width < PARALLEL_PIXELS:
            for at in segments:
                fill(at)
            return
        self._pool = self._pool or concurrent.futures.ThreadPoolExecutor(MAX_DECODERS, "decoder")

        def fill_all(part: list[tuple[int, int]]) -> None:
            for at in part:
                fill(at)

        futures = [self._pool.submit(fill_all, segments[i::threads]) for i in range(threads)]
        concurrent.futures.wait(futures)
        for future in futures:
            future.result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._kept.clear()
        super().close()
