"""How large an image is, from a few bytes of its file: nothing is digested, decoded or checked."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from histoseg_fast.images.companions import BY_NAME, Folders
from histoseg_fast.images.content import HEAD_BYTES, JPEG, PNG, TIFF, open_regular
from histoseg_fast.images.jpeg import FRAMES
from histoseg_fast.images.source import DECODE_ERRORS, MAX_DECODED_PIXELS
from histoseg_fast.images.tiff import MAX_PIXELS, load_tifffile
from histoseg_fast.images.tiff_slide import MAX_PAGES

PIXELS_A_BYTE = 4
"""About what a byte of a slide's JPEG tiles stands for: for files whose header is not read."""

MAX_SEGMENTS = 1000
"""Most segments before the frame header of a JPEG; real files have a few, a large profile some hundred."""

_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))


def image_pixels(path: Path, folders: Folders | None = None) -> tuple[int, bool]:
    """Pixels of an image (of a slide's finest level), and whether its header says so.

    Where no header can be read (damaged files, slides of formats that OpenSlide alone knows) the number is a guess
    from the bytes of all files that the image is made of, 0 where there is none. Never raises for what is in a file.
    folders : where those are found, for calls with many images; looked for anew by default.
    """
    try:
        with open_regular(path) as raw:
            pixels = _header_pixels(path, raw)
    except DECODE_ERRORS:
        pixels = 0
    return (pixels, True) if pixels else (PIXELS_A_BYTE * _total_bytes(path, folders or Folders()), False)


def _header_pixels(path: Path, raw: BinaryIO) -> int:
    """What the header says; 0 where it says nothing, or what no image of its format may have."""
    head = raw.read(HEAD_BYTES)
    if path.suffix.lower() in BY_NAME or head.endswith(b"DICM"):
        return 0
    if head.startswith(PNG):
        width, height = struct.unpack_from(">II", head, 16)
        return width * height if width * height <= MAX_DECODED_PIXELS else 0
    if head.startswith(JPEG):
        pixels = _jpeg_pixels(raw)
        return pixels if pixels <= MAX_DECODED_PIXELS else 0
    if head.startswith(TIFF):
        raw.seek(0)
        pixels = _tiff_pixels(raw)
        return pixels if pixels <= MAX_PIXELS else 0
    return 0


def _jpeg_pixels(raw: BinaryIO) -> int:
    """From the first frame header; the segments before it are skipped unread."""
    position = 2
    for _ in range(MAX_SEGMENTS):
        raw.seek(position)
        mark, code, length = struct.unpack(">BBH", raw.read(4))
        if mark != 0xFF:
            return 0
        if code == 0xFF or code in _ALONE:  # a fill byte; a marker without a length
            position += 1 if code == 0xFF else 2
            continue
        if code in FRAMES:
            height, width = struct.unpack(">xHH", raw.read(5))
            return int(height * width)
        position += 2 + length
    return 0


def _tiff_pixels(raw: BinaryIO) -> int:
    """Of the largest page: some formats begin with a photograph of the whole glass."""
    largest = 0
    with load_tifffile().TiffFile(raw) as file:
        try:
            for index in range(MAX_PAGES):
                page = file.pages[index]
                largest = max(largest, page.imagewidth * page.imagelength)
        except DECODE_ERRORS:  # behind the last page, or at a damaged one
            pass
    return largest


def _total_bytes(path: Path, folders: Folders) -> int:
    total = 0
    for file in (path, *folders.companions(path)):
        try:
            total += os.stat(file).st_size
        except (OSError, ValueError):
            continue
    return total
