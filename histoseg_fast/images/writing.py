"""Writers that take an image band by band and leave a whole file or none."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import imagecodecs
import numpy as np

from histoseg_fast.errors import ImageError
from histoseg_fast.files import atomic_write, sha256_of
from histoseg_fast.images.tiff_directory import (
    ASCII,
    CLASSIC_TIFF_BYTES,
    LONG,
    LONG8,
    SHORT,
    Entry,
    write_directory,
    write_header,
)

if TYPE_CHECKING:
    from typing_extensions import Self

MASK_CHUNK_BYTES = 4 * 2**20
"""Rows of a mask are gathered to about this much before they are compressed."""

OVERLAY_MAX_SIDE = 8192
"""Longest side of an overlay; larger images are thinned by the smallest whole factor that fits."""

OVERLAY_QUALITY = 90

STRIP_BYTES = 256 * 2**10
"""About the size of one uncompressed strip of a probability plane."""


class BandWriter(abc.ABC):
    """Takes rows in order; `finish` makes the file appear, anything else leaves what was there before.

    A context manager that calls `abort` unless `finish` was reached. Every method raises ImageError where
    the file cannot be written (the temporary file is gone then) and ValueError for rows that do not fit.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int):
        if width <= 0 or height <= 0:
            raise ValueError(f"an image of {width} x {height} pixels cannot be written")
        self.path, self.width, self.height = Path(path), width, height
        self._row = 0
        self._file = atomic_write(path)
        self._open = False
        with self._told():
            self._stream: BinaryIO = self._file.__enter__()
            self._open = True

    def finish(self) -> str:
        """Write what is left, rename into place, and return the hex SHA-256 of the file's bytes."""
        if not self._open:
            raise ValueError(f"{self.path} is already closed")
        if self._row != self.height:
            self.abort()
            raise ValueError(f"{self.path} got {self._row} of {self.height} rows")
        with self._told():
            digest = self._complete()
            self._open = False
            self._file.__exit__(None, None, None)
        return digest

    def abort(self) -> None:
        """Remove the temporary file; nothing happens after `finish` or a failure."""
        if self._open:
            self._open = False
            self._file.__exit__(_Aborted, _Aborted(), None)

    @abc.abstractmethod
    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows, uint8, of any strides; their shape is the format's own."""

    @abc.abstractmethod
    def _complete(self) -> str:
        """Write the rest of the bytes and return the digest of all of them."""

    def _take(self, rows: np.ndarray, shape: tuple[int, ...], row_axis: int) -> None:
        """Check a band: uint8, the given shape (0 at the axis that counts rows), not too many rows."""
        count = rows.shape[row_axis] if rows.ndim == len(shape) else 0
        wanted = (*shape[:row_axis], count, *shape[row_axis + 1 :])
        if rows.dtype != np.uint8 or rows.shape != wanted or self._row + count > self.height:
            raise ValueError(
                f"rows of {rows.dtype} {rows.shape} after row {self._row} do not fit {self.width} x {self.height}"
            )
        if not self._open:
            raise ValueError(f"{self.path} is already closed")
        self._row += count

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """On any error abort; let an OSError say which file it was."""
        try:
            yield
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError) and not isinstance(error, ImageError):
                reason = error.strerror or str(error)
                raise ImageError(
                    f"cannot be written: {reason}", where=self.path, fix="free space or choose another folder"
                ) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


class _Aborted(Exception):
    """Thrown into `atomic_write` to make it clean up; never seen outside."""


class MaskWriter(BandWriter):
    """An 8-bit palette PNG whose indices are the class ids.

    colours : uint8 (n, 3), the palette. The bytes depend on the class map alone, not on how it was cut into
    bands: rows are compressed in chunks of a fixed size, because zlib's output follows its input calls.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int, colours: np.ndarray):
        colours = np.ascontiguousarray(colours)
        if colours.dtype != np.uint8 or colours.ndim != 2 or colours.shape[1] != 3 or not 0 < len(colours) <= 256:
            raise ValueError(f"colours are {colours.dtype} {colours.shape}, not uint8 (1 to 256, 3)")
        super().__init__(path, width, height)
        self._colours = len(colours)
        self._digest = hashlib.sha256()
        # Measured on class maps: run lengths without a row filter are both quicker and smaller than level 1,
        # within a few percent of level 6 at a quarter of its time, and never far off where a map is noisy.
        self._deflate = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
        # One leading zero a row says "no filter".
        self._chunk = np.zeros((max(1, min(height, MASK_CHUNK_BYTES // (width + 1))), width + 1), np.uint8)
        self._filled = 0
        with self._told():
            self._write(b"\x89PNG\r\n\x1a\n")
            self._write_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
            self._write_chunk(b"PLTE", colours.tobytes())

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8 class ids, (h, width), any strides."""
        if rows.size and (highest := int(rows.max())) >= self._colours:
            raise ValueError(f"class id {highest} has no colour among {self._colours}")
        self._take(rows, (0, self.width), 0)
        with self._told():
            while len(rows):
                count = min(len(rows), len(self._chunk) - self._filled)
                self._chunk[self._filled : self._filled + count, 1:] = rows[:count]
                self._filled += count
                rows = rows[count:]
                if self._filled == len(self._chunk):
                    self._compress()

    def _compress(self) -> None:
        packed = self._deflate.compress(self._chunk[: self._filled].data)
        self._filled = 0
        if packed:
            self._write_chunk(b"IDAT", packed)

    def _complete(self) -> str:
        if self._filled:
            self._compress()
        self._write_chunk(b"IDAT", self._deflate.flush())
        self._write_chunk(b"IEND", b"")
        return self._digest.hexdigest()

    def _write_chunk(self, kind: bytes, body: bytes) -> None:
        self._write(struct.pack(">I", len(body)) + kind)
        self._write(body)
        self._write(struct.pack(">I", zlib.crc32(body, zlib.crc32(kind))))

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._digest.update(data)


class OverlayWriter(BandWriter):
    """An RGB JPEG for the eye. Images over `OVERLAY_MAX_SIDE` keep every f-th row and column."""

    def __init__(self, path: str | os.PathLike[str], width: int, height: int):
        super().__init__(path, width, height)
        self.factor = -(-max(width, height) // OVERLAY_MAX_SIDE)
        self._pixels = np.empty((-(-height // self.factor), -(-width // self.factor), 3), np.uint8)

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8 RGB, (h, width, 3), any strides."""
        start = self._row
        self._take(rows, (0, self.width, 3), 0)
        first = -(-start // self.factor)
        kept = rows[first * self.factor - start :: self.factor, :: self.factor]
        self._pixels[first : first + len(kept)] = kept

    def _complete(self) -> str:
        data = imagecodecs.jpeg8_encode(self._pixels, level=OVERLAY_QUALITY)
        self._stream.write(data)
        return hashlib.sha256(data).hexdigest()


class ProbabilityWriter(BandWriter):
    """A grey TIFF of one page a class, 0 to 255 for probability 0 to 1; deflate, horizontal predictor.

    Pages, and not channels, because every viewer opens them and tifffile stacks them to (classes, height,
    width). Their strips lie in the file in the order in which bands come, so nothing waits in memory for
    another class. `names` are the classes, kept as page names.
    """

    def __init__(self, path: str | os.PathLike[str], width: int, height: int, names: Sequence[str]):
        if not names:
            raise ValueError("probabilities need at least one class")
        super().__init__(path, width, height)
        self._names = [name.encode("ascii", "replace") + b"\0" for name in names]
        self._strip = np.empty((len(names), max(1, min(height, STRIP_BYTES // width)), width), np.uint8)
        self._filled = 0
        self._offsets: list[list[int]] = [[] for _ in names]
        self._counts: list[list[int]] = [[] for _ in names]
        self._big = 2 * width * height * len(names) > CLASSIC_TIFF_BYTES  # room for what deflate adds at worst
        with self._told():  # the header comes in at the end
            self._stream.write(bytes(16 if self._big else 8))

    def write_rows(self, rows: np.ndarray) -> None:
        """Take the next rows: uint8, (classes, h, width), any strides."""
        self._take(rows, (len(self._names), 0, self.width), 1)
        with self._told():
            while rows.shape[1]:
                count = min(rows.shape[1], self._strip.shape[1] - self._filled)
                self._strip[:, self._filled : self._filled + count] = rows[:, :count]
                self._filled += count
                rows = rows[:, count:]
                if self._filled == self._strip.shape[1]:
                    self._flush_strip()

    def _flush_strip(self) -> None:
        rows = self._strip[:, : self._filled]
        steps = rows.copy()
        steps[:, :, 1:] -= rows[:, :, :-1]
        for plane, offsets, counts in zip(steps, self._offsets, self._counts, strict=True):
            packed = imagecodecs.deflate_encode(plane, level=1)
            offsets.append(self._stream.tell())
            counts.append(len(packed))
            self._stream.write(packed)
        self._filled = 0

    def _complete(self) -> str:
        if self._filled:
            self._flush_strip()
        kind, following, pages = LONG8 if self._big else LONG, 0, len(self._names)
        for page in reversed(range(pages)):
            entries: list[Entry] = [
                (254, LONG, [2]), (256, LONG, [self.width]), (257, LONG, [self.height]), (258, SHORT, [8]),
                (259, SHORT, [8]), (262, SHORT, [1]), (273, kind, self._offsets[page]), (277, SHORT, [1]),
                (278, LONG, [self._strip.shape[1]]), (279, kind, self._counts[page]),
                (285, ASCII, self._names[page]), (297, SHORT, [page, pages]), (317, SHORT, [2]),
            ]  # fmt: skip
            following = write_directory(self._stream, entries, following, big=self._big)
        write_header(self._stream, following, big=self._big)
        return digest_written(self._stream)


def digest_written(stream: BinaryIO) -> str:
    """Hex SHA-256 of a file that is still open for writing; its header changes last, so a running one is no use."""
    stream.flush()
    with open(stream.name, "rb") as written:
        return sha256_of(written)
