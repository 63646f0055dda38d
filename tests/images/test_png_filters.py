"""Our own unfiltering of PNG rows against the specification, written out plainly."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.errors import ImageError
from histoseg_fast.images import read_image


def unfiltered(rows: bytes, height: int, width: int) -> np.ndarray:
    """PNG specification, section 9: byte by byte."""
    bytes_a_row = 3 * width
    out = np.zeros((height, bytes_a_row), int)
    for y in range(height):
        kind, *line = rows[y * (bytes_a_row + 1) : (y + 1) * (bytes_a_row + 1)]
        for i, value in enumerate(line):
            left = out[y, i - 3] if i >= 3 else 0
            up = out[y - 1, i] if y else 0
            corner = out[y - 1, i - 3] if y and i >= 3 else 0
            estimate = left + up - corner
            nearest = min((left, up, corner), key=lambda v: abs(estimate - v))  # the first of equals, in this order
            out[y, i] = (value + [0, left, up, (left + up) // 2, nearest][kind]) % 256
    return out.astype(np.uint8).reshape(height, width, 3)


KINDS = [range(5), (3, 4, 3, 4, 0), (3, 4), (3,), (4,)]
"""Up to four rows of filters 3 and 4 are worked on together, those of one filter in ways of their own."""


@given(st.integers(1, 14), st.integers(1, 12), st.integers(0, 7), st.randoms(use_true_random=False))
def test_filters_follow_the_specification(height, width, gap, random):
    kinds = random.choice(KINDS)
    values = [b"\0\x01\x7f\x80\xfe\xff", bytes(range(256))]
    rows = b"".join(
        bytes([random.choice(kinds)]) + bytes(random.choices(random.choice(values), k=3 * width)) for _ in range(height)
    )
    canvas = np.full((height, width + gap, 3), 77, np.uint8)
    assert _core.unfilter_rgb(rows, canvas[:, :width])
    np.testing.assert_array_equal(canvas[:, :width], unfiltered(rows, height, width))
    assert (canvas[:, width:] == 77).all()


def test_unknown_filters_and_wrong_sizes_are_refused():
    out = np.zeros((2, 2, 3), np.uint8)
    assert not _core.unfilter_rgb(b"\0" + bytes(6) + b"\5" + bytes(6), out)
    with pytest.raises(ValueError, match="expected 14 bytes, got 13"):
        _core.unfilter_rgb(bytes(13), out)
    with pytest.raises(ValueError, match="read-only"):
        out.flags.writeable = False
        _core.unfilter_rgb(bytes(14), out)


def png(body: bytes, width: int, height: int, *, cut: int = 0, parts: int = 1) -> bytes:
    """An 8-bit RGB PNG whose inflated pixels are `body`, in `parts` IDAT chunks, without the last `cut` bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(body)
    step = -(-len(packed) // parts)
    pieces = [chunk(b"IDAT", packed[i : i + step]) for i in range(0, len(packed), step)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    whole = b"\x89PNG\r\n\x1a\n" + header + b"".join(pieces) + chunk(b"IEND", b"")
    return whole[: len(whole) - cut]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_pixels_may_lie_in_many_chunks(tmp_path, parts):
    body = b"".join(b"\1" + bytes(range(y, y + 12)) for y in range(5))
    (tmp_path / "a.png").write_bytes(png(body, 4, 5, parts=parts))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), unfiltered(body, 5, 4))


def joined(file: bytes, start: int) -> bytes | None:
    """PNG specification, section 5: chunk by chunk."""
    found, at = None, start
    while len(file) >= at + 8:
        length, kind = struct.unpack_from(">I4s", file, at)
        if kind != b"IDAT" and found is not None:
            return found
        if len(file) < at + 12 + length:
            return None
        if kind == b"IDAT":
            found = (found or b"") + file[at + 8 : at + 8 + length]
        at += 12 + length
    return found


CHUNKS = st.tuples(st.sampled_from([b"IDAT", b"IDAT", b"tEXt", b"IEND"]), st.binary(max_size=9), st.integers(-14, 14))


@given(st.lists(CHUNKS, max_size=6), st.integers(0, 99), st.integers(0, 12))
def test_chunks_are_joined_as_they_are_one_by_one_wherever_the_file_ends_or_lies(chunks, cut, start):
    file = bytes(start)
    for kind, content, wrong in chunks:
        length = max(0, len(content) + (wrong if abs(wrong) > 11 else 0))  # mostly the right one
        file += struct.pack(">I", length) + kind + content + b"sum!"
    for end in (len(file), max(start, len(file) - cut)):
        assert _core.png_pixel_data(file[:end], start) == joined(file[:end], start)


@pytest.mark.parametrize("length", [2**31 - 1, 2**31, 2**32 - 1])
def test_chunks_of_gigabytes_that_are_not_there_end_the_file(length):
    assert _core.png_pixel_data(struct.pack(">I", length) + b"IDATabc", 0) is None


def test_a_start_outside_of_the_file_is_refused():
    for start in (-1, 4, 2**63 - 1):
        with pytest.raises(ValueError, match=f"start: expected 0 to 3, got {start}"):
            _core.png_pixel_data(b"abc", start)


@pytest.mark.parametrize(
    ("body", "cut", "reason"),
    [
        (b"\0" + bytes(12), 0, "end after 13 of 26 bytes"),
        (b"\0" + bytes(39), 0, "SPACE"),
        (b"\7" + bytes(25), 0, "unknown filter"),
        (b"\0" + bytes(25), 14, "ends within its pixels"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, body, cut, reason):
    (tmp_path / "a.png").write_bytes(png(body, 4, 2, cut=cut))
    with pytest.raises(ImageError, match=reason):
        read_image(tmp_path / "a.png")


def test_a_wrong_checksum_of_the_pixels_is_found(tmp_path):
    data = bytearray(png(b"\0" + bytes(25), 4, 2))
    data[-12 - 4 - 1] ^= 1  # the last byte of the Adler-32
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ImageError, match="damaged PNG"):
        read_image(tmp_path / "a.png")
