"""PNG, decoded whole. What most are (8-bit RGB, not interlaced) goes through libdeflate and our own unfiltering."""

from __future__ import annotations

import struct
import zlib

import imagecodecs
import numpy as np

from histoseg_fast import _core
from histoseg_fast.images.content import Content
from histoseg_fast.images.source import MAX_DECODED_PIXELS, SIXTEEN_BITS, WholeSource, to_rgb

MAX_DEFLATE_RATIO = 1032
"""Deflate cannot expand more than this, so a small file that claims a huge image is refused unseen."""

_GREY, _RGB, _PALETTE, _GREY_ALPHA, _RGBA = 0, 2, 3, 4, 6
_CHANNELS = {_GREY: 1, _RGB: 3, _PALETTE: 1, _GREY_ALPHA: 2, _RGBA: 4}
_HEADER = struct.Struct(">IIBBBBB")
_HEADER_END = 33


class PngSource(WholeSource):
    """A PNG of any colour type, bit depth and interlacing."""

    format = "png"

    def __init__(self, content: Content):
        super().__init__(content)
        data = self._data
        if len(data) < _HEADER_END or data[12:16] != b"IHDR":
            self._refuse("the PNG header is incomplete", "copy or export it again")
        width, height, self._depth, self._colour, _, _, self._interlaced = _HEADER.unpack_from(data, 16)
        self._check_size(width, height, MAX_DECODED_PIXELS, "save it as a tiled TIFF")
        if self._colour not in _CHANNELS or self._depth not in (1, 2, 4, 8, 16):
            self._refuse("the PNG header is damaged", "copy or export it again")
        row = (width * self._depth * _CHANNELS[self._colour] + 7) // 8 + 1
        if row * height > MAX_DEFLATE_RATIO * len(data) + row:
            self._refuse(f"{len(data)} bytes cannot hold {width} x {height} pixels", "copy or export it again")
        self._transparent = False
        self._data = self._essential(data)
        if self._depth == 16:
            self.warnings.append(SIXTEEN_BITS)

    def _essential(self, data: bytes) -> bytes:
        """`data` without the chunks before the pixels that no decode needs.

        Text and profiles may be small bombs of compressed zeros, and libpng prints its opinion on them.
        """
        kept, position, dropped = [data[:_HEADER_END]], _HEADER_END, False
        while (kind := data[position + 4 : position + 8]) != b"IDAT":
            if len(kind) < 4:
                self._refuse("the PNG ends before its pixels", "copy or export it again")
            end = position + 12 + int.from_bytes(data[position : position + 4], "big")
            if kind == b"tRNS":
                self._transparent = True
            if kind == b"tRNS" or not kind[0] & 0x20:  # lower case marks what a decoder may skip
                kept.append(data[position:end])
            else:
                dropped = True
            position = end
        return b"".join([*kept, data[position:]]) if dropped else data

    def _decode_rgb(self, out: np.ndarray) -> bool:
        if self._depth != 8 or self._colour != _RGB or self._transparent or self._interlaced:
            return False
        size = self.height * (3 * self.width + 1)
        pixel_data = _core.png_pixel_data(self._data, _HEADER_END)
        if pixel_data is None:
            raise ValueError("the file ends within its pixels")
        rows = imagecodecs.deflate_decode(pixel_data, out=size)  # checks the Adler-32 of all of them
        assert isinstance(rows, bytes)
        if len(rows) != size:
            raise ValueError(f"the pixels end after {len(rows)} of {size} bytes")
        if not _core.unfilter_rgb(rows, out):
            raise ValueError("a row has an unknown filter")
        return True

    def _decode_samples(self) -> np.ndarray:
        # libspng (as wrapped) knows neither 16 bits without alpha, grey with alpha, nor tRNS; libpng
        # knows all and is as fast, but prints its opinion on damaged data, so that is found first.
        if self._depth <= 8 and self._colour != _GREY_ALPHA and not self._transparent:
            samples = imagecodecs.spng_decode(self._data)
        else:
            _check_sums(self._data)
            samples = imagecodecs.png_decode(self._data)
        self._data = b""
        return samples[..., None] if samples.ndim == 2 else samples

    def _convert(self, samples: np.ndarray, out: np.ndarray) -> None:
        to_rgb(samples, out, alpha=samples.shape[2] in (2, 4))


def _check_sums(data: bytes) -> None:
    """ValueError where the checksum of a chunk up to the end of the pixels is wrong."""
    view, position, kind = memoryview(data), 8, b""
    while True:
        end = position + 8 + int.from_bytes(view[position : position + 4], "big")
        previous, kind = kind, bytes(view[position + 4 : position + 8])
        if previous == b"IDAT" and kind != b"IDAT":
            return
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4], "big") or end + 4 > len(data):
            raise ValueError("the checksum of a PNG chunk is wrong")
        position = end + 4
