"""JPEG, decoded whole; and the walk over markers that TIFF tiles need as well."""

from __future__ import annotations

import re
from dataclasses import dataclass

import imagecodecs
import numpy as np

from histoseg_fast.images.content import Content
from histoseg_fast.images.source import MAX_DECODED_PIXELS, WholeSource

MAX_SCANS = 100
"""Most scans of a progressive JPEG; each costs a pass over the whole image, real ones have about ten."""

FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers of a frame header."""

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
"""A marker that ends entropy-coded data: no stuffed zero, restart or fill byte."""


@dataclass(frozen=True)
class JpegHeader:
    """What the frame header of a JPEG says."""

    width: int
    height: int
    channels: int
    bits: int


def walk_markers(data: bytes) -> JpegHeader:
    """The frame header of a JPEG whose last scan ends as it should.

    libjpeg fills what is missing with grey and says nothing that reaches the caller, so completeness is
    checked here. Raises ValueError for a file that is cut off or not a JPEG.
    """
    header, scans, position = None, 0, 0
    while True:
        match = _NEXT_MARKER.search(data, position)
        if match is None:
            raise ValueError("the JPEG ends before its end marker")
        marker, position = data[match.end() - 1], match.end()
        if marker == _EOI:
            break
        if marker in (_SOI, 0x01):  # stand alone, without a length
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        if length < 2 or position + length > len(data):
            raise ValueError("a JPEG segment is cut off")
        if marker in FRAMES:
            if header is not None or length < 8:
                raise ValueError("more than one JPEG frame header, or a short one")
            body = data[position + 2 : position + 8]
            header = JpegHeader(
                int.from_bytes(body[3:5], "big"), int.from_bytes(body[1:3], "big"), body[5], bits=body[0]
            )
        elif marker == _SOS:
            scans += 1
            if scans > MAX_SCANS:
                raise ValueError(f"more than {MAX_SCANS} JPEG scans")
        position += length
    if header is None or not scans:
        raise ValueError("the JPEG holds no image")
    return header


class JpegSource(WholeSource):
    """A baseline or progressive 8-bit JPEG: grey, YCbCr, RGB, CMYK or YCCK.

    Four channels are taken as inverted, as Adobe and all that followed write them.
    """

    format = "jpeg"

    def __init__(self, content: Content):
        super().__init__(content)
        with self._told():
            header = walk_markers(self._data)
        self._check_size(header.width, header.height, MAX_DECODED_PIXELS, "save it as a tiled TIFF")
        if header.bits != 8 or header.channels not in (1, 3, 4):
            self._refuse(f"a JPEG of {header.channels} channels of {header.bits} bits is not supported")
        self._cmyk = header.channels == 4

    def _decode_rgb(self, out: np.ndarray) -> bool:
        if self._cmyk or not out.flags.c_contiguous:
            return False
        imagecodecs.jpeg8_decode(self._data, outcolorspace="RGB", out=out)
        return True

    def _decode_samples(self) -> np.ndarray:
        # An array of the checked size is given, so the codec never allocates by a header of its own reading.
        samples = np.empty((self.height, self.width, 4 if self._cmyk else 3), np.uint8)
        imagecodecs.jpeg8_decode(self._data, outcolorspace=None if self._cmyk else "RGB", out=samples)
        self._data = b""
        return samples

    def _convert(self, samples: np.ndarray, out: np.ndarray) -> None:
        if self._cmyk:
            out[...] = (samples[..., :3].astype(np.uint16) * samples[..., 3:] + 127) // 255
        else:
            out[...] = samples
