"""Polygons back to pixels, for tests: a pixel is what its centre lies in (even-odd), by plain arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

Rings = list[list[list[float]]]


def inside(rings: Rings, height: int, width: int) -> np.ndarray:
    """bool (height, width): the pixels whose centre lies in the polygon of `rings`, [x, y] points in pixels."""
    crossings = np.zeros((height, width + 1), np.int64)
    for ring in rings:
        for (x0, y0), (x1, y1) in itertools.pairwise(ring):
            if y0 == y1:
                continue
            rows = np.arange(int(np.ceil(min(y0, y1) - 0.5)), int(np.ceil(max(y0, y1) - 0.5)))
            across = x0 + (rows + 0.5 - y0) * (x1 - x0) / (y1 - y0)
            crossings[rows, np.ceil(across - 0.5).astype(int)] += 1
    return crossings[:, :width].cumsum(1) % 2 == 1


def rasterise(polygons: Iterable[tuple[int, Rings]], height: int, width: int) -> np.ndarray:
    """uint8 (height, width): the class of each pixel, 0 where there is no polygon. No pixel may lie in two."""
    ids, covered = np.zeros((height, width), np.uint8), np.zeros((height, width), np.uint8)
    for number, rings in polygons:
        mask = inside(rings, height, width)
        ids[mask] = number
        covered += mask
    assert covered.max() <= 1
    return ids
