"""Resampling of an image that is read by bands: any cut into bands gives the same pixels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from histoseg_fast import _core
from histoseg_fast.images.source import ImageSource

BLOCK_BYTES = 64 * 2**20
"""Rows of the source are read in blocks of about this size."""


class Taps(NamedTuple):
    """Along one axis: output i is the mean of the sources first[i] to first[i] + k - 1, weighted by weights[i].

    first : int32 (n). weights : uint16 (n, k), each row adding up to `_core.resample_one`.
    """

    first: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, size: int, out: int, scale: float) -> Taps:
        """Output i covers the sources from i * scale to (i + 1) * scale, as far as there are any of the `size`.

        From a scale of 1 on, weights are the shares of that span (area averaging). Below it, two neighbours are
        interpolated linearly.
        """
        at = np.arange(out, dtype=np.float64)
        if scale >= 1:
            low = np.minimum(at * scale, size - 1)
            high = np.clip((at + 1) * scale, low + 0.5, size)
            first = np.floor(low)
            sources = first[:, None] + np.arange(int(np.ceil(scale)) + 1)
            shares = np.minimum(sources + 1, high[:, None]) - np.maximum(sources, low[:, None])
        else:
            centre = np.clip((at + 0.5) * scale - 0.5, 0, size - 1)
            first = np.floor(centre)
            shares = np.stack([1 - (centre - first), centre - first], axis=1)
        return cls(first.astype(np.int32), _fixed(np.maximum(shares, 0)))


def _fixed(shares: np.ndarray) -> np.ndarray:
    """Shares as whole numbers that add up: what is rounded is their running sum."""
    sums = np.cumsum(shares, axis=1)
    return np.diff(np.rint(sums * (_core.resample_one / sums[:, -1:])), prepend=0.0).astype(np.uint16)


class Resampler:
    """The grid of `height` x `width` pixels over `source`, `scale` (down, across) source pixels a pixel.

    Memory: a block of source rows, and what a pixel's height of them needs where that is more.
    """

    def __init__(self, source: ImageSource, height: int, width: int, scale: tuple[float, float]):
        self._source = source
        self._rows = Taps.of(source.height, height, scale[0])
        self._columns = Taps.of(source.width, width, scale[1])
        last = self._rows.first + self._rows.weights.shape[1]
        self._ends = np.minimum(last, source.height)
        self._step = max(1, int(BLOCK_BYTES / (source.width * 3 * scale[0])))

    def read(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]] | None = None) -> None:
        """Fill `out`, uint8 (y1 - y0, width, 3) of packed pixels, or `columns` of it, with these rows.

        Raises what the source raises.
        """
        columns = ((0, len(self._columns.first)),) if columns is None else columns
        taps = self._columns.weights.shape[1]
        reaches = [
            (int(self._columns.first[first]), min(int(self._columns.first[end - 1]) + taps, self._source.width))
            for first, end in columns
        ]
        spans = _joined(reaches)
        for top in range(y0, y1, self._step):
            bottom = min(top + self._step, y1)
            first, end = int(self._rows.first[top]), int(self._ends[bottom - 1])
            block = np.empty((end - first, self._source.width, 3), np.uint8)
            self._source.read_rows(first, end, block, spans)
            rows = self._rows.first[top:bottom] - np.int32(first), self._rows.weights[top:bottom]
            for (left, right), (near, far) in zip(columns, reaches, strict=True):  # rows are summed in these alone
                across = self._columns.first[left:right] - np.int32(near), self._columns.weights[left:right]
                _core.resample(block[:, near:far], *rows, *across, out[top - y0 : bottom - y0, left:right])


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans from left to right, those that overlap made one."""
    joined: list[tuple[int, int]] = []
    for first, end in spans:
        if joined and first < joined[-1][1]:
            first = joined.pop()[0]
        joined.append((first, end))
    return joined
