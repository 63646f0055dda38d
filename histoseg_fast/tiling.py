"""Pure geometry: which tiles cover an image, what halo they carry, which core of each is kept.

Along one axis an image of `n` pixels is padded at its far end to `padded_length(n)`, a multiple of the
network's stride, and covered by tiles of one common length. A tile carries `halo` pixels of context on each
side, except where it lies on the image's own edge: there the network's own zero padding does what it does
for the whole image, so the cores put side by side equal the whole-image result exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from histoseg_fast.errors import UsageError

CORE_SHARE = 0.785
"""Of the pixels of a large tile at least so many are its core, where `MAX_LARGE_PIXELS` allow it."""
MAX_LARGE_PIXELS = 8_000_000
"""Of a large tile: the engine's memory grows with them, some 55 bytes a pixel and batch in flight for `fast`."""
MAX_BAND_BYTES = 5 << 26
"""A row of large tiles may take so much memory: wider images are cut by smaller ones."""

Core = tuple[int, int, int, int]
"""Top, left, bottom, right, ends excluded."""


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


def reflect_rows(rows: np.ndarray, length: int, start: int = 0) -> None:
    """Fill `rows` (N, ...) beyond the last of an image's `length` rows by reflection; `rows[0]` is its row `start`.

    What is reflected must lie in `rows`. Views do for other axes.
    """
    end, missing = start + len(rows), start + len(rows) - length
    if missing < length - start:
        rows[length - start :] = rows[length - start - 1 - missing : length - start - 1][::-1]
    else:
        rows[length - start :] = rows[reflect_indices(length, end)[length:] - start]


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


def split_interval(first: int, end: int, length: int, tile: int, halo: int, stride: int) -> tuple[Span, ...]:
    """As `split_axis`, for the pixels [first, end) of an axis of `length` alone: multiples of the stride, or its ends.

    Cores cover just these pixels, or, at the far end, some more before them: see `least_tile`.
    """
    padded = padded_length(length, stride)
    if end == length:
        first = min(first, max(padded - 2 * stride, 0))
    outer, outer_end = max(first - halo, 0), min(padded_length(end, stride) + halo, padded)
    return tuple(
        Span(s.outer + outer, s.outer_end + outer, max(s.core + outer, first), min(s.core_end + outer, end))
        for s in split_axis(outer_end - outer, tile, halo, stride)
    )


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
    wanted = padded_length(math.ceil(2 * halo / (1 - math.sqrt(CORE_SHARE))), stride)
    return max(tile, min(wanted, math.isqrt(MAX_LARGE_PIXELS) // stride * stride))


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one image in raster order: rows, and the columns of each. What no core covers is glass, not run."""

    height: int
    width: int
    rows: tuple[Span, ...]
    columns: tuple[tuple[Span, ...], ...]

    @classmethod
    def cover(cls, height: int, width: int, tile: int, halo: int, stride: int) -> TileGrid:
        """The grid that covers an image of `height` x `width` pixels; see `split_axis`."""
        rows, columns = split_axis(height, tile, halo, stride), split_axis(width, tile, halo, stride)
        return cls(height, width, rows, (columns,) * len(rows))

    @property
    def tiles(self) -> int:
        """How many there are."""
        return sum(map(len, self.columns))

    @property
    def pixels(self) -> int:
        """What is computed: the pixels of all tiles, halo included."""
        return sum(
            (down.outer_end - down.outer) * (across.outer_end - across.outer)
            for down, columns in zip(self.rows, self.columns, strict=True)
            for across in columns
        )

    @property
    def whole_rows(self) -> bool:
        """Whether each row is one tile that reads all of the image's width."""
        return all(
            len(spans) == 1 and spans[0].outer == 0 and spans[0].outer_end >= self.width for spans in self.columns
        )

    def tile_shape(self, row: int, column: int) -> tuple[int, int]:
        """(height, width) of a tile, halo included."""
        down, across = self.rows[row], self.columns[row][column]
        return down.outer_end - down.outer, across.outer_end - across.outer

    def core(self, row: int, column: int) -> Core:
        """The part of tile (row, column) that is kept, in the tile's own coordinates."""
        down, across = self.rows[row], self.columns[row][column]
        top, left = down.core - down.outer, across.core - across.outer
        return top, left, down.core_end - down.outer, across.core_end - across.outer

    def glass(self) -> Iterator[Core]:
        """What no core covers, as rectangles of the image."""
        bottom = 0
        for down, columns in zip(self.rows, self.columns, strict=True):
            if bottom < down.core:
                yield bottom, 0, down.core, self.width
            bottom, right = down.core_end, 0
            for across in columns:
                if right < across.core:
                    yield down.core, right, down.core_end, across.core
                right = across.core_end
            if right < self.width:
                yield down.core, right, down.core_end, self.width
        if bottom < self.height:
            yield bottom, 0, self.height, self.width


@dataclass(frozen=True)
class Tiling:
    """How images are cut: by tiles of `tile` pixels a side, halo included; up to `large` ones where those cut them.

    fitted : whether the tiles of slides fit around tissue, of many shapes; else they are those of the grid that covers
    the slide, all of one shape.
    """

    tile: int
    large: int
    halo: int
    stride: int
    fitted: bool = False

    def side(self, height: int, width: int) -> int:
        """The tile size for an image. Its result does not depend on the choice."""
        if max(height, width) <= self.tile:
            return self.tile
        most = MAX_BAND_BYTES // (3 * padded_length(width, self.stride)) // self.stride * self.stride
        return max(self.tile, min(self.large, most))

    def grid(self, height: int, width: int) -> TileGrid:
        """The grid that covers an image of `height` x `width` pixels."""
        return TileGrid.cover(height, width, self.side(height, width), self.halo, self.stride)
