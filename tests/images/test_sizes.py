"""The size of an image from a few bytes of its file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from running import picture

from histoseg_fast.images import open_image
from histoseg_fast.images import sizes as module
from histoseg_fast.images.companions import dicom_series
from histoseg_fast.images.sizes import MAX_SEGMENTS, PIXELS_A_BYTE, image_pixels

HEIGHT, WIDTH = 61, 83


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with `segments` behind its first marker."""
    encoded = imagecodecs.jpeg8_encode(picture(0, HEIGHT, WIDTH))
    return encoded[:2] + b"".join(segments) + encoded[2:]


def segment(code: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(body) + 2) + body


def tiff(pages: int = 1, **options: object) -> bytes:
    """Pages of 1, 1/2, 1/3, ... of the size, the largest last."""
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, **options) as writer:
        for i in range(pages, 0, -1):
            writer.write(picture(0, HEIGHT // i, WIDTH // i), photometric="rgb")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        imagecodecs.png_encode(picture(0, HEIGHT, WIDTH)),
        jpeg(),
        jpeg(segment(0xE2, b"\xff\xc0 a profile " * 5000), b"\xff\xff" + segment(0xFE, b"fill bytes"), b"\xff\x01"),
        tiff(),
        tiff(byteorder=">"),
        tiff(bigtiff=True),
        tiff(pages=3),
    ],
    ids=["png", "jpeg", "jpeg, profile", "tiff", "big-endian", "bigtiff", "label first"],
)
def test_headers_tell(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a image.xyz"
    path.write_bytes(content)
    assert image_pixels(path) == (HEIGHT * WIDTH, True)


def test_they_tell_what_the_reader_finds(tmp_path: Path, real_data: Path) -> None:
    """Of slides that the reader opens at another resolution: the finest level."""
    paths = [p for p in sorted(real_data.rglob("*")) if p.suffix.lower() in {".png", ".jpg", ".tif", ".svs", ".ndpi"}]
    for path in paths[:: max(1, len(paths) // 40)]:
        pixels, known = image_pixels(path)
        with open_image(path) as image:
            assert known and pixels == image.width * image.height, path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 2**31 - 1, 2**31 - 1),
        b"\xff\xd8\xff",
        b"\xff\xd8" + b"\xff\xfe\x00\x02" * (MAX_SEGMENTS + 5),
        b"\xff\xd8" + segment(0xC0, b"\x08" + b"\xff" * 4),
        b"\xff\xd8\xff\xe0\x00\x04\x00\x00no marker",
        b"II*\0" + b"\xff" * 20,
        b"II*\0\x08\0\0\0" + b"\0" * 20,
        b"MM\0+" + bytes(range(40)),
        tiff()[:60],
        b"\0" * 128 + b"DICM" + b"\0" * 40,
    ],
)
def test_what_no_header_tells_is_guessed_from_the_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert image_pixels(path) == (PIXELS_A_BYTE * len(content), False)


def test_all_files_of_a_slide_count(tmp_path: Path) -> None:
    """The index of an MRXS is a JPEG, which says nothing of the slide."""
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "Data0000.dat").write_bytes(bytes(10_000))
    index = jpeg()
    (tmp_path / "s.mrxs").write_bytes(index)
    assert image_pixels(tmp_path / "s.mrxs") == (PIXELS_A_BYTE * (10_000 + len(index)), False)


def test_what_is_no_file_weighs_nothing_or_its_entry(tmp_path: Path) -> None:
    assert image_pixels(tmp_path / "missing.png") == (0, False)
    (tmp_path / "gone.png").symlink_to(tmp_path / "missing.png")
    assert image_pixels(tmp_path / "gone.png") == (0, False)


def test_a_damaged_dicom_file_is_of_no_series(tmp_path: Path) -> None:
    """Found by fuzzing: pydicom raises an error of its own for a length that is not whole numbers."""
    pytest.importorskip("pydicom")
    path = tmp_path / "a.dcm"
    path.write_bytes(bytes(128) + b"DICM" + bytes.fromhex("0200 0000 008f 0000 001e48") + bytes(75))
    assert dicom_series(path) is None
    assert image_pixels(path) == (PIXELS_A_BYTE * path.stat().st_size, False)


@pytest.mark.parametrize("kind", ["png", "jpeg", "tiff"])
def test_little_of_a_large_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    size, read = 4_000_000, []
    pixels = np.random.default_rng(0).integers(0, 256, (800, 900, 3), np.uint8)
    if kind == "tiff":
        tifffile.imwrite(tmp_path / "a", pixels, photometric="rgb")
    else:
        (tmp_path / "a").write_bytes(imagecodecs.png_encode(pixels) if kind == "png" else
                                     imagecodecs.jpeg8_encode(pixels, level=100) + bytes(size))  # fmt: skip

    class Counted(io.FileIO):
        def read(self, count: int = -1) -> bytes:
            data = super().read(count)
            read.append(len(data))
            return data

        def readinto(self, target: object) -> int:
            count = super().readinto(target)
            read.append(count)
            return count

    monkeypatch.setattr(module, "open_regular", lambda path: Counted(path, "rb"))
    assert image_pixels(tmp_path / "a") == (800 * 900, True)
    assert 0 < sum(read) < 8192 < (tmp_path / "a").stat().st_size
