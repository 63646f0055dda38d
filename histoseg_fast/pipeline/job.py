"""One image on its way through the pipeline: its bands, counts, outputs and what is reported of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast import _core
from histoseg_fast.errors import EngineError, HistosegError
from histoseg_fast.images import ImageSource, MaskWriter, OverlayWriter, ProbabilityWriter
from histoseg_fast.labels import Palette
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.tiling import TileGrid, reflect_indices

OVERLAY_ALPHA = 90
"""Weight of the class colour in an overlay's tint, of 255."""
CONFIDENCE_ONE = 65535
"""The stitcher sums confidences as integers in this unit, so that sums do not depend on the tiles' order."""


@dataclass(frozen=True)
class Outputs:
    """Where results go and which are wanted."""

    folder: Path
    palette: Palette
    overlay: bool = False
    probabilities: bool = False

    def paths(self, stem: str) -> dict[str, str]:
        """Output files of an image, relative to the folder, by their key in the manifest."""
        wanted = {"mask": f"masks/{stem}.png"}
        if self.overlay:
            wanted["overlay"] = f"overlays/{stem}.jpg"
        if self.probabilities:
            wanted["probabilities"] = f"probabilities/{stem}.tif"
        return wanted


@dataclass
class Band:
    """The cores of one row of tiles, filled tile by tile; then rows for the writers."""

    index: int
    classes: np.ndarray
    rgb: np.ndarray | None
    probabilities: np.ndarray | None
    missing: int


@dataclass
class Job:
    """An image whose tiles are in the pipeline."""

    source: Source
    image: ImageSource
    grid: TileGrid
    outputs: Outputs
    number: int
    error: HistosegError | None = None
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "engine": 0.0, "stitch": 0.0, "write": 0.0})

    def __post_init__(self) -> None:
        classes = len(self.outputs.palette.names)
        self.counts = np.zeros(classes, np.uint64)
        self.confidence = np.zeros(classes, np.uint64)
        self._bands: dict[int, Band] = {}
        self._writers: dict[str, MaskWriter | OverlayWriter | ProbabilityWriter] = {}
        self._above: np.ndarray | None = None
        self._lock = threading.Lock()

    def fail(self, error: HistosegError) -> bool:
        """Record the first error of this image; whether this was it."""
        with self._lock:
            first, self.error = self.error is None, self.error or error
        return first

    def fill_band(self, row: int, out: np.ndarray) -> None:
        """Read what row `row` of the grid needs into `out`, uint8 (tile height, padded width, 3), far edges reflected.

        Rows come in order; the image is closed after the last, before any result of it can be finished.
        Raises ImageError, also if the file changed while it was read.
        """
        span, height, width = self.grid.rows[row], self.grid.height, self.grid.width
        last = min(span.outer_end, height)
        self.image.read_rows(span.outer, last, out[: last - span.outer, :width])
        if last < span.outer_end:
            out[last - span.outer :, :width] = out[reflect_indices(height, span.outer_end)[last:] - span.outer, :width]
        if width < out.shape[1]:
            out[:, width:] = out[:, reflect_indices(width, out.shape[1])[width:]]
        if row == len(self.grid.rows) - 1:
            self.image.close()

    def stitch(self, row: int, column: int, tile: np.ndarray, logits: np.ndarray) -> Band | None:
        """Crop and paste one tile (RGB uint8 (h, w, 3), logits float32 (C, h, w)); the band, once it is whole."""
        rows, columns = self.grid.rows[row], self.grid.columns[column]
        band = self._bands.get(row) or self._new_band(row)
        top, left = rows.core - rows.outer, columns.core - columns.outer
        core = (top, left, rows.core_end - rows.outer, columns.core_end - columns.outer)
        target = slice(columns.core, columns.core_end)
        probabilities = None if band.probabilities is None else band.probabilities[:, :, target]
        broken = _core.stitch(logits, core, band.classes[:, target], self.counts, self.confidence, probabilities)
        if broken:
            raise EngineError(
                f"the network gave NaN or infinite logits at {broken} pixel(s)",
                where=self.source.name,
                fix="use --precision fp32",
            )
        if band.rgb is not None:
            band.rgb[:, target] = tile[core[0] : core[2], core[1] : core[3]]
        band.missing -= 1
        return self._bands.pop(row, None) if band.missing == 0 else None  # None too if it was abandoned meanwhile

    def _new_band(self, row: int) -> Band:
        rows, width = self.grid.rows[row], self.grid.width
        height, classes = rows.core_end - rows.core, len(self.counts)
        self._bands[row] = Band(
            row,
            np.empty((height, width), np.uint8),
            np.empty((height, width, 3), np.uint8) if self.outputs.overlay else None,
            np.empty((classes, height, width), np.uint8) if self.outputs.probabilities else None,
            len(self.grid.columns),
        )
        return self._bands[row]

    def write(self, band: Band) -> bool:
        """Write one band, in order of rows; whether it was the last. Raises ImageError (disk full, no permission)."""
        if not self._writers:
            self._open_writers()
        self._writers["mask"].write_rows(band.classes)
        if band.rgb is not None:
            _core.tint(band.rgb, band.classes, self._above, self.outputs.palette.array, OVERLAY_ALPHA, band.rgb)
            self._above = band.classes[-1].copy()
            self._writers["overlay"].write_rows(band.rgb)
        if band.probabilities is not None:
            self._writers["probabilities"].write_rows(band.probabilities)
        return band.index == len(self.grid.rows) - 1

    def _open_writers(self) -> None:
        height, width, palette = self.grid.height, self.grid.width, self.outputs.palette
        for kind, relative in self.outputs.paths(self.source.stem).items():
            path = self.outputs.folder / relative
            if kind == "mask":
                self._writers[kind] = MaskWriter(path, width, height, palette.array)
            elif kind == "overlay":
                self._writers[kind] = OverlayWriter(path, width, height)
            else:
                self._writers[kind] = ProbabilityWriter(path, width, height, palette.names)

    def finish(self) -> dict[str, Any]:
        """Put the outputs in place; their manifest fields. Raises ImageError (disk full)."""
        files: dict[str, Any] = {}
        paths = self.outputs.paths(self.source.stem)
        for kind, writer in self._writers.items():
            files |= {kind: paths[kind], f"{kind}_sha256": writer.finish()}
        names, total = self.outputs.palette.names, int(self.counts.sum())
        return files | {
            "width": self.grid.width,
            "height": self.grid.height,
            "pixels": {name: int(n) for name, n in zip(names, self.counts, strict=True)},
            "mean_confidence": round(int(self.confidence.sum()) / (CONFIDENCE_ONE * total), 9),
        }

    def abandon(self) -> None:
        """Remove what was half written."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        self._bands.clear()
