"""Headers and directories of TIFF files that are written piece by piece, classic or BigTIFF, little-endian."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import BinaryIO

CLASSIC_TIFF_BYTES = 2**32 - 1
"""Files over this become BigTIFFs: classic offsets have 32 bits."""

ASCII, SHORT, LONG, RATIONAL, LONG8, IFD, IFD8 = 2, 3, 4, 5, 16, 13, 18
"""Types of a tag's values. A RATIONAL's values are its numerator and its denominator."""

_CODES = {ASCII: "B", SHORT: "H", LONG: "I", RATIONAL: "I", LONG8: "Q", IFD: "I", IFD8: "Q"}

Entry = tuple[int, int, Sequence[int]]
"""Tag, type and values."""


def align(stream: BinaryIO) -> int:
    """Pad the file to a multiple of 8, where TIFF wants its directories; the position."""
    stream.write(bytes(-stream.tell() % 8))
    return stream.tell()


def write_header(stream: BinaryIO, first: int, *, big: bool) -> None:
    """Put the header, 16 bytes in a BigTIFF, else 8, over the start of the file; `first` is the first directory."""
    stream.seek(0)
    stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHI", b"II", 42, first))


def write_directory(stream: BinaryIO, entries: Sequence[Entry], following: int, *, big: bool) -> int:
    """Write one directory and, behind it, the values that do not fit into it; where it lies.

    entries : in rising order of their tags. following : offset of the next directory, 0 for none.
    """
    start = align(stream)
    count, word = ("Q", "Q") if big else ("H", "I")
    inline = struct.calcsize(word)
    position = start + struct.calcsize("<" + count) + len(entries) * (4 + 2 * inline) + inline
    directory, behind = [struct.pack("<" + count, len(entries))], []
    for tag, kind, values in entries:
        body = struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
        length = len(values) // 2 if kind == RATIONAL else len(values)
        if len(body) > inline:
            body += bytes(-len(body) % 8)
            behind.append(body)
            body, position = struct.pack("<" + word, position), position + len(body)
        directory.append(struct.pack("<HH" + word, tag, kind, length) + body.ljust(inline, b"\0"))
    directory.append(struct.pack("<" + word, following))
    stream.write(b"".join(directory + behind))
    return start
