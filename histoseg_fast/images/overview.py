"""A whole slide at a glance: a small picture with the class tint over it."""

from __future__ import annotations

import hashlib
import os

import imagecodecs
import numpy as np

from histoseg_fast import _core
from histoseg_fast.images.writing import BandWriter
from histoseg_fast.labels import Palette

OVERVIEW_MAX_SIDE = 2048
"""Longest side of an overview; larger images are shrunk by the smallest whole factor that fits."""


def overview_step(height: int, width: int, max_side: int = OVERVIEW_MAX_SIDE) -> int:
    """The smallest whole factor by which an image of this size shrinks to at most `max_side` pixels a side."""
    return -(-max(height, width) // max_side)


def shrink(rgb: np.ndarray, factor: int) -> np.ndarray:
    """`rgb`, uint8 (h, w, 3), as means of `factor` x `factor` pixels: uint8 (ceil(h / factor), ceil(w / factor), 3).

    Blocks that the far edges cut are means of what they hold.
    """
    if factor == 1:
        return rgb
    height, width = rgb.shape[:2]
    starts = np.arange(0, width, factor)
    across = np.diff(starts, append=width)[:, None].astype(np.uint32)
    out = np.empty((-(-height // factor), len(starts), 3), np.uint8)
    for i in range(len(out)):
        rows = rgb[i * factor : (i + 1) * factor]
        sums, counts = np.add.reduceat(rows.sum(axis=0, dtype=np.uint32), starts), across * len(rows)
        out[i] = (sums + counts // 2) // counts
    return out


class OverviewWriter(BandWriter):
    """An RGB PNG: the slide tinted and outlined by class, or the classes' own colours where there is no picture of it.

    Its pixel (y, x) has the class of pixel (y * step, x * step) of the class map.

    rgb : uint8 (ceil(height / step), ceil(width / step), 3), the slide shrunk by `step`, or None; it is drawn upon.
    alpha : weight of the class colour, of 255.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        palette: Palette,
        alpha: int,
        step: int,
        rgb: np.ndarray | None,
    ):
        shape = -(-height // step), -(-width // step)
        if rgb is not None and (rgb.dtype != np.uint8 or rgb.shape != (*shape, 3)):
            raise ValueError(f"the picture is {rgb.dtype} {rgb.shape}, not uint8 {(*shape, 3)}")
        super().__init__(path, width, height)
        self._palette, self._alpha, self._step, self._rgb = palette, alpha, step, rgb
        self._ids = np.empty(shape, np.uint8)

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8 class ids, (h, width), any strides."""
        start, step = self._row, self._step
        self._take(rows, (0, self.width), 0)
        first = -(-start // step)
        kept = rows[first * step - start :: step, ::step]
        self._ids[first : first + len(kept)] = kept

    def _complete(self) -> str:
        rgb, colours = self._rgb, self._palette.array
        if rgb is None:
            rgb = _core.encode_labels(self._ids, colours)
        else:
            _core.tint(rgb, self._ids, None, colours, self._alpha, rgb)
        data = imagecodecs.png_encode(rgb, level=3)
        self._stream.write(data)
        return hashlib.sha256(data).hexdigest()
