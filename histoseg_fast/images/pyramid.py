"""The class map of a whole slide: a tiled, pyramidal OME-TIFF, written from bands of rows in bounded memory."""

from __future__ import annotations

import os
import zlib
from array import array
from fractions import Fraction
from xml.sax.saxutils import escape

import numpy as np

from histoseg_fast.errors import one_line
from histoseg_fast.images.tiff_directory import (
    ASCII,
    CLASSIC_TIFF_BYTES,
    IFD,
    IFD8,
    LONG,
    LONG8,
    RATIONAL,
    SHORT,
    Entry,
    align,
    write_directory,
    write_header,
)
from histoseg_fast.images.writing import BandWriter, digest_written
from histoseg_fast.labels import Palette

TILE_SIDE = 512
"""Side of a tile; a pyramid ends at the level that is a single tile."""

MPP_RANGE = 0.01, 1000.0
"""Micrometres a pixel that are written; what lies outside is no microscope's, and is left out."""

SOFTWARE = b"histoseg-fast\0"

_HEADER_BYTES = 16
_DIRECTORY_BYTES = 8192
"""More than one directory takes, its tables of tiles left out."""


def level_count(width: int, height: int) -> int:
    """Levels of a class map of that size; level k has ceil(size / 2^k) pixels a side."""
    return (-(-max(width, height) // TILE_SIDE) - 1).bit_length() + 1


class _Level:
    """One level: its size, the row of tiles that is being filled, and where the finished ones lie."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.rows = np.zeros((TILE_SIDE, -(-width // TILE_SIDE) * TILE_SIDE), np.uint8)
        self.filled = 0
        self.offsets, self.counts = array("Q"), array("Q")


class PyramidWriter(BandWriter):
    """Class ids as a palette OME-TIFF: deflate tiles, levels of half the size down to one tile.

    A level keeps every second row and column of the one above, the first included: class shares stay what they are
    (a majority would wear thin structures away level by level), and pixel (y, x) of level k is pixel
    (y * 2^k, x * 2^k) of the map. Levels are listed both as sub-resolutions of the first directory, which is how
    OME-TIFF has it (Bio-Formats, QuPath, tifffile), and as reduced directories behind it, which is what generic
    readers look for (OpenSlide, libtiff). Tiles that hold one class only share their bytes in the file.

    Memory grows with the width (two rows of tiles) and by 32 bytes a tile; the bytes depend on the map alone.

    palette : the colour map, and the names in the OME-XML. mpp : micrometres a pixel, or None where it is not known.
    """

    def __init__(
        self, path: str | os.PathLike[str], width: int, height: int, palette: Palette, mpp: float | None = None
    ):
        super().__init__(path, width, height)
        self._palette = palette
        self._mpp = mpp if mpp is not None and MPP_RANGE[0] <= mpp <= MPP_RANGE[1] else None
        self._levels = [_Level(-(-width >> k), -(-height >> k)) for k in range(level_count(width, height))]
        self._plain: dict[int, tuple[int, int]] = {}  # where a tile of one class lies, by the class
        with self._told():  # the header comes in at the end
            self._stream.write(bytes(_HEADER_BYTES))

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8 class ids, (h, width), any strides."""
        if rows.size and (highest := int(rows.max())) >= len(self._palette.names):
            raise ValueError(f"class id {highest} has no colour among {len(self._palette.names)}")
        self._take(rows, (0, self.width), 0)
        with self._told():
            self._feed(0, rows)

    def _feed(self, number: int, rows: np.ndarray) -> None:
        level = self._levels[number]
        while len(rows):
            count = min(len(rows), TILE_SIDE - level.filled)
            level.rows[level.filled : level.filled + count, : level.width] = rows[:count]
            level.filled += count
            rows = rows[count:]
            if level.filled == TILE_SIDE:
                self._write_tiles(number)

    def _write_tiles(self, number: int) -> None:
        """Write the row of tiles that `level.rows` holds, and hand every second of its rows down."""
        level = self._levels[number]
        level.rows[level.filled :] = 0
        for x in range(0, level.rows.shape[1], TILE_SIDE):
            offset, count = self._write_tile(level.rows[:, x : x + TILE_SIDE])
            level.offsets.append(offset)
            level.counts.append(count)
        if number + 1 < len(self._levels):
            self._feed(number + 1, level.rows[: level.filled : 2, : level.width : 2])
        level.filled = 0

    def _write_tile(self, tile: np.ndarray) -> tuple[int, int]:
        first = int(tile[0, 0])
        plain = bool((tile == first).all())
        if plain and first in self._plain:
            return self._plain[first]
        # Measured on class maps: run lengths alone are twice as quick as level 6, and smaller (see MaskWriter).
        deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        packed = deflate.compress(tile.tobytes()) + deflate.flush()
        place = self._stream.tell(), len(packed)
        self._stream.write(packed)
        if plain:
            self._plain[first] = place
        return place

    def _complete(self) -> str:
        for number, level in enumerate(self._levels):
            if level.filled:
                self._write_tiles(number)
        tables = sum(16 * len(level.offsets) + _DIRECTORY_BYTES for level in self._levels)
        big = align(self._stream) + tables > CLASSIC_TIFF_BYTES
        reduced: list[int] = []
        following = 0
        for number in reversed(range(1, len(self._levels))):
            following = write_directory(self._stream, self._entries(number, [], big=big), following, big=big)
            reduced.insert(0, following)
        first = write_directory(self._stream, self._entries(0, reduced, big=big), following, big=big)
        write_header(self._stream, first, big=big)
        return digest_written(self._stream)

    def _entries(self, number: int, reduced: list[int], *, big: bool) -> list[Entry]:
        level, where = self._levels[number], LONG8 if big else LONG
        ratio = Fraction(1) if self._mpp is None else Fraction(10_000 / (self._mpp * 2**number)).limit_denominator(1000)
        colours = np.zeros((256, 3), np.uint16)
        colours[: len(self._palette.names)] = self._palette.array.astype(np.uint16) * 257
        resolution = [ratio.numerator, ratio.denominator]
        entries: list[Entry] = [
            (254, LONG, [int(number > 0)]), (256, LONG, [level.width]), (257, LONG, [level.height]), (258, SHORT, [8]),
            (259, SHORT, [8]), (262, SHORT, [3]), (270, ASCII, self._ome_xml()), (277, SHORT, [1]),
            (282, RATIONAL, resolution), (283, RATIONAL, resolution), (296, SHORT, [1 if self._mpp is None else 3]),
            (305, ASCII, SOFTWARE), (320, SHORT, colours.T.ravel().tolist()), (322, LONG, [TILE_SIDE]),
            (323, LONG, [TILE_SIDE]), (324, where, level.offsets), (325, where, level.counts),
            (330, IFD8 if big else IFD, reduced),
        ]  # fmt: skip
        left_out = set() if number == 0 else {270, 305}
        return [entry for entry in entries if entry[2] and entry[0] not in left_out]

    def _ome_xml(self) -> bytes:
        """One plane of class ids; the names of the classes as a map annotation."""
        size = (
            ""
            if self._mpp is None
            else "".join(f' PhysicalSize{axis}="{self._mpp:.9g}" PhysicalSize{axis}Unit="\u00b5m"' for axis in "XY")
        )
        names = "".join(f'<M K="{i}">{escape(one_line(name))}</M>' for i, name in enumerate(self._palette.names))
        schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{schema}" '
            f'xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" xsi:schemaLocation="{schema} {schema}/ome.xsd" '
            'Creator="histoseg-fast"><Image ID="Image:0" Name="class map">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SignificantBits="8" BigEndian="false" '
            f'SizeX="{self.width}" SizeY="{self.height}" SizeC="1" SizeZ="1" SizeT="1"{size}>'
            '<Channel ID="Channel:0:0" Name="class" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1"/></Pixels>'
            '<AnnotationRef ID="Annotation:0"/></Image><StructuredAnnotations>'
            f'<MapAnnotation ID="Annotation:0" Namespace="histoseg-fast/classes"><Value>{names}</Value></MapAnnotation>'
            "</StructuredAnnotations></OME>"
        )
        return text.encode() + b"\0"  # not as &#181;, which Bio-Formats takes apart
