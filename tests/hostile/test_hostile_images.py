"""Images that claim more than they are: refused in one line, in little memory, or read as far as they are sound."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from confined import confined, read, read_all
from PIL import Image
from slide_files import noise, write_pyramid

from histoseg_fast.errors import HistosegError
from histoseg_fast.images import open_image, tiff, tiff_slide
from histoseg_fast.images.jpeg import MAX_SCANS

BOMB_BYTES = 1 << 28
"""Decoded; twice what a reader may take in these tests."""


def tiled(path: Path, payload: bytes, compression: str, side: int = 16) -> Path:
    """A TIFF of one tile of `side` pixels that holds `payload`."""
    options = {"tile": (side, side), "compression": compression, "photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, iter([payload]), shape=(side, side, 3), dtype=np.uint8, **options)
    return path


def zeros(begin: Callable[[], object]) -> bytes:
    """`BOMB_BYTES` zeros through a compressor of Python's, without having them in memory."""
    packer, block = begin(), bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(BOMB_BYTES >> 20)), packer.flush()])


def lzma_zeros() -> bytes:
    import lzma

    return zeros(lambda: lzma.LZMACompressor(preset=0))


def webp_zeros() -> bytes:
    return bytes(imagecodecs.webp_encode(np.zeros((8_000, 9_000, 3), np.uint8), lossless=True, level=0))


def jpeg2000_claims(offset: int, form: str, value: int) -> bytes:
    """A codestream of 16 x 16 x 3 whose header has another number."""
    data = bytearray(imagecodecs.jpeg2k_encode(np.zeros((16, 16, 3), np.uint8), codecformat="j2k"))
    struct.pack_into(form, data, data.index(b"\xff\x4f\xff\x51") + offset, value)
    return bytes(data)


def jpeg_claims(side: int) -> bytes:
    data = bytearray(imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8)))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, side, side)
    return bytes(data)


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "deflate": ("zlib", lambda: zeros(lambda: zlib.compressobj(6))),
    "lzw": ("lzw", lambda: bytes(imagecodecs.lzw_encode(bytes(BOMB_BYTES)))),
    "packbits": ("packbits", lambda: b"\x81\0" * (BOMB_BYTES // 128)),
    "zstd": ("zstd", lambda: bytes(imagecodecs.zstd_encode(bytes(BOMB_BYTES), level=1))),
    "lzma": ("lzma", lzma_zeros),
    "jpeg": ("jpeg", lambda: jpeg_claims(65_000)),
    "webp": ("webp", webp_zeros),
    "jpeg 2000, size": ("jpeg2000", lambda: jpeg2000_claims(8, ">I", 60_000)),
    "jpeg 2000, channels": ("jpeg2000", lambda: jpeg2000_claims(40, ">H", 16_384)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_tile_that_unpacks_to_a_bomb(tmp_path: Path, kind: str) -> None:
    compression, make = BOMBS[kind]
    path = tiled(tmp_path / "bomb.tif", make(), compression)
    assert path.stat().st_size < BOMB_BYTES >> 5
    try:
        assert confined(read, path) == (16, 16) and kind in ("lzw", "lzma")  # they stop where the tile is full
    except HistosegError as error:
        assert f"{path}: damaged TIFF data" in str(error)


def test_the_size_of_a_webp_is_read_in_each_of_its_kinds(tmp_path: Path) -> None:
    alpha = noise(40, 30)[..., [0, 1, 2, 0]]
    for name, pixels, options in (
        ("VP8 ", noise(40, 30), {"level": 80, "lossless": False}),
        ("VP8L", noise(40, 30), {"lossless": True}),
        ("VP8X", alpha, {"level": 80, "lossless": False}),
    ):
        data = bytes(imagecodecs.webp_encode(np.ascontiguousarray(pixels), **options))
        assert data[12:16] == name.encode() and tiff._webp_size(data) == (30, 40)
    for data in (b"", b"RIFF", b"RIFF\0\0\0\0WEBPVP9 " + bytes(40)):
        with pytest.raises(ValueError, match="WebP"):
            tiff._webp_size(data)


def test_a_strip_of_bits_is_counted_as_it_is_decoded(tmp_path: Path) -> None:
    """Four kilobytes of fax that would take three gigabytes as RGB."""
    Image.new("1", (32_000, 32_000)).save(tmp_path / "fax.tif", compression="group4", tiffinfo={278: 32_000})
    assert (tmp_path / "fax.tif").stat().st_size < 10_000
    with pytest.raises(HistosegError, match="strip or tile takes 3,072,000,000 bytes of memory; save it as a tiled"):
        confined(read, tmp_path / "fax.tif")


def test_a_row_of_large_tiles_is_counted(tmp_path: Path) -> None:
    side, count = 16_384, 3
    tile = zlib.compress(bytes(100))  # it is not looked at
    tifffile.imwrite(
        tmp_path / "t.tif", (tile for _ in range(count)), shape=(side, count * side, 3), dtype=np.uint8,
        tile=(side, side), compression="zlib", photometric="rgb",
    )  # fmt: skip
    with pytest.raises(HistosegError, match="a row of TIFF tiles takes 2,415,919,104 bytes of memory; use smaller"):
        confined(read, tmp_path / "t.tif")


def test_what_scanners_write_is_within_the_limits() -> None:
    assert tiff.MAX_ROW_BYTES > 370_000 * 1024 * 3 and tiff.MAX_ROW_BYTES > 100_000 * 4096 * 3
    assert tiff.MAX_SEGMENT_BYTES > 4096**2 * 3


# -- directories of TIFF ------------------------------------------------------------------------------

GEO_TAGS = [
    (33550, "d", 3, (1.0, 1.0, 0.0), True),
    (33922, "d", 6, (0.0,) * 6, True),
    (34735, "H", 4, (1, 1, 0, 0), True),
]
GEO_TAGS += [(34737, "s", 5, "name|", True), (65000, "B", 4, b"abcd", True)]


@pytest.fixture(scope="module")
def geotiff(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("geo") / "t.tif"
    tifffile.imwrite(path, noise(32, 48), tile=(16, 16), photometric="rgb", extratags=GEO_TAGS, compression="zlib")
    return path.read_bytes()


def tags(data: bytes) -> Iterator[tuple[int, int]]:
    """Number and place of each entry in the first directory of a little-endian classic TIFF."""
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    for i in range(count):
        place = first + 2 + 12 * i
        yield struct.unpack_from("<H", data, place)[0], place


@pytest.mark.parametrize("count", [2**32 - 1, 2**31, 2**24, 0])
def test_tags_that_claim_any_count(tmp_path: Path, geotiff: bytes, count: int) -> None:
    """Every tag in turn, GeoTIFF's too, says that its values fill gigabytes, from anywhere."""
    assert {33550, 34735, 324, 325, 270} <= {number for number, _ in tags(geotiff)}
    paths = []
    for number, place in tags(geotiff):
        for kind in (2, 3, 12):
            data = bytearray(geotiff)
            struct.pack_into("<HI", data, place + 2, kind, count)
            paths.append(tmp_path / f"{number}-{kind}.tif")
            paths[-1].write_bytes(data)
    answers = confined(read_all, paths)
    for path, answer in zip(paths, answers, strict=True):
        assert answer == (48, 32) or answer.startswith(f"{path}: "), answer
        assert "not enough memory" not in answer
    assert (48, 32) in answers


def test_directories_that_lead_in_a_circle(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "t.tif", [noise(128, 128), noise(64, 64)])
    data = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, first)
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    path.write_bytes(data)
    with open_image(path) as image:
        assert (image.width, image.height) == (128, 128)


def test_a_pyramid_of_a_thousand_levels(tmp_path: Path) -> None:
    """Each a pixel smaller: only the first pages are looked at."""
    count = 1000
    with tifffile.TiffWriter(tmp_path / "t.tif") as file:
        for i in range(count):
            file.write(
                np.zeros((count + 100 - i,) * 2, np.uint8), tile=(512, 512), compression="zlib", subfiletype=min(i, 1),
                photometric="minisblack", metadata=None, maxworkers=1,
            )  # fmt: skip
    with tifffile.TiffFile(tmp_path / "t.tif") as file:
        assert len(tiff_slide.level_pages(file)) <= tiff_slide.MAX_PAGES + 1
    assert confined(levels, tmp_path / "t.tif") <= tiff_slide.MAX_PAGES + 1


def levels(path: Path) -> int:
    with open_image(path) as image:
        return len(image._levels)


@pytest.mark.parametrize(
    "data",
    [
        b"II*\0" + struct.pack("<I", 2**32 - 1),
        b"II*\0" + struct.pack("<IH", 8, 65_535),
        b"II*\0" + struct.pack("<IH", 8, 65_535) + struct.pack("<HHII", 256, 4, 1, 1) * 65_535,
        b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 2**63),
        b"II+\0" + struct.pack("<HHQ", 8, 0, 2**64 - 1),
        b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 3) + struct.pack("<HHQQ", 256, 16, 2**61, 8) * 3 + bytes(8),
        b"MM\0+" + struct.pack(">HHQQ", 2**15, 0, 16, 1),
    ],
)
def test_headers_of_gigabytes_in_tiff(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "t.tif").write_bytes(data)
    with pytest.raises(HistosegError, match=r"t\.tif: "):
        confined(read, tmp_path / "t.tif")


# -- PNG, JPEG, DICOM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"PLTE", b"IDAT", b"tRNS"])
@pytest.mark.parametrize("length", [2**31 - 1, 2**32 - 1])
def test_a_png_chunk_of_gigabytes(tmp_path: Path, kind: bytes, length: int) -> None:
    head = struct.pack(">I4sIIBBBBB", 13, b"IHDR", 5, 5, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", zlib.crc32(head[4:]))
    (tmp_path / "x.png").write_bytes(data + struct.pack(">I", length) + kind + bytes(100))
    with pytest.raises(HistosegError, match=r"x\.png: (damaged PNG|the PNG ends)"):
        confined(read, tmp_path / "x.png")


def progressive(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes over and over, until there are `scans`."""
    stream = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(stream, "JPEG", progressive=True)
    return repeat_last_scan(stream.getvalue(), scans)


def repeat_last_scan(data: bytes, scans: int) -> bytes:
    """The JPEG with its last scan over and over, until there are `scans`."""
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (scans - data.count(b"\xff\xda")) + data[-2:]


def test_a_jpeg_of_very_many_scans(tmp_path: Path) -> None:
    """Each costs a pass over the whole image, however few bytes it has."""
    path = tmp_path / "x.jpg"
    path.write_bytes(progressive(MAX_SCANS))
    assert confined(read, path) == (64, 64)
    path.write_bytes(progressive(MAX_SCANS + 1))
    with pytest.raises(HistosegError, match=f"more than {MAX_SCANS} JPEG scans"):
        confined(read, path)
    for scans, told in ((MAX_SCANS + 1, f"more than {MAX_SCANS} JPEG scans"), (10_000, "a strip or tile claims")):
        tiled(tmp_path / "x.tif", progressive(scans), "jpeg", 64)
        with pytest.raises(HistosegError, match=told):
            confined(read, tmp_path / "x.tif")


@pytest.mark.parametrize(("height", "width"), [(65_500, 65_500), (0, 16), (16, 0)])
def test_a_jpeg_of_any_claimed_size(tmp_path: Path, height: int, width: int) -> None:
    data = bytearray(imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8)))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    (tmp_path / "x.jpg").write_bytes(data)
    with pytest.raises(HistosegError, match=r"over the limit|claims a size of"):
        confined(read, tmp_path / "x.jpg")


def test_a_dicom_element_of_gigabytes(tmp_path: Path) -> None:
    """Looked at for its series as the folder is searched, and then opened."""
    element = struct.pack("<HH2sHI", 8, 0x16, b"OB", 0, 2**32 - 2)
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM" + element + bytes(100))
    (tmp_path / "y.dcm").write_bytes(bytes(128) + b"DICM" + element + bytes(100))
    assert confined(found, tmp_path) == ["x.dcm", "y.dcm"]
    with pytest.raises(HistosegError, match=r"x\.dcm: "):
        confined(read, tmp_path / "x.dcm", room=2 << 30)  # OpenSlide runs in a process of its own, which needs some


def found(folder: Path) -> list[str]:
    from histoseg_fast.pipeline.sources import find_sources

    return [source.name for source in find_sources([str(folder)], folder / "out")]


def largest_png() -> bytes:
    """Two megabytes of RGBA of 16 bits."""
    side = 2**14
    packer, row = zlib.compressobj(6), bytes(1 + 8 * side)
    rows = b"".join([*(packer.compress(row * 64) for _ in range(side // 64)), packer.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def largest_jpeg() -> bytes:
    """Under two megabytes, with as many scans as are allowed."""
    stream = io.BytesIO()
    Image.new("RGB", (2**14, 2**14)).save(stream, "JPEG", progressive=True)
    return repeat_last_scan(stream.getvalue(), MAX_SCANS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_the_costliest_files_within_the_limits_take_three_gigabytes_at_most(tmp_path: Path, name: str) -> None:
    data = largest_png() if name == "x.png" else largest_jpeg()
    assert len(data) < 3 << 20
    (tmp_path / name).write_bytes(data)
    assert confined(read, tmp_path / name, room=3 << 30) == (2**14, 2**14)
