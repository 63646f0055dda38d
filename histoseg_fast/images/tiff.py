"""TIFF, read by bands: only the strips or tiles that a band needs are decoded."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import imagecodecs
import numpy as np

from histoseg_fast.images.content import Content
from histoseg_fast.images.jpeg import walk_markers
from histoseg_fast.images.segments import SegmentedSource
from histoseg_fast.images.source import CONVERTED_ROWS_BYTES, DECODE_ERRORS, SIXTEEN_BITS, OverLimit, to_rgb

if TYPE_CHECKING:
    import tifffile

MAX_PIXELS = 2**37
"""Most pixels of a TIFF, about 370,000 a side."""

MAX_SEGMENT_BYTES = 2**30
"""Largest strip or tile that has to be decoded whole, as bytes or RGB; an uncompressed strip has no limit."""

ENCODED_SHARE, ENCODED_BYTES = 2, 64 * 2**10
"""Most that a strip or tile to be decoded takes in the file: so many times its samples, as bytes or wider, and some for
tables and profiles. No codec makes more of noise."""

MAX_ROW_BYTES = 2**31
"""Most of a row of tiles, decoded, since a band of the image may need all of them."""

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_NONE, _JPEG, _WEBP = 1, 7, 50001
_CCITT = (2, 3, 4)
_JPEG2000 = (33005, 34712)
_BYTE_CODECS: dict[int, Callable[..., Any]] = {
    5: lambda data, out: imagecodecs.lzw_decode(data, out=out),
    8: lambda data, out: imagecodecs.deflate_decode(data, out=out),
    32946: lambda data, out: imagecodecs.deflate_decode(data, out=out),
    32773: lambda data, out: imagecodecs.packbits_decode(data, out=out),
    34925: lambda data, out: imagecodecs.lzma_decode(data, out=out),
    50000: lambda data, out: imagecodecs.zstd_decode(data, out=out),
}
"""Compressions of plain bytes. They are undone here and not by tifffile, so that a bomb meets a limit."""

_SUPPORTED = {_NONE, _JPEG, _WEBP, *_CCITT, *_JPEG2000, *_BYTE_CODECS}
_quieting = threading.Lock()


def load_tifffile() -> Any:
    """tifffile, imported when the first TIFF is met, its log (it reports every odd tag) off the terminal."""
    import tifffile

    log = logging.getLogger("tifffile")
    with _quieting:
        if not any(isinstance(handler, logging.NullHandler) for handler in log.handlers):
            log.addHandler(logging.NullHandler())
            log.propagate = False
        if not issubclass(tifffile.TiffFileError, ValueError):  # the last version for Python 3.10
            tifffile.TiffFileError.__bases__ = (ValueError,)
    return tifffile


class TiffSource(SegmentedSource):
    """One page of a TIFF or BigTIFF: strips or tiles, 1 to 16 bits, grey, palette or RGB.

    Segments that were never written are zero, as the format says; in a `slide` they are glass.
    """

    format = "tiff"
    _content: Content

    def __init__(self, content: Content, page: tifffile.TiffPage, *, slide: bool = False):
        super().__init__(content)
        self.slide = slide
        self._page = page
        with self._told():
            self._check_page(page)
            self._lay_out(page)
            if page.index == 0 and not slide:
                self._note_further_pages()

    def _check_page(self, page: tifffile.TiffPage) -> None:
        """Refuse what cannot be read right, before anything of the claimed size is allocated."""
        numbers = "imagewidth imagelength imagedepth samplesperpixel bitspersample planarconfig rowsperstrip"
        for name in [*numbers.split(), "tilewidth", "tilelength", "compression", "photometric", "predictor"]:
            if not isinstance(getattr(page, name), int):
                self._refuse(f"the TIFF tag for {name} is not one number")
        self._check_size(page.imagewidth, page.imagelength, MAX_PIXELS, "split it")
        if page.imagedepth != 1 or page.tiledepth != 1:
            self._refuse("a TIFF volume is not supported", "save one plane of it")
        if page.compression not in _SUPPORTED:
            self._refuse(f"TIFF compression {page.compression} is not supported", "save it with deflate or JPEG")
        if page.sampleformat != 1 or page.bitspersample not in (1, 2, 4, 8, 16):
            self._refuse(f"TIFF samples of type {page.sampleformat}, {page.bitspersample} bits, are not supported")
        least = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _PALETTE: 1, _RGB: 3, _YCBCR: 3}.get(page.photometric)
        extra = -1 if least is None else page.samplesperpixel - least
        if extra not in (0, 1) or (extra and page.photometric in (_PALETTE, _YCBCR)):
            self._refuse(f"a TIFF of photometric {page.photometric} with {page.samplesperpixel} samples a pixel")
        if page.photometric == _YCBCR and page.compression != _JPEG:
            self._refuse("a YCbCr TIFF without JPEG compression is not supported")
        if page.photometric in (_RGB, _YCBCR) and page.bitspersample < 8:
            self._refuse(f"an RGB TIFF of {page.bitspersample} bits a sample is not supported")
        if page.planarconfig not in (1, 2):
            self._refuse(f"TIFF planar configuration {page.planarconfig} does not exist")
        if page.photometric == _PALETTE:
            if page.bitspersample > 8:
                self._refuse("a TIFF palette of 16 bits is not supported")
            self._palette = _palette(page)
        if page.bitspersample == 16:
            self.warnings.append(SIXTEEN_BITS)

    def _lay_out(self, page: tifffile.TiffPage) -> None:
        """Where the segments are, and which of the two ways of reading applies."""
        tiled = page.is_tiled
        self._seg_height = page.tilelength if tiled else page.rowsperstrip
        self._seg_width = page.tilewidth if tiled else self.width
        if self._seg_height <= 0 or self._seg_width <= 0:
            self._refuse("a TIFF strip or tile has no size")
        self._across = math.ceil(self.width / self._seg_width)
        self._down = math.ceil(self.height / self._seg_height)
        self._planes = page.samplesperpixel if page.planarconfig == 2 else 1
        self._channels = page.samplesperpixel // self._planes
        count = self._across * self._down * self._planes
        if len(page.dataoffsets) != count or len(page.databytecounts) != count:
            self._refuse(f"the TIFF lists {len(page.dataoffsets)} strips or tiles where its size asks for {count}")
        self._bits = page.bitspersample
        self._compression = page.compression
        self._dtype = np.dtype(np.uint16 if self._bits == 16 else np.uint8)
        self._direct = (
            page.compression == _NONE and not tiled and self._bits >= 8 and page.predictor == 1 and page.fillorder == 1
        )
        row_bytes = (self._seg_width * self._channels * self._bits + 7) // 8
        self._raw_bytes = row_bytes * self._seg_height
        decoded = self._seg_width * self._seg_height * max(3, self._channels * self._dtype.itemsize)
        if not self._direct and decoded > MAX_SEGMENT_BYTES:
            self._refuse(
                f"a TIFF strip or tile takes {decoded:,} bytes of memory", "save it as a tiled TIFF", OverLimit
            )
        if not self._direct and decoded * self._across > MAX_ROW_BYTES:
            row = decoded * self._across
            self._refuse(f"a row of TIFF tiles takes {row:,} bytes of memory", "use smaller tiles", OverLimit)
        extra = page.extrasamples[0] if len(page.extrasamples) == 1 else 0
        self._alpha, self._premultiplied = extra in (1, 2), extra == 1
        self._reversed = page.fillorder == 2 and page.compression in _BYTE_CODECS
        if page.compression in _BYTE_CODECS:
            # tifffile keeps what comes after decompression: unpacking of bits, byte order, predictor.
            page.compression = _NONE
            page.fillorder = 1 if self._reversed else page.fillorder

    def _note_further_pages(self) -> None:
        with contextlib.suppress(*DECODE_ERRORS):  # a damaged second page is none of our business
            second: Any = self._page.parent.pages[1]
            size = second.imagewidth, second.imagelength
            if size == (self.width, self.height) and not second.subfiletype & 1:
                self.warnings.append("holds more than one page of this size; only the first is read")

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        self._read_columns(y0, y1, out, ((0, self.width),))

    def _read_columns(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]]) -> None:
        if self._direct:
            self._read_direct(y0, y1, out)
        else:
            super()._read_columns(y0, y1, out, columns)

    def _segment(self, row: int, column: int) -> np.ndarray:
        """One strip or tile as RGB, cropped to the image."""
        height = min(self._seg_height, self.height - row * self._seg_height)
        width = min(self._seg_width, self.width - column * self._seg_width)
        index = row * self._across + column
        indices = range(index, index + self._planes * self._across * self._down, self._across * self._down)
        if self.slide and not any(self._page.databytecounts[i] for i in indices):
            return np.full((height, width, 3), 255, np.uint8)
        planes = [self._decode(i, height, width) for i in indices]
        samples = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if self._bits == 8 and samples.shape[2] == 3 and self._page.photometric in (_RGB, _YCBCR):
            return samples
        pixels = np.empty((height, width, 3), np.uint8)
        self._convert(samples, pixels)
        return pixels

    def _decode(self, index: int, height: int, width: int) -> np.ndarray:
        """The samples of one segment, (height, width, channels), as stored."""
        size, page = self._page.databytecounts[index], self._page
        if size == 0:  # sparse: never written, zero by convention
            return np.zeros((height, width, self._channels), self._dtype)
        most = ENCODED_SHARE * self._seg_height * self._seg_width * self._channels * self._dtype.itemsize
        if size > most + ENCODED_BYTES:
            raise ValueError(f"a strip or tile claims {size:,} bytes, at most {most + ENCODED_BYTES:,} make sense")
        data = self._content.read(page.dataoffsets[index], size)
        decoded, _, _ = page.decode(self._unpacked(data), index, jpegtables=page.jpegtables)
        assert decoded is not None
        samples: np.ndarray = decoded[0]
        if samples.dtype == bool:
            samples = samples.view(np.uint8)
        if samples.dtype != self._dtype or samples.shape[2] != self._channels:
            raise ValueError(f"a strip or tile decoded to {samples.dtype} {samples.shape}")
        if samples.shape[0] < height or samples.shape[1] < width:
            raise ValueError(f"a strip or tile decoded to {samples.shape}, smaller than it should be")
        return samples[:height, :width]

    def _unpacked(self, data: bytes) -> bytes:
        """Undo a compression of plain bytes; check what codecs of images let pass."""
        if self._compression in _BYTE_CODECS:
            if self._reversed:
                data = bytes(imagecodecs.bitorder_decode(data))
            # Some writers fill the last strip up, none writes more than a whole one and some padding.
            return bytes(_BYTE_CODECS[self._compression](data, out=self._raw_bytes + 4096))
        if self._compression == _JPEG:
            header = walk_markers(data)
            self._check_codec_size(header.width, header.height)
        elif self._compression in _JPEG2000:
            width, height, channels = _jpeg2000_size(data)
            self._check_codec_size(width, height)
            if channels > self._channels:
                raise ValueError(f"a tile of {self._channels} samples a pixel claims {channels}")
        elif self._compression == _WEBP:
            self._check_codec_size(*_webp_size(data))
        return data

    def _check_codec_size(self, width: int, height: int) -> None:
        if width > self._seg_width or height > self._seg_height:
            raise ValueError(f"a tile of {self._seg_width} x {self._seg_height} claims {width} x {height} pixels")

    def _read_direct(self, y0: int, y1: int, out: np.ndarray) -> None:
        """Uncompressed strips, read by rows: one strip of gigabytes costs no more memory than many."""
        row_bytes = self.width * self._channels * self._dtype.itemsize
        step = max(1, CONVERTED_ROWS_BYTES // (row_bytes * self._planes))
        into = self._planes == 1 and self._dtype == np.uint8 and self._channels == 3
        y = y0
        while y < y1:
            row, inner = divmod(y, self._seg_height)
            count = min(step, y1 - y, self._seg_height - inner)
            target = out[y - y0 : y - y0 + count]
            if into and target.flags.c_contiguous:
                self._read_strip(row, inner * row_bytes, target.reshape(-1))
            else:
                self._convert(self._strip_rows(row, inner, count, row_bytes), target)
            y += count

    def _strip_rows(self, row: int, inner: int, count: int, row_bytes: int) -> np.ndarray:
        planes = []
        for plane in range(self._planes):
            raw = np.empty(count * row_bytes, np.uint8)
            self._read_strip(row + plane * self._down, inner * row_bytes, raw)
            stored = raw.view(self._dtype.newbyteorder(self._page.parent.byteorder))
            planes.append(stored.reshape(count, self.width, self._channels))
        samples = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        return samples.astype(self._dtype, copy=False)

    def _read_strip(self, index: int, start: int, target: np.ndarray) -> None:
        size = self._page.databytecounts[index]
        if size == 0:
            target[...] = 0
            return
        if start + target.size > size:
            raise ValueError("a TIFF strip is shorter than its rows")
        self._content.read_into(self._page.dataoffsets[index] + start, target.data)

    def _convert(self, samples: np.ndarray, out: np.ndarray) -> None:
        if self._page.photometric == _PALETTE:
            out[...] = self._palette[samples[..., 0]]
            return
        if self._bits < 8:
            samples = samples * np.uint8(255 // (2**self._bits - 1))
        if self._page.photometric == _WHITE_IS_ZERO:
            grey = np.iinfo(samples.dtype).max - samples[..., :1]
            samples = np.concatenate([grey, samples[..., 1:]], axis=2)
        if not self._alpha:
            samples = samples[..., : 3 if samples.shape[2] >= 3 else 1]
        to_rgb(samples, out, alpha=self._alpha, premultiplied=self._premultiplied)


def _palette(page: tifffile.TiffPage) -> np.ndarray:
    """The colour map as uint8, shape (256, 3); zero where it is short."""
    stored = np.asarray(page.tags.valueof(320))
    if stored.dtype.kind not in "iu" or stored.size != 3 * 2**page.bitspersample:
        raise ValueError("the TIFF colour map is missing or of the wrong size")
    if stored.max() > 255:  # 16 bits by the standard; old writers stored 8
        stored = stored >> 8
    colours = np.zeros((256, 3), np.uint8)
    colours[: 2**page.bitspersample] = stored.reshape(3, -1).T
    return colours


def _jpeg2000_size(data: bytes) -> tuple[int, int, int]:
    """Width, height and channels of a complete JPEG 2000 codestream. ValueError where it is none."""
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 42 or data.rfind(b"\xff\xd9") < start:
        raise ValueError("the JPEG 2000 data is cut off")
    right, bottom, left, top = (int.from_bytes(data[start + 8 + i : start + 12 + i], "big") for i in range(0, 16, 4))
    return right - left, bottom - top, int.from_bytes(data[start + 40 : start + 42], "big")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that a WebP claims, in each of its three kinds. ValueError where it is none."""
    kind, body = data[12:16], data[20:30]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(body) < 10:
        raise ValueError("the WebP data is cut off")
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L":
        packed = int.from_bytes(body[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise ValueError("the WebP data is of an unknown kind")
