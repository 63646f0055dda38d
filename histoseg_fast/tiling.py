"""Pure geometry: which tiles cover an image, what halo they carry, which core of each is kept.

Along one axis an image of `n` pixels is padded at its far end to `padded_length(n)`, a multiple of the
network's stride, and covered by tiles of one common length. A tile carries `halo` pixels of context on each
side, except where it lies on the image's own edge: there the network's own zero padding does what it does
for the whole image, so the cores put side by side equal the whole-image result exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from histoseg_fast.errors import UsageError

CORE_SHARE = 0.7
"""Of the pixels of a large tile at least so many are its core."""
MAX_BAND_BYTES = 1 << 28
"""A row of large tiles may take so much memory: images wider than that allows are cut with the smaller ones."""

Core = tuple[int, int, int, int]
"""Top, left, bottom, right inside a tile, ends excluded."""


def padded_length(length: int, stride: int) -> int:
    """`length` rounded up to a multiple of `stride`."""
    return -(-length // stride) * stride


def reflect_indices(length: int, padded: int) -> np.ndarray:
    """Source index, int64 (padded,), of each position after reflection at the far end (numpy's "reflect").

    Where the padding is longer than the image, the reflection goes back and forth; one pixel is repeated.
    """
    period = max(2 * (length - 1), 1)
    i = np.arange(padded) % period
    return np.minimum(i, period - i)


def pad_to_stride(image: np.ndarray, stride: int) -> np.ndarray:
    """`image` (H, W, ...) reflected at its far edges to sides that are multiples of `stride`."""
    height, width = image.shape[:2]
    if height % stride == 0 and width % stride == 0:
        return image
    rows = reflect_indices(height, padded_length(height, stride))
    columns = reflect_indices(width, padded_length(width, stride))
    padded: np.ndarray = image[rows][:, columns]
    return padded


@dataclass(frozen=True)
class Span:
    """One tile along one axis: it reads [outer, outer_end) of the padded image and keeps [core, core_end)."""

    outer: int
    outer_end: int
    core: int
    core_end: int


def split_axis(length: int, tile: int, halo: int, stride: int) -> tuple[Span, ...]:
    """Cover `length` pixels (before padding) with the fewest tiles of at most `tile` pixels, halo included.

    All spans have the same outer length, the least that the count allows. Cores are disjoint and cover
    [0, length). Raises UsageError if `tile` leaves no core.
    """
    check_tile(tile, halo, stride)
    padded = padded_length(length, stride)
    tile = tile // stride * stride
    if padded <= tile:
        return (Span(0, padded, 0, length),)
    count = -(-(padded - 2 * halo) // (tile - 2 * halo))
    outer = padded_length(-(-(padded - 2 * halo) // count) + 2 * halo, stride)
    starts = [i * (outer - 2 * halo) for i in range(count - 1)] + [padded - outer]
    cores = [0] + [min(start + halo, length) for start in starts[1:]] + [length]
    return tuple(Span(s, s + outer, cores[i], cores[i + 1]) for i, s in enumerate(starts))


def least_tile(halo: int, stride: int) -> int:
    """The smallest tile, in pixels, that leaves a core of two strides between its halos.

    Less will not do: the rows that the far edge's reflection repeats must lie in the same tile.
    """
    return 2 * halo + 2 * stride


def check_tile(tile: int, halo: int, stride: int) -> None:
    """Raise UsageError if tiles of `tile` pixels leave too small a core between their halos."""
    if tile < least_tile(halo, stride):
        fix = f"this network needs --tile {least_tile(halo, stride)} or more"
        raise UsageError(f"a tile of {tile} pixels has no room between its halos", fix=fix)


def large_tile(tile: int, halo: int, stride: int) -> int:
    """The tile for images that `tile` would cut: so large that its core is `CORE_SHARE` of it.

    `tile` itself where that is enough: a larger one gains little then, and takes memory.
    """
    return max(tile, padded_length(math.ceil(2 * halo / (1 - math.sqrt(CORE_SHARE))), stride))


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one image: every row span with every column span, in raster order."""

    height: int
    width: int
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @classmethod
    def cover(cls, height: int, width: int, tile: int, halo: int, stride: int) -> TileGrid:
        """The grid for an image of `height` x `width` pixels; see `split_axis`."""
        return cls(height, width, split_axis(height, tile, halo, stride), split_axis(width, tile, halo, stride))

    @property
    def tile_shape(self) -> tuple[int, int]:
        """(height, width) of every tile, halo included."""
        return self.rows[0].outer_end - self.rows[0].outer, self.columns[0].outer_end - self.columns[0].outer

    def core(self, row: int, column: int) -> Core:
        """The part of tile (row, column) that is kept, in the tile's own coordinates."""
        down, across = self.rows[row], self.columns[column]
        top, left = down.core - down.outer, across.core - across.outer
        return top, left, down.core_end - down.outer, across.core_end - across.outer


@dataclass(frozen=True)
class Tiling:
    """How images are cut: by tiles of `tile` pixels a side, halo included; by `large` ones where those cut them."""

    tile: int
    large: int
    halo: int
    stride: int

    def grid(self, height: int, width: int) -> TileGrid:
        """The grid for an image of `height` x `width` pixels. Its result does not depend on the choice."""
        cut = max(height, width) > self.tile
        large = cut and 3 * self.large * padded_length(width, self.stride) <= MAX_BAND_BYTES
        return TileGrid.cover(height, width, self.large if large else self.tile, self.halo, self.stride)
