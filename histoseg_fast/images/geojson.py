"""Class maps as outlines: GeoJSON that QuPath opens as annotations."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from histoseg_fast import _core
from histoseg_fast.images.writing import BandWriter

MIN_AREA = 4
"""Pieces and holes of fewer pixels are left out by default: specks."""

TRACED_ROWS = 256
"""Rows that are traced at once: what ends in them waits in memory as text."""

PIECES = uuid.UUID("5e6c1d0f-37bb-5a0e-9f5e-0d1a6b1f1c52")
"""Name space of the pieces' ids (RFC 9562, version 5)."""


@dataclass(frozen=True)
class OutlineOptions:
    """min_area: pieces and holes of fewer pixels are left out. exact: outlines follow the edges of pixels; else they
    are simplified by up to half a pixel, and no pixel's centre changes sides.
    """

    min_area: int = MIN_AREA
    exact: bool = False


class GeojsonWriter(BandWriter):
    """A GeoJSON FeatureCollection of annotations for QuPath: a Polygon with its holes for each piece, which is
    connected pixels (by edges) of one class; class 0, the background, is left out.

    names, colours : of the classes by id; colours uint8 (n, 3). scale : level-0 pixels of the slide (down, across) in a
    pixel of the class map (1/4 to 2^20; below 1 where the image was enlarged); coordinates are level-0 pixels, (0, 0)
    the top left corner of the image. Neighbours share their outline point by point. Outer rings run counterclockwise by
    their coordinates, holes clockwise, as RFC 7946 wants it. Bytes depend on the class map and the arguments alone; a
    piece's id on its class and outline. Memory grows with the length of the outlines that are not closed yet, not with
    the image's area.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        height: int,
        names: Sequence[str],
        colours: np.ndarray,
        options: OutlineOptions,
        scale: tuple[float, float] = (1.0, 1.0),
    ):
        self._classes = [
            json.dumps({"name": name, "color": colour}).encode("ascii")
            for name, colour in zip(names, np.asarray(colours).tolist(), strict=True)
        ]
        super().__init__(path, width, height)
        self._digest = hashlib.sha256()
        self._separator = b"\n"
        with self._told():
            self._tracer = _core.Outlines(width, options.min_area, not options.exact, scale)
            self._write(b'{"type": "FeatureCollection", "features": [')

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8 class ids, (h, width), any strides."""
        if rows.size and (highest := int(rows.max())) >= len(self._classes):
            raise ValueError(f"class id {highest} has no name among {len(self._classes)}")
        self._take(rows, (0, self.width), 0)
        with self._told():
            for start in range(0, len(rows), TRACED_ROWS):
                self._write_pieces(self._tracer.add_rows(rows[start : start + TRACED_ROWS]))

    def _complete(self) -> str:
        self._write_pieces(self._tracer.finish())
        self._write(b"\n]}\n")
        return self._digest.hexdigest()

    def _write_pieces(self, pieces: Iterable[tuple[int, bytes]]) -> None:
        for number, coordinates in pieces:
            described = self._classes[number]
            digest = hashlib.sha1(PIECES.bytes + described + coordinates, usedforsecurity=False).digest()
            name = str(uuid.UUID(bytes=digest[:16], version=5)).encode("ascii")
            self._write(
                b'%b{"type": "Feature", "id": "%b", "geometry": {"type": "Polygon", "coordinates": %b}, "properties": '
                b'{"objectType": "annotation", "classification": %b}}' % (self._separator, name, coordinates, described)
            )
            self._separator = b",\n"

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)
