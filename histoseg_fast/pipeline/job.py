"""One image on its way through the pipeline: its bands, counts, outputs and what is reported of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast import _core
from histoseg_fast.engines.base import Slot, Wants
from histoseg_fast.errors import EngineError, HistosegError
from histoseg_fast.images import (
    GeojsonWriter,
    ImageSource,
    MaskWriter,
    OutlineOptions,
    OverlayWriter,
    ProbabilityWriter,
)
from histoseg_fast.labels import Palette
from histoseg_fast.pipeline.ring import Tile
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.postprocess import NO_STEPS, PostProcessing
from histoseg_fast.tiling import TileGrid, reflect_indices

OVERLAY_ALPHA = 90
"""Weight of the class colour in an overlay's tint, of 255."""
CONFIDENCE_ONE = 65535
"""The stitcher sums confidences as integers in this unit, so that sums do not depend on the tiles' order."""


@dataclass(frozen=True)
class Outputs:
    """Where results go and which are wanted. geojson: how to outline the classes, None for no such file."""

    folder: Path
    palette: Palette
    overlay: bool = False
    geojson: OutlineOptions | None = None
    probabilities: bool = False
    postprocess: PostProcessing = NO_STEPS

    @property
    def wants(self) -> Wants:
        """What the engine has to give for them."""
        return Wants(self.probabilities, self.postprocess.crf is not None)

    def paths(self, stem: str) -> dict[str, str]:
        """Output files of an image, relative to the folder, by their key in the manifest."""
        wanted = {"mask": f"masks/{stem}.png"}
        if self.overlay:
            wanted["overlay"] = f"overlays/{stem}.jpg"
        if self.geojson is not None:
            wanted["geojson"] = f"geojson/{stem}.geojson"
        if self.probabilities:
            wanted["probabilities"] = f"probabilities/{stem}.tif"
        return wanted


@dataclass
class Pixels:
    """Class ids uint8 (h, w) and, where they are needed, the image uint8 (h, w, 3) and logits float32 (C, h, w)."""

    classes: np.ndarray
    rgb: np.ndarray | None
    logits: np.ndarray | None

    def rows(self, first: int, last: int) -> Pixels:
        """A view of the rows from `first` to before `last`."""
        return Pixels(
            self.classes[first:last],
            None if self.rgb is None else self.rgb[first:last],
            None if self.logits is None else self.logits[:, first:last],
        )


@dataclass
class Band:
    """The cores of one row of tiles, filled tile by tile; then rows for the writers."""

    index: int
    pixels: Pixels
    probabilities: np.ndarray | None
    missing: int


@dataclass
class Job:
    """An image whose tiles are in the pipeline; `started` is when a reader took it, on the clock of perf_counter.

    With post-processing, which looks at the whole image, its bands are views of one array that is kept until the last
    is there; an image that is too large for a step goes without it, which `warnings` say.
    """

    source: Source
    image: ImageSource
    grid: TileGrid
    outputs: Outputs
    number: int
    error: HistosegError | None = None
    started: float = 0.0
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "engine": 0.0, "stitch": 0.0, "write": 0.0})

    def __post_init__(self) -> None:
        classes = len(self.outputs.palette.names)
        self.counts = np.zeros(classes, np.uint64)
        self.confidence = np.zeros(classes, np.uint64)
        wanted, pixels = self.outputs.postprocess, self.grid.height * self.grid.width
        self._steps = wanted.within(pixels)
        self._whole: Pixels | None = None
        self._bands: dict[int, Band] = {}
        self._writers: dict[str, MaskWriter | OverlayWriter | GeojsonWriter | ProbabilityWriter] = {}
        self._above: np.ndarray | None = None
        self._lock = threading.Lock()

    @property
    def warnings(self) -> list[str]:
        """What a reader of the results should know, one clause each."""
        wanted, pixels = self.outputs.postprocess, self.grid.height * self.grid.width
        if self._steps == wanted:
            return self.image.warnings
        return [*self.image.warnings, f"post-processed with {self._steps}, not {wanted}: it has {pixels} pixels"]

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

    def stitch(self, tile: Tile, slot: Slot, index: int) -> Band | None:
        """Crop and paste `tile`, which is done at place `index` of `slot`; the band, once it is whole."""
        row, core, columns = tile.row, tile.core, self.grid.columns[tile.column]
        band = self._bands.get(row) or self._new_band(row)
        target = slice(columns.core, columns.core_end)
        pixels = band.pixels
        probabilities = None if band.probabilities is None else band.probabilities[:, :, target]
        broken = slot.stitch(index, core, pixels.classes[:, target], self.counts, self.confidence, probabilities)
        if broken:
            raise EngineError(
                f"the network gave NaN or infinite logits at {broken} pixel(s)",
                where=self.source.name,
                fix="use --precision fp32",
            )
        if pixels.rgb is not None:
            pixels.rgb[:, target] = slot.input[index, core[0] : core[2], core[1] : core[3]]
        if pixels.logits is not None:
            assert slot.logits is not None
            pixels.logits[:, :, target] = slot.logits[index, :, core[0] : core[2], core[1] : core[3]]
        band.missing -= 1
        return self._bands.pop(row, None) if band.missing == 0 else None  # None too if it was abandoned meanwhile

    def _new_band(self, row: int) -> Band:
        rows, width = self.grid.rows[row], self.grid.width
        height = rows.core_end - rows.core
        if self._steps == NO_STEPS:
            pixels = self._allocate(height)
        else:
            whole = self._whole = self._whole or self._allocate(self.grid.height)
            pixels = whole.rows(rows.core, rows.core_end)
        probabilities = np.empty((len(self.counts), height, width), np.uint8) if self.outputs.probabilities else None
        self._bands[row] = Band(row, pixels, probabilities, len(self.grid.columns))
        return self._bands[row]

    def _allocate(self, height: int) -> Pixels:
        width, crf = self.grid.width, self._steps.crf is not None
        return Pixels(
            np.empty((height, width), np.uint8),
            np.empty((height, width, 3), np.uint8) if self.outputs.overlay or crf else None,
            np.empty((len(self.counts), height, width), np.float32) if crf else None,
        )

    def write(self, band: Band) -> bool:
        """Write one band, in order of rows; whether it was the last. Raises ImageError (disk full, no permission).

        With post-processing, mask, overlay and outlines are written with the last band.
        """
        last = band.index == len(self.grid.rows) - 1
        if not self._writers:
            self._open_writers()
        if band.probabilities is not None:
            self._writers["probabilities"].write_rows(band.probabilities)
        if self._whole is None:
            self._write_pixels(band.pixels)
        elif last:
            self._write_pixels(self._post_process(self._whole))
            self._whole = None
        return last

    def _post_process(self, whole: Pixels) -> Pixels:
        """The whole image after the steps; `counts` become those of the new classes."""
        if whole.logits is None:
            classes = self._steps.clean(whole.classes, len(self.counts))
        else:
            assert whole.rgb is not None
            classes = self._steps.apply(whole.rgb, whole.logits).ids
        self.counts = np.array([np.count_nonzero(classes == i) for i in range(len(self.counts))], np.uint64)
        return replace(whole, classes=classes)

    def _write_pixels(self, pixels: Pixels) -> None:
        self._writers["mask"].write_rows(pixels.classes)
        if self.outputs.geojson is not None:
            self._writers["geojson"].write_rows(pixels.classes)
        if self.outputs.overlay:
            rgb = pixels.rgb
            assert rgb is not None
            _core.tint(rgb, pixels.classes, self._above, self.outputs.palette.array, OVERLAY_ALPHA, rgb)
            self._above = pixels.classes[-1].copy()
            self._writers["overlay"].write_rows(rgb)

    def _open_writers(self) -> None:
        height, width, palette = self.grid.height, self.grid.width, self.outputs.palette
        outlines = self.outputs.geojson
        for kind, relative in self.outputs.paths(self.source.stem).items():
            path = self.outputs.folder / relative
            if kind == "mask":
                self._writers[kind] = MaskWriter(path, width, height, palette.array)
            elif kind == "overlay":
                self._writers[kind] = OverlayWriter(path, width, height)
            elif kind == "geojson":
                assert outlines is not None
                self._writers[kind] = GeojsonWriter(path, width, height, palette.names, palette.array, outlines)
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
            "level": self.image.level,
            "mpp": self.image.mpp,
            "pixels": {name: int(n) for name, n in zip(names, self.counts, strict=True)},
            "mean_confidence": round(int(self.confidence.sum()) / (CONFIDENCE_ONE * total), 9),
        }

    def abandon(self) -> None:
        """Remove what was half written."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        self._bands.clear()
        self._whole = None
