"""One image on its way through the pipeline: its bands, counts, outputs and what is reported of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from histoseg_fast import _core
from histoseg_fast.engines.base import Slot
from histoseg_fast.errors import EngineError, HistosegError
from histoseg_fast.images import ImageSource, write_png
from histoseg_fast.images.overview import overview_step
from histoseg_fast.pipeline.outputs import OVERLAY_ALPHA, Outputs, Writer
from histoseg_fast.pipeline.ring import Tile
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.pipeline.tissue import Overview, Tissue, find_tissue
from histoseg_fast.postprocess import NO_STEPS
from histoseg_fast.tiling import TileGrid, Tiling, reflect_rows

CONFIDENCE_ONE = 65535
"""The stitcher sums confidences as integers in this unit, so that sums do not depend on the tiles' order."""

GLASS_ROWS = 256
"""Rows of glass that are handed to the writers at once."""
GLASS_LOGIT = 20.0
"""The background's logit on glass, the others' being 0, where a step wants logits."""
NO_OVERVIEW = "it has no small level to find glass on, so all of it was segmented"


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

    Of a slide, glass never enters the pipeline: its pixels are background by definition. Bands exist for the rows of
    tiles that hold some tissue; `write` puts glass in between, and `glass_band` stands for a slide of nothing else.

    writer : which of the stream's writers has it. grid : covers the image, until `look_for_glass`.
    """

    source: Source
    image: ImageSource
    grid: TileGrid
    outputs: Outputs
    number: int
    writer: int | None = None
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
        self._writers: dict[str, Writer] = {}
        self._overview: Overview | None = None
        self._tissue: Tissue | None = None
        self._next_row = 0
        self._above: np.ndarray | None = None
        self._lock = threading.Lock()

    @property
    def warnings(self) -> list[str]:
        """What a reader of the results should know, one clause each."""
        wanted, pixels = self.outputs.postprocess, self.grid.height * self.grid.width
        warnings = list(self.image.warnings)
        if self._tissue is not None and self._overview is None:
            warnings.append(NO_OVERVIEW)
        if self._steps != wanted:
            warnings.append(f"post-processed with {self._steps}, not {wanted}: it has {pixels} pixels")
        return warnings

    def look_for_glass(self, tiling: Tiling) -> None:
        """Read the overview of a slide and choose the tiles that are run; before any of them is.

        Raises ImageError.
        """
        height, width = self.grid.height, self.grid.width
        overview = Overview.read(self.image)
        if self.outputs.tissue_threshold is not None:
            if overview is None:
                self._tissue = Tissue.everywhere(height, width)
            else:
                self._tissue = find_tissue(overview, self.outputs.tissue_threshold)
            self.grid = self._tissue.grid(height, width, tiling)
        if overview is not None:  # the large one is not kept
            self._overview = overview.shrunk(overview_step(*overview.rgb.shape[:2]))

    @cached_property
    def rows(self) -> list[int]:
        """The rows of the grid that hold tissue; the others are neither read nor run."""
        return [row for row, columns in enumerate(self.grid.columns) if columns]

    @cached_property
    def glass_pixels(self) -> int:
        """Pixels that are not run."""
        return sum((bottom - top) * (right - left) for top, left, bottom, right in self.grid.glass())

    def fail(self, error: HistosegError) -> bool:
        """Record the first error of this image; whether this was it."""
        with self._lock:
            first, self.error = self.error is None, self.error or error
        return first

    def fill_band(self, row: int, out: np.ndarray) -> None:
        """Read what row `row` of the grid needs into `out`, uint8 (tile height, padded width, 3), far edges reflected.

        What lies under no tile of the row that is run is undefined. The rows in `rows` come in order; the image is
        closed after the last, before any result of it can be finished.
        Raises ImageError, also if the file changed while it was read.
        """
        span, height, width = self.grid.rows[row], self.grid.height, self.grid.width
        last = min(span.outer_end, height)
        self.image.read_rows(span.outer, last, out[: last - span.outer, :width], self._columns(row))
        if last < span.outer_end:
            reflect_rows(out[:, :width], height, span.outer)
        if width < out.shape[1]:
            reflect_rows(out.swapaxes(0, 1), width)
        if row == self.rows[-1]:
            self.image.close()

    def _columns(self, row: int) -> list[tuple[int, int]] | None:
        """The spans of pixels that the tiles of `row` need, halos included; None for all of them."""
        spans: list[tuple[int, int]] = []
        for across in self.grid.columns[row]:
            first, end = across.outer, min(across.outer_end, self.grid.width)
            if spans and first <= spans[-1][1]:
                first = spans.pop()[0]
            spans.append((first, end))
        return None if spans == [(0, self.grid.width)] else spans

    def stitch(self, tile: Tile, slot: Slot, index: int) -> Band | None:
        """Crop and paste `tile`, which is done at place `index` of `slot`; the band, once it is whole."""
        row, core, columns = tile.row, tile.core, self.grid.columns[tile.row][tile.column]
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
        rows, columns = self.grid.rows[row], self.grid.columns[row]
        height = rows.core_end - rows.core
        partly = sum(across.core_end - across.core for across in columns) < self.grid.width
        if self._steps == NO_STEPS:
            pixels = self._allocate(height, glass=partly)
        else:
            glass = self.glass_pixels > 0
            whole = self._whole = self._whole or self._allocate(self.grid.height, glass=glass)
            pixels = whole.rows(rows.core, rows.core_end)
        probabilities = self._allocate_probabilities(height, glass=partly)
        self._bands[row] = Band(row, pixels, probabilities, len(columns))
        return self._bands[row]

    def glass_band(self) -> Band:
        """The one band of a slide without tissue, for `write`."""
        self._new_band(0)
        return self._bands.pop(0)

    def _allocate(self, height: int, *, glass: bool) -> Pixels:
        """Rows for tiles to be pasted into; where some of it is `glass`, all is at first: white, background."""
        width, crf = self.grid.width, self._steps.crf is not None
        classes = np.zeros((height, width), np.uint8) if glass else np.empty((height, width), np.uint8)
        rgb = np.empty((height, width, 3), np.uint8) if self.outputs.overlay or crf else None
        logits = np.empty((len(self.counts), height, width), np.float32) if crf else None
        if glass and rgb is not None:
            rgb[...] = 255
        if glass and logits is not None:
            logits[0], logits[1:] = GLASS_LOGIT, 0
        return Pixels(classes, rgb, logits)

    def _allocate_probabilities(self, height: int, *, glass: bool) -> np.ndarray | None:
        if not self.outputs.probabilities:
            return None
        probabilities = np.empty((len(self.counts), height, self.grid.width), np.uint8)
        if glass:
            probabilities[0], probabilities[1:] = 255, 0
        return probabilities

    def write(self, band: Band) -> bool:
        """Write one band, in order of rows, and the glass beside it; whether it was the last.

        With post-processing, all but probabilities is written with the last band. Raises ImageError (disk full, no
        permission).
        """
        last = band.index == (self.rows[-1] if self.rows else 0)
        if not self._writers:
            self._open_writers()
        self._write_glass(self.grid.rows[band.index].core)
        self._write_rows(band.pixels, band.probabilities)
        if last:
            self._write_glass(self.grid.height)
            self.counts[0] += np.uint64(self.glass_pixels)
            if self._whole is not None:
                self._write_pixels(self._post_process(self._whole))
                self._whole = None
        return last

    def _write_glass(self, end: int) -> None:
        """Glass from the next row to before row `end`."""
        while self._next_row < end:
            height = min(GLASS_ROWS, end - self._next_row)
            probabilities = self._allocate_probabilities(height, glass=True)
            self._write_rows(self._allocate(height, glass=True), probabilities)

    def _write_rows(self, pixels: Pixels, probabilities: np.ndarray | None) -> None:
        if probabilities is not None:
            self._writers["probabilities"].write_rows(probabilities)
        if self._whole is None:
            self._write_pixels(pixels)
        self._next_row += len(pixels.classes)

    def _post_process(self, whole: Pixels) -> Pixels:
        """The whole image after the steps, glass as it was; `counts` become those of the new classes."""
        if whole.logits is None:
            classes = self._steps.clean(whole.classes, len(self.counts))
        else:
            assert whole.rgb is not None
            classes = self._steps.apply(whole.rgb, whole.logits).ids
        for top, left, bottom, right in self.grid.glass():
            classes[top:bottom, left:right] = 0
        self.counts = np.array([np.count_nonzero(classes == i) for i in range(len(self.counts))], np.uint64)
        return replace(whole, classes=classes)

    def _write_pixels(self, pixels: Pixels) -> None:
        self._writers["mask"].write_rows(pixels.classes)
        if self.outputs.geojson is not None:
            self._writers["geojson"].write_rows(pixels.classes)
        if "overview" in self._writers:
            self._writers["overview"].write_rows(pixels.classes)
        if self.outputs.overlay:
            rgb = pixels.rgb
            assert rgb is not None
            _core.tint(rgb, pixels.classes, self._above, self.outputs.palette.array, OVERLAY_ALPHA, rgb)
            self._above = pixels.classes[-1].copy()
            self._writers["overlay"].write_rows(rgb)

    def _open_writers(self) -> None:
        for kind, path in self._paths().items():
            if kind != "tissue":
                self._writers[kind] = self.outputs.open_writer(kind, path, self.image, self._overview)

    def _paths(self) -> dict[str, str]:
        return self.outputs.paths(self.source.stem, slide=self.image.slide)

    def finish(self) -> dict[str, Any]:
        """Put the outputs in place; their manifest fields. Raises ImageError (disk full, a store out of reach)."""
        files: dict[str, Any] = {}
        paths = self._paths()
        for kind, writer in self._writers.items():
            files |= {kind: paths[kind], f"{kind}_sha256": writer.finish()}
        if self._tissue is not None and "tissue" in paths:
            mask = np.where(self._tissue.mask, np.uint8(255), np.uint8(0))
            files |= {
                "tissue": paths["tissue"],
                "tissue_sha256": write_png(self.outputs.folder / paths["tissue"], mask),
            }
        self.outputs.publish(paths.values())
        names, segmented = self.outputs.palette.names, self.grid.height * self.grid.width - self.glass_pixels
        confidence = int(self.confidence.sum()) / (CONFIDENCE_ONE * segmented) if segmented else None
        return files | {
            "width": self.grid.width,
            "height": self.grid.height,
            "level": self.image.level,
            "mpp": self.image.mpp,
            "pixels": {name: int(n) for name, n in zip(names, self.counts, strict=True)},
            "glass_pixels": self.glass_pixels,
            "mean_confidence": None if confidence is None else round(confidence, 9),
        }

    def abandon(self) -> None:
        """Remove what was half written."""
        for writer in self._writers.values():
            writer.abort()
        self._writers.clear()
        self._bands.clear()
        self._whole = None
