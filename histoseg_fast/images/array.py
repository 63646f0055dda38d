"""An image that is in memory already, behind the interface of those in files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from histoseg_fast.images.slide import Resolution
from histoseg_fast.images.source import MAX_SIDE, ImageSource


class ArraySource(ImageSource):
    """An array, RGB uint8 (H, W, 3) of any strides, read as it is; it has no digest, and must not change meanwhile.

    Raises ImageError for any other array, or where `resolution` asks for a level or a size of pixels.
    """

    format = "array"

    def __init__(self, pixels: np.ndarray, resolution: Resolution):
        self.path, self.size_bytes, self.sha256, self.warnings = Path("array"), pixels.nbytes, "", []
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            self._refuse(f"is {pixels.dtype} {pixels.shape}, not RGB uint8 (height, width, 3)", "convert it")
        if not all(0 < side <= MAX_SIDE for side in pixels.shape[:2]):
            self._refuse(f"has the shape {pixels.shape}", f"sides of 1 to {MAX_SIDE:,} pixels are allowed")
        if resolution.mpp is not None or resolution.level:
            self._refuse("an array has no levels and states no micrometres a pixel", "leave mpp and level out")
        self.height, self.width = pixels.shape[:2]
        self._pixels = pixels

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        out[...] = self._pixels[y0:y1]

    def close(self) -> None:
        """Nothing: the array is the caller's."""
