"""Where a slide holds tissue: found on an overview of it, so that clean glass is neither read nor run.

A pixel of the overview is tissue where its darkest channel absorbs more than `threshold` (optical density) of the
slide's white, that is, lies under white * 10^-threshold. The stains of H&E absorb green above all, so that the palest
stroma is far from glass in that channel, whatever its brightness in red; so are pen, dust and shadows, which count as
tissue. White is the bright end (90th percentile of the brightest channel) of what can be glass at all: bright pixels
without much colour. It is never taken under `WHITE_FLOOR`, so that a slide of nothing but pale tissue is no glass, and
is 255 where nearly no pixel can be glass. Then a margin around all tissue is added, which closes gaps (lumens, fat)
narrower than two margins. Nothing that was found is ever taken away again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from histoseg_fast.images import ImageSource
from histoseg_fast.images.overview import overview_step, shrink
from histoseg_fast.tiling import Span, TileGrid, Tiling, padded_length, split_interval

DEFAULT_THRESHOLD = 0.03
"""Optical density under which a pixel is glass: of white 243, what is darker than 227 in no channel."""

MIN_THRESHOLD, MAX_THRESHOLD = 0.001, 1.0
"""What it can be set to."""

MARGIN = 128
"""Pixels of the slide that count as tissue around all tissue, at least one pixel of the overview."""

OVERVIEW_SIDE = 4096
"""Longest side of the overview that is read; masks are no finer than this."""

LEAST_STEP = 8
"""A mask pixel is at least this many pixels of the slide wide: means of 8 x 8 are free of the sensor's noise."""

GLASS_DARKEST, GLASS_CHROMA = 200, 16
"""What can be glass: no channel under the one, no two channels further apart than the other."""

GLASS_SHARE = 1e-3
"""With less of the overview than this that can be glass, white is 255."""

WHITE_FLOOR = 230

MOST_SHAPES = 16
"""Shapes of tiles that are tried on a slide, from square to low and wide: low rows leave out more glass."""


@dataclass(frozen=True)
class Tissue:
    """mask : bool (ceil(height / step), ceil(width / step)), where a slide holds tissue. step : pixels a mask pixel."""

    mask: np.ndarray
    step: int

    @classmethod
    def everywhere(cls, height: int, width: int) -> Tissue:
        """The mask of an image of this size on which nothing is known of glass."""
        step = overview_step(height, width, OVERVIEW_SIDE)
        return cls(np.ones((-(-height // step), -(-width // step)), bool), step)

    def grid(self, height: int, width: int, tiling: Tiling) -> TileGrid:
        """The tiles of a slide of this size whose cores cover all tissue; where they fit, those that compute least."""
        if not tiling.fitted or not self.mask.any():
            whole = tiling.grid(height, width)
            columns = tuple(
                tuple(span for span in whole.columns[0] if row[self._places(span)].any())
                for row in map(self._row, whole.rows)
            )
            return TileGrid(height, width, whole.rows, columns)
        side = tiling.side(height, width)
        step = padded_length(max((side - tiling.tile) // MOST_SHAPES, 1), tiling.stride)
        shapes = [(tall, tiling.large**2 // tall) for tall in range(side, tiling.tile - 1, -step)]
        return min((self._fitted(height, width, *shape, tiling) for shape in shapes), key=lambda grid: grid.pixels)

    def _fitted(self, height: int, width: int, tall: int, wide: int, tiling: Tiling) -> TileGrid:
        """Tiles of at most `tall` x `wide` pixels, in rows as high and as wide as tissue asks for."""
        rows = self._split(np.asarray(self.mask.any(axis=1)), height, tall, tiling)
        return TileGrid(height, width, rows, tuple(self._split(self._row(down), width, wide, tiling) for down in rows))

    def _row(self, down: Span) -> np.ndarray:
        """bool (mask width,): whether any mask pixel on the core of a row of tiles is set."""
        return np.asarray(self.mask[self._places(down)].any(axis=0))

    def _places(self, span: Span) -> slice:
        """The mask pixels that a core lies on; an empty one on none."""
        first, end = span.core, span.core_end
        return slice(first // self.step, -(-end // self.step) if end > first else first // self.step)

    def _split(self, mask: np.ndarray, length: int, side: int, tiling: Tiling) -> tuple[Span, ...]:
        """Tiles along an axis of `length` that cover what is set in `mask`, bool (mask length,)."""
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
        runs: list[tuple[int, int]] = []
        for first, end in edges.reshape(-1, 2) * self.step:
            first, end = first // tiling.stride * tiling.stride, min(padded_length(end, tiling.stride), length)
            if runs and first - runs[-1][1] <= 2 * tiling.halo:  # two halos would cost as much as what lies between
                first = runs.pop()[0]
            runs.append((int(first), int(end)))
        shape = side, tiling.halo, tiling.stride
        return tuple(span for first, end in runs for span in split_interval(first, end, length, *shape))


@dataclass(frozen=True)
class Overview:
    """A slide shrunk by `step`: uint8 (ceil(height / step), ceil(width / step), 3)."""

    rgb: np.ndarray
    step: int

    @classmethod
    def read(cls, image: ImageSource) -> Overview | None:
        """The overview of `image` in which tissue is looked for; None where it gives none. Raises ImageError."""
        step = overview_step(image.height, image.width, OVERVIEW_SIDE)
        rgb = image.overview(step)
        return None if rgb is None else cls(rgb, step)

    def shrunk(self, factor: int) -> Overview:
        """This overview, `factor` times smaller."""
        return Overview(shrink(self.rgb, factor), self.step * factor)


def find_tissue(overview: Overview, threshold: float = DEFAULT_THRESHOLD) -> Tissue:
    """The tissue on `overview`, with its margin. threshold : optical density, over 0."""
    small = overview.shrunk(-(-LEAST_STEP // overview.step))
    mask = _of_channels(np.minimum, small.rgb) < white_level(small.rgb) * 10**-threshold
    return Tissue(_grown(mask, -(-MARGIN // small.step)), small.step)


def white_level(rgb: np.ndarray) -> float:
    """The grey level of glass on an overview, uint8 (h, w, 3): `WHITE_FLOOR` to 255.

    Pure white is left out: it is what formats fill in where nothing was scanned.
    """
    darkest, brightest = _of_channels(np.minimum, rgb), _of_channels(np.maximum, rgb)
    glass = brightest[(darkest >= GLASS_DARKEST) & (brightest - darkest <= GLASS_CHROMA) & (darkest < 255)]
    if glass.size < GLASS_SHARE * darkest.size:
        return 255.0
    return max(float(np.percentile(glass, 90)), WHITE_FLOOR)


def _of_channels(choose: np.ufunc, rgb: np.ndarray) -> np.ndarray:
    """The least or the largest channel of each pixel, as `rgb.min(axis=2)` or `max` gives it, 25 times as fast."""
    chosen: np.ndarray = choose(choose(rgb[..., 0], rgb[..., 1]), rgb[..., 2])
    return chosen


def _grown(mask: np.ndarray, radius: int) -> np.ndarray:
    """`mask` and all within `radius` pixels of it, along both axes (a square)."""
    grown: np.ndarray = mask.copy()
    for view in (grown, grown.T):
        reach = 0
        while reach < radius:
            shift = min(reach + 1, radius - reach)  # nearer pixels are there already, so no gap is left
            before = view.copy()
            view[shift:] |= before[:-shift]
            view[:-shift] |= before[shift:]
            reach += shift
    return grown
