"""Which results of an image are wanted and where they go; by default to files in a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from histoseg_fast.engines.base import Wants
from histoseg_fast.images import (
    GeojsonWriter,
    ImageSource,
    MaskWriter,
    OutlineOptions,
    OverlayWriter,
    OverviewWriter,
    ProbabilityWriter,
    PyramidWriter,
)
from histoseg_fast.images.overview import overview_step
from histoseg_fast.labels import Palette
from histoseg_fast.pipeline.records import digest_of
from histoseg_fast.pipeline.remote import Remote
from histoseg_fast.pipeline.tissue import DEFAULT_THRESHOLD, Overview
from histoseg_fast.postprocess import NO_STEPS, PostProcessing

OVERLAY_ALPHA = 90
"""Weight of the class colour in an overlay's tint, of 255."""

SLIDE_MASK_SUFFIX = ".ome.tif"


class Writer(Protocol):
    """Takes one result of an image row by row; see `BandWriter`, which writes files."""

    def write_rows(self, rows: npt.NDArray[np.uint8], /) -> None:
        """Take the next rows, uint8, of any strides."""

    def finish(self) -> str:
        """Put the whole result in place; the hex SHA-256 of its file, or "" where it is none."""

    def abort(self) -> None:
        """Leave nothing of it."""


class Ledger(Protocol):
    """Where it is noted what became of each image; see `Manifest`, which is a file."""

    def add(self, entry: dict[str, Any], /) -> None:
        """Note the entry of one image, "done" or "failed"."""

    def complete(
        self, name: str, sha256: str, key: str, paths: Mapping[str, str], digest: Callable[[str], str | None], /
    ) -> bool:
        """Whether nothing is left to do for an image; `digest` is that of `Outputs`."""


@dataclass(frozen=True)
class Outputs:
    """Where results go and which are wanted. geojson : how to outline the classes, None for no such file.
    tissue_threshold : as `find_tissue` reads it; None segments glass too. remote : where files go from the folder, if
    that is not where they stay.
    """

    folder: Path
    palette: Palette
    overlay: bool = False
    geojson: OutlineOptions | None = None
    probabilities: bool = False
    postprocess: PostProcessing = NO_STEPS
    tissue_threshold: float | None = DEFAULT_THRESHOLD
    remote: Remote | None = None

    @property
    def wants(self) -> Wants:
        """What the engine has to give for them."""
        return Wants(self.probabilities, self.postprocess.crf is not None)

    def paths(self, stem: str, *, slide: bool) -> dict[str, str]:
        """Output files of an image, relative to the folder, by their key in the manifest."""
        wanted = {"mask": f"masks/{stem}{SLIDE_MASK_SUFFIX}" if slide else f"masks/{stem}.png"}
        if slide:
            wanted["overview"] = f"overviews/{stem}.png"
        if slide and self.tissue_threshold is not None:
            wanted["tissue"] = f"tissue/{stem}.png"
        if self.overlay:
            wanted["overlay"] = f"overlays/{stem}.jpg"
        if self.geojson is not None:
            wanted["geojson"] = f"geojson/{stem}.geojson"
        if self.probabilities:
            wanted["probabilities"] = f"probabilities/{stem}.tif"
        return wanted

    def digest(self, path: str) -> str | None:
        """Hex SHA-256 of one of `paths` as it stands; None where it cannot be read."""
        return digest_of(self.folder / path) if self.remote is None else self.remote.digest(path)

    def publish(self, paths: Iterable[str]) -> None:
        """Move files that are finished to where they stay. Raises ImageError."""
        if self.remote is not None:
            files = {path: self.folder / path for path in paths}
            try:
                for path, file in files.items():
                    self.remote.put(file, path)
            finally:
                for file in files.values():
                    file.unlink(missing_ok=True)

    def open_writer(self, kind: str, name: str, image: ImageSource, overview: Overview | None) -> Writer:
        """The writer of one of `paths`, not "tissue", of `image`. Raises ImageError (disk full, no permission)."""
        path, height, width, palette = self.folder / name, image.height, image.width, self.palette
        if kind == "mask" and image.slide:
            return PyramidWriter(path, width, height, palette, image.mpp)
        if kind == "mask":
            return MaskWriter(path, width, height, palette.array)
        if kind == "overview":
            step, rgb = overview_step(height, width), None
            if overview is not None:
                step, rgb = overview.step, overview.rgb
            return OverviewWriter(path, width, height, palette, OVERLAY_ALPHA, step, rgb)
        if kind == "geojson":
            assert self.geojson is not None
            return GeojsonWriter(path, width, height, palette.names, palette.array, self.geojson, image.scale)
        if kind == "overlay":
            return OverlayWriter(path, width, height)
        return ProbabilityWriter(path, width, height, palette.names)
