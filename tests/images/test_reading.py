"""Every raster variant against an independent reader, any banding, and files that are damaged or hostile."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from histoseg_fast.errors import ImageError
from histoseg_fast.images import content as content_module
from histoseg_fast.images import open_image
from histoseg_fast.images.reading import SUFFIXES
from histoseg_fast.images.source import MAX_DECODED_PIXELS

RNG = np.random.default_rng(7)
SHARED = Path(os.environ.get("HISTOSEG_DATA", Path(__file__).parents[3] / "shared" / "data"))
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path, bands=None):
    with open_image(path) as source:
        out = np.full((source.height, source.width, 3), 99, np.uint8)
        for y0, y1 in bands or [(0, source.height)]:
            source.read_rows(y0, y1, out[y0:y1])
        return out


def picture(height=37, width=53, channels=3, dtype=np.uint8):
    """Smooth and noisy at once, so that lossy codecs and predictors both have something to do."""
    y, x, c = np.ogrid[:height, :width, :channels]
    top = np.iinfo(dtype).max
    wave = (np.sin(y / 9 + c) + np.cos(x / 7 - c) + 2) / 4
    return np.clip(wave * top + RNG.integers(0, top // 16, (height, width, channels)), 0, top).astype(dtype)


def over_white(colour, alpha):
    colour, alpha = colour.astype(float), alpha.astype(float)[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def narrow(v):
    return ((v.astype(np.int64) + 128) // 257).astype(np.uint8)


# ---------------------------------------------------------------- PNG, written by hand: PIL cannot write all kinds


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_bytes(width, height, depth, colour, rows, extra=b"", interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    pixels = zlib.compress(rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pack_rows(values, depth):
    """Rows of samples (h, n) as unfiltered PNG rows of `depth` bits."""
    if depth == 16:
        body = values.astype(">u2").view(np.uint8)
    elif depth == 8:
        body = values.astype(np.uint8)
    else:
        bits = (values[..., None] >> np.arange(depth - 1, -1, -1)) & 1
        body = np.packbits(bits.reshape(len(values), -1).astype(np.uint8), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in body)


def save(tmp_path, data, name="image.dat"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


W, H = 29, 17


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("transparent", [False, True])
def test_png_grey(tmp_path, depth, transparent):
    values = RNG.integers(0, 2**depth, (H, W))
    extra = chunk(b"tRNS", struct.pack(">H", int(values[0, 0]))) if transparent else b""
    got = read(save(tmp_path, png_bytes(W, H, depth, 0, pack_rows(values, depth), extra)))
    want = narrow(values) if depth == 16 else values * 255 // (2**depth - 1)
    want = np.where(values == values[0, 0], 255, want) if transparent else want
    assert (got == want[..., None]).all()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (2, 3), (6, 4)])
def test_png_colour_and_alpha(tmp_path, depth, colour, channels):
    values = RNG.integers(0, 2**depth, (H, W, channels))
    path = save(tmp_path, png_bytes(W, H, depth, colour, pack_rows(values.reshape(H, -1), depth)))
    eight = narrow(values) if depth == 16 else values.astype(np.uint8)
    want = over_white(eight[..., :-1], eight[..., -1]) if channels in (2, 4) else eight
    assert np.abs(read(path) - want.astype(float)).max() <= 0.5 + 1e-9
    with open_image(path) as source:
        assert bool(source.warnings) == (depth == 16)


@pytest.mark.parametrize("depth", [8, 16])
def test_png_rgb_with_a_transparent_colour_is_glass_there(tmp_path, depth):
    values = RNG.integers(0, 2**depth, (H, W, 3))
    extra = chunk(b"tRNS", struct.pack(">HHH", *(int(v) for v in values[3, 4])))
    got = read(save(tmp_path, png_bytes(W, H, depth, 2, pack_rows(values.reshape(H, -1), depth), extra)))
    assert (got[3, 4] == 255).all()
    assert (got[0, 0] == (narrow(values) if depth == 16 else values)[0, 0]).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", [False, True])
def test_png_palette(tmp_path, depth, transparent):
    values = RNG.integers(0, 2**depth, (H, W))
    palette = RNG.integers(0, 256, (2**depth, 3), dtype=np.uint8)
    alpha = RNG.integers(0, 256, 2**depth, dtype=np.uint8)
    extra = chunk(b"PLTE", palette.tobytes()) + (chunk(b"tRNS", alpha.tobytes()) if transparent else b"")
    got = read(save(tmp_path, png_bytes(W, H, depth, 3, pack_rows(values, depth), extra)))
    want = over_white(palette[values], alpha[values]) if transparent else palette[values].astype(float)
    assert np.abs(got - want).max() <= 0.5 + 1e-9


def test_png_alpha_agrees_with_pil(tmp_path):
    image = Image.fromarray(picture(channels=4), "RGBA")
    image.save(tmp_path / "a.png")
    want = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")).astype(int)
    assert np.abs(read(tmp_path / "a.png") - want).max() <= 1


@pytest.mark.parametrize("name", ["basn0g01", "basn2c08", "basn3p04"])
def test_png_interlaced(tmp_path, name):
    depth, colour = {"basn0g01": (1, 0), "basn2c08": (8, 2), "basn3p04": (4, 3)}[name]
    channels = 3 if colour == 2 else 1
    values = RNG.integers(0, 2**depth, (H, W, channels))
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        pack_rows(part.reshape(len(part), -1), depth) for y, x, dy, dx in passes if (part := values[y::dy, x::dx]).size
    )
    palette = RNG.integers(0, 256, (16, 3), dtype=np.uint8)
    extra = chunk(b"PLTE", palette.tobytes()) if colour == 3 else b""
    data = png_bytes(W, H, depth, colour, rows, extra, interlace=1)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (read(save(tmp_path, data)) == want).all()


def test_png_side_chunks_neither_matter_nor_cost(tmp_path, capfd):
    """A megabyte that unpacks to a gigabyte of profile or text is stepped over; nothing is printed."""
    values = picture()
    bomb = zlib.compress(bytes(2**26), 9)
    extra = chunk(b"iCCP", b"k\0\0" + bomb) + chunk(b"zTXt", b"k\0\0" + bomb) + chunk(b"gAMA", b"\0\0\0\1")
    data = png_bytes(53, 37, 8, 2, pack_rows(values.reshape(37, -1), 8), extra)
    assert (read(save(tmp_path, data)) == values).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2)])
def test_png_damage_is_told_and_not_printed(tmp_path, capfd, colour, channels):
    data = png_bytes(W, H, 8, colour, pack_rows(RNG.integers(0, 256, (H, W * channels)), 8))
    end = data.index(b"IEND") - 4
    for at in range(41, end - 4, 11):
        path = save(tmp_path, data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
        with pytest.raises(ImageError, match="damaged PNG"):
            read(path)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------- JPEG


def jpeg_bytes(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


JPEGS = {
    "baseline": ("RGB", {}),
    "full chroma": ("RGB", {"subsampling": 0}),
    "progressive": ("RGB", {"progressive": True}),
    "restart": ("RGB", {"restart_marker_rows": 1}),
    "adobe rgb": ("RGB", {"keep_rgb": True}),
    "grey": ("L", {}),
    "cmyk": ("CMYK", {}),
    "turned by exif": ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"}),
}


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg(tmp_path, name):
    mode, options = JPEGS[name]
    data = jpeg_bytes(Image.fromarray(picture()).convert(mode), **options)
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    path = save(tmp_path, data)
    assert np.abs(read(path) - want).max() <= (1 if mode == "CMYK" else 0)
    assert (read(path, [(0, 10), (5, 37)]) == read(path)).all()


def test_jpeg_ycck(tmp_path):
    import imagecodecs

    cmyk = np.asarray(Image.fromarray(picture()).convert("CMYK"))
    data = imagecodecs.jpeg8_encode(cmyk, colorspace="CMYK", outcolorspace="YCCK")
    want = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(read(save(tmp_path, data)) - want).max() <= 1


def test_jpeg_with_a_thumbnail_and_a_tail(tmp_path):
    """A whole JPEG in an APP segment, and bytes after the end, change nothing."""
    small = jpeg_bytes(Image.fromarray(picture(8, 8)))
    plain = jpeg_bytes(Image.fromarray(picture()))
    framed = plain[:2] + b"\xff\xe3" + struct.pack(">H", len(small) + 2) + small + plain[2:] + small
    assert (read(save(tmp_path, framed)) == read(save(tmp_path, plain, "plain"))).all()


# ---------------------------------------------------------------------------------------------------------- TIFF

TIFFS = {
    "strips": {"rowsperstrip": 5},
    "one strip": {},
    "tiles": {"tile": (16, 32)},
    "deflate strips": {"rowsperstrip": 7, "compression": "zlib"},
    "deflate tiles, predictor": {"tile": (16, 16), "compression": "zlib", "predictor": True},
    "lzw": {"rowsperstrip": 6, "compression": "lzw", "predictor": True},
    "packbits": {"rowsperstrip": 6, "compression": "packbits"},
    "lzma": {"tile": (32, 16), "compression": "lzma"},
    "zstd": {"tile": (32, 16), "compression": "zstd"},
    "big tiff": {"bigtiff": True, "tile": (16, 16), "compression": "zlib"},
    "big endian": {"byteorder": ">", "rowsperstrip": 4},
    "big endian, predictor": {"byteorder": ">", "compression": "zlib", "predictor": True, "rowsperstrip": 8},
}


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("layout", ["rgb", "separate", "grey", "rgb16", "separate16", "grey16"])
def test_tiff(tmp_path, kind, layout):
    dtype = np.uint16 if layout.endswith("16") else np.uint8
    pixels = picture(dtype=dtype)
    eight = narrow(pixels) if dtype == np.uint16 else pixels
    options = dict(TIFFS[kind], photometric="minisblack" if "grey" in layout else "rgb")
    if "separate" in layout:
        stored, options["planarconfig"] = np.ascontiguousarray(pixels.transpose(2, 0, 1)), "separate"
    elif "grey" in layout:
        stored, eight = pixels[..., 0], np.repeat(eight[..., :1], 3, axis=2)
    else:
        stored = pixels
    tifffile.imwrite(tmp_path / "t.tif", stored, **options)
    assert (read(tmp_path / "t.tif") == eight).all()
    assert (read(tmp_path / "t.tif", [(0, 11), (3, 20), (20, 37)]) == eight).all()


@pytest.mark.parametrize("extrasample", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("tiled", [False, True])
def test_tiff_alpha(tmp_path, extrasample, tiled):
    pixels = picture(channels=4)
    if extrasample == "assocalpha":
        pixels[..., :3] = np.minimum(pixels[..., :3], pixels[..., 3:])
    options = {"tile": (16, 16), "compression": "zlib"} if tiled else {}
    tifffile.imwrite(tmp_path / "t.tif", pixels, photometric="rgb", extrasamples=[extrasample], **options)
    colour, alpha = pixels[..., :3].astype(float), pixels[..., 3].astype(float)
    want = {
        "unassalpha": over_white(colour, alpha),
        "assocalpha": colour + 255 - alpha[..., None],
        "unspecified": colour,
    }[extrasample]
    assert np.abs(read(tmp_path / "t.tif") - want).max() <= 0.5 + 1e-9


def test_tiff_white_is_zero(tmp_path):
    for dtype in (np.uint8, np.uint16):
        pixels = picture(channels=1, dtype=dtype)[..., 0]
        tifffile.imwrite(tmp_path / "t.tif", pixels, photometric="miniswhite")
        eight = narrow(np.iinfo(dtype).max - pixels) if dtype == np.uint16 else 255 - pixels
        assert (read(tmp_path / "t.tif") == eight[..., None]).all()


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_palette(tmp_path, compression):
    indices = picture(channels=1)[..., 0]
    colours = RNG.integers(0, 256, (3, 256)).astype(np.uint16)
    for scale in (257, 256):  # both are written in the wild
        tifffile.imwrite(
            tmp_path / "t.tif",
            indices,
            photometric="palette",
            colormap=colours * np.uint16(scale),
            compression=compression,
        )
        assert (read(tmp_path / "t.tif") == colours.T[indices]).all()


NO_FAX = pytest.mark.skipif(not hasattr(imagecodecs, "ccittfax4_decode"), reason="this imagecodecs decodes no fax")
FAXES = [pytest.param(name, marks=NO_FAX) for name in ("group3", "group4")]


@pytest.mark.parametrize("compression", [None, *FAXES, "tiff_lzw", "packbits"])
def test_tiff_bilevel(tmp_path, compression):
    image = Image.fromarray(picture()).convert("1")
    image.save(tmp_path / "t.tif", compression=compression)
    assert (read(tmp_path / "t.tif") == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiff_whose_bits_run_backwards(tmp_path, compression):
    """Fill order 2: every byte of the file's pixels is mirrored."""
    path, pixels = tmp_path / "t.tif", picture()
    tifffile.imwrite(path, pixels, photometric="rgb", compression=compression, extratags=[(65000, "H", 1, 2, True)])
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count, tag = page.dataoffsets[0], sum(page.databytecounts), page.tags[65000].offset
    data = bytearray(path.read_bytes())
    struct.pack_into("<H", data, tag, 266)  # tifffile does not write this tag itself
    mirrored = [int(f"{byte:08b}"[::-1], 2) for byte in range(256)]
    data[offset : offset + count] = bytes(mirrored[byte] for byte in data[offset : offset + count])
    path.write_bytes(data)
    assert (tifffile.imread(path) == pixels).all()
    assert (read(path) == pixels).all()


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp"])
@pytest.mark.parametrize("tiled", [False, True])
def test_tiff_codecs_of_images(tmp_path, compression, tiled):
    pixels = picture(70, 90)
    options = {"tile": (32, 48)} if tiled else {"rowsperstrip": 16}
    args = {} if compression == "jpeg" else {"lossless": True} if compression == "webp" else {"level": 0}
    tifffile.imwrite(
        tmp_path / "t.tif", pixels, photometric="rgb", compression=compression, compressionargs=args, **options
    )
    want = tifffile.imread(tmp_path / "t.tif")
    assert np.abs(want.astype(int) - pixels).mean() < 12
    assert (read(tmp_path / "t.tif") == want).all()


def test_tiff_ycbcr_jpeg_of_pil(tmp_path):
    Image.fromarray(picture(64, 80)).save(tmp_path / "t.tif", compression="jpeg", quality=90)
    want = np.asarray(Image.open(tmp_path / "t.tif").convert("RGB")).astype(int)
    assert np.abs(read(tmp_path / "t.tif") - want).max() <= 1


def test_tiff_sparse_tiles_are_zero(tmp_path):
    def tiles():
        for index in range(6):
            yield None if index in (1, 4) else np.full((16, 16, 3), index + 9, np.uint8)

    tifffile.imwrite(
        tmp_path / "t.tif",
        tiles(),
        shape=(32, 48, 3),
        dtype=np.uint8,
        tile=(16, 16),
        photometric="rgb",
        compression="zlib",
    )
    got = read(tmp_path / "t.tif")
    assert (got == tifffile.imread(tmp_path / "t.tif")).all()
    assert (got[:16, 16:32] == 0).all()


def test_tiff_stack_says_that_it_reads_the_first_page(tmp_path):
    pixels = np.stack([picture(), picture()])
    tifffile.imwrite(tmp_path / "t.tif", pixels, photometric="rgb", metadata=None)
    with open_image(tmp_path / "t.tif") as source:
        assert "more than one page" in source.warnings[0]
    assert (read(tmp_path / "t.tif") == pixels[0]).all()


def test_tiff_pyramid_has_no_warning(tmp_path):
    with tifffile.TiffWriter(tmp_path / "t.tif") as writer:
        writer.write(picture(64, 64), tile=(16, 16), photometric="rgb", subifds=1)
        writer.write(picture(32, 32), tile=(16, 16), photometric="rgb", subfiletype=1)
    with open_image(tmp_path / "t.tif") as source:
        assert (source.width, source.height, source.warnings) == (64, 64, [])


@pytest.mark.parametrize(
    ("options", "shape", "dtype"),
    [
        ({"photometric": "minisblack"}, (20, 30), np.float32),
        ({"photometric": "minisblack"}, (20, 30), np.int16),
        ({"photometric": "minisblack"}, (20, 30), np.uint32),
        ({"photometric": "separated"}, (20, 30, 4), np.uint8),
        ({"photometric": "minisblack", "planarconfig": "contig"}, (20, 30, 5), np.uint8),
        ({"photometric": "rgb", "compression": "jpegxl"}, (20, 30, 3), np.uint8),
    ],
)
def test_tiff_that_is_not_supported(tmp_path, options, shape, dtype):
    tifffile.imwrite(tmp_path / "t.tif", np.zeros(shape, dtype), **options)
    with pytest.raises(ImageError, match="save"):
        open_image(tmp_path / "t.tif")


def test_tiff_jpeg_tile_that_is_cut_off(tmp_path):
    """libjpeg would fill the rest with grey."""
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, picture(64, 64), photometric="rgb", compression="jpeg", tile=(32, 32))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[3], file.pages[0].databytecounts[3]
    data = bytearray(path.read_bytes())
    data[offset + count - 20 : offset + count] = bytes(20)
    path.write_bytes(data)
    assert read_rows_of(path, 0, 32).any()
    with pytest.raises(ImageError, match="damaged TIFF"):
        read(path)


def read_rows_of(path, y0, y1):
    with open_image(path) as source:
        out = np.zeros((y1 - y0, source.width, 3), np.uint8)
        source.read_rows(y0, y1, out)
        return out


def test_tiff_bomb_meets_the_limit(tmp_path):
    """A 16 x 16 tile whose deflate stream unpacks to a gigabyte."""
    path = tmp_path / "t.tif"
    tifffile.imwrite(path, picture(16, 16), photometric="rgb", compression="zlib", tile=(16, 16))
    bomb = zlib.compress(bytes(2**26), 9)
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        offset, count = tags[324], tags[325]
        data = bytearray(data)
        struct.pack_into("<I", data, offset.valueoffset, len(data))
        struct.pack_into("<I" if count.dtype == 4 else "<H", data, count.valueoffset, min(len(bomb), 2**16 - 1))
    path.write_bytes(bytes(data) + bomb)
    tracemalloc.start()
    with pytest.raises(ImageError, match="damaged"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def claim(path, size, more=b""):
    """Make the first tile of a TIFF `size` bytes long, and append `more` to the file."""
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags[325].valueoffset
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, place, size)
    path.write_bytes(bytes(data) + more)


@pytest.mark.parametrize("held", [True, False])
def test_a_tile_takes_no_more_of_the_file_than_makes_sense(tmp_path, monkeypatch, held):
    if not held:
        monkeypatch.setattr(content_module, "WHOLE_FILE_BYTES", 1000)
    path, rgb = tmp_path / "t.tif", picture(256, 512)
    tifffile.imwrite(path, rgb, photometric="rgb", compression="zlib", tile=(256, 256))
    most = 2 * 256 * 256 * 3 + 2**16
    claim(path, most, bytes(2**25))  # what follows the pixels is no one's business
    np.testing.assert_array_equal(read(path), rgb)
    for size in (most + 1, 2**25):
        claim(path, size)
        with open_image(path) as source:
            tracemalloc.start()
            with pytest.raises(ImageError, match=rf"damaged TIFF data .*claims {size:,} bytes, at most {most:,}"):
                source.read_rows(0, 16, np.zeros((16, 512, 3), np.uint8))
            assert tracemalloc.get_traced_memory()[1] < 2**20
            tracemalloc.stop()


@pytest.mark.parametrize("compression", ["zlib", "jpeg", "jpeg2000", "webp", "lzw", "packbits", "zstd", "lzma"])
@pytest.mark.parametrize("side", [16, 512])
def test_tiles_of_noise_are_within_the_limit(tmp_path, compression, side):
    rgb = RNG.integers(0, 256, (side, side, 3), np.uint8)
    options = {"compressionargs": {"level": 100}} if compression in ("jpeg", "webp") else {}
    tifffile.imwrite(tmp_path / "t.tif", rgb, photometric="rgb", compression=compression, tile=(side, side), **options)
    assert read(tmp_path / "t.tif").shape == rgb.shape


@pytest.mark.parametrize("compression", FAXES)
def test_bits_that_no_fax_compresses_are_within_the_limit(tmp_path, compression):
    bits = np.indices((1024, 1024)).sum(0) % 2 == 0
    Image.fromarray(bits).save(tmp_path / "t.tif", compression=compression, tiffinfo={278: 1024})
    np.testing.assert_array_equal(read(tmp_path / "t.tif")[..., 0] == 255, bits)


def test_a_tile_is_held_encoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(content_module, "WHOLE_FILE_BYTES", 1000)
    path, rgb = tmp_path / "t.tif", RNG.integers(0, 256, (1024, 1024, 3), np.uint8)
    tifffile.imwrite(path, rgb, photometric="rgb", compression="zlib", tile=(1024, 1024))
    out = np.zeros_like(rgb)
    with open_image(path) as source:
        tracemalloc.start()
        source.read_rows(0, 1024, out)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 3.5 * rgb.nbytes, peak / rgb.nbytes
    np.testing.assert_array_equal(out, rgb)


@pytest.mark.parametrize("whole", [True, False])
def test_one_huge_strip_is_read_with_little_memory(tmp_path, monkeypatch, whole):
    if not whole:
        monkeypatch.setattr(content_module, "WHOLE_FILE_BYTES", 1000)
    height, width = 6000, 8000
    path = tmp_path / "t.tif"
    stored = tifffile.memmap(path, shape=(height, width, 3), dtype=np.uint8, photometric="rgb")
    stored[5000:5010] = 77
    stored.flush()
    del stored
    out = np.empty((600, width, 3), np.uint8)
    tracemalloc.start()
    with open_image(path) as source:
        for y in range(0, height - 100, 500):
            end = min(y + 600, height)
            source.read_rows(y, end, out[: end - y])
            if y == 5000:
                assert (out[:10] == 77).all() and not out[10:].any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (path.stat().st_size if whole else 0) + 20 * 2**20


# ------------------------------------------------------------------------------------------------- bands, memory


def sample_files(folder):
    """One small file of each way of reading."""
    pixels = picture(41, 35)
    image = Image.fromarray(pixels)
    image.save(folder / "rgb.png")
    image.convert("P").save(folder / "palette.png")
    image.save(folder / "base.jpg", quality=80)
    image.save(folder / "prog.jpg", quality=80, progressive=True)
    tifffile.imwrite(folder / "strips.tif", pixels, photometric="rgb", rowsperstrip=4)
    tifffile.imwrite(folder / "tiles.tif", pixels, photometric="rgb", tile=(16, 16), compression="zlib", predictor=True)
    tifffile.imwrite(folder / "jpeg.tif", pixels, photometric="rgb", tile=(16, 16), compression="jpeg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return sample_files(tmp_path_factory.mktemp("samples"))


@FAST
@given(data=st.data())
def test_any_banding_gives_the_same_rows(samples, data):
    path = data.draw(st.sampled_from(samples))
    whole = read(path)
    height, width = whole.shape[:2]
    with open_image(path) as source:
        y = 0
        while y < height:
            start = max(0, y - data.draw(st.integers(0, 9)))
            end = data.draw(st.integers(y + 1, height))
            gaps = data.draw(st.sampled_from([(1, 3), (2, 3), (1, 4), (1, 5)]))
            out = np.zeros((end - start, width * gaps[0], gaps[1]), np.uint8)[:, :: gaps[0], -3:]
            source.read_rows(start, end, out)
            assert (out == whole[start:end]).all()
            y = end


def test_rows_that_are_not_there(samples):
    with open_image(samples[0]) as source:
        for y0, y1 in [(-1, 2), (3, 2), (0, source.height + 1)]:
            with pytest.raises(ValueError):
                source.read_rows(y0, y1, np.zeros((max(0, y1 - y0), source.width, 3), np.uint8))
        with pytest.raises(ValueError):
            source.read_rows(0, 2, np.zeros((2, source.width, 4), np.uint8))
        with pytest.raises(ValueError):
            source.read_rows(0, 2, np.zeros((2, source.width, 3), np.int8))
        source.read_rows(2, 2, np.zeros((0, source.width, 3), np.uint8))


def test_what_a_source_says_of_its_file(samples):
    for path in samples:
        with open_image(str(path)) as source:
            assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
            assert source.size_bytes == path.stat().st_size
            assert source.path == path
            assert source.format == {".png": "png", ".jpg": "jpeg", ".tif": "tiff"}[path.suffix]
            assert (source.width, source.height) == (35, 41)


def test_a_file_over_the_limit_is_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(content_module, "WHOLE_FILE_BYTES", 1000)
    path = tmp_path / "t.tif"
    pixels = picture()
    tifffile.imwrite(path, pixels, photometric="rgb")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with open_image(path) as source:
        assert source.sha256 == digest
    assert (read(path) == pixels).all()
    source = open_image(path)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match="changed while it was read"):
        source.close()


# --------------------------------------------------------------------------------------------- damage and malice


@FAST
@given(data=st.data())
def test_a_file_cut_anywhere_is_told_or_whole(samples, data):
    path = data.draw(st.sampled_from(samples))
    stored = path.read_bytes()
    length = data.draw(st.integers(0, len(stored) - 1))
    check_damaged(path, stored[:length], exact=True)


def test_small_files_cut_at_every_length(samples):
    for path in samples:
        stored = path.read_bytes()
        step = 1 if len(stored) < 1500 else 7
        for length in range(0, len(stored), step):
            check_damaged(path, stored[:length], exact=True)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_escape(samples, data):
    """Pixels may differ (JPEG has no checksum), but nothing else than an ImageError comes out."""
    path = data.draw(st.sampled_from(samples))
    stored = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # headers at either end are where the interesting bytes are
        near = data.draw(st.integers(0, min(300, len(stored) - 1)))
        at = near if data.draw(st.booleans()) else len(stored) - 1 - near
        stored[at] = data.draw(st.integers(0, 255))
    check_damaged(path, bytes(stored), exact=False)


def check_damaged(path, damaged, *, exact):
    copy = path.with_name("damaged")
    copy.write_bytes(damaged)
    try:
        with open_image(copy) as source:
            if source.width * source.height > 2**22:
                return  # a flipped header byte; too slow to go on with
            out = np.zeros((source.height, source.width, 3), np.uint8)
            half = source.height // 2
            source.read_rows(0, half, out[:half])
            source.read_rows(half, source.height, out[half:])
    except ImageError as error:
        assert error.where == str(copy) and error.fix
        return
    finally:
        copy.unlink()
    if exact:
        assert (out == read(path)).all()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"\xff\xd8\xff", "damaged JPEG"),
        (b"hello, this is no picture", "not a PNG, JPEG or TIFF"),
        (b"\x89PNG\r\n\x1a\n", "header is incomplete"),
        (b"II*\0", "damaged TIFF"),
        (b"MM\0*\xff\xff\xff\xff", "damaged TIFF"),
        (png_bytes(0, 5, 8, 2, b""), "size of 0 x 5"),
        (png_bytes(2**31 - 1, 2**31 - 1, 8, 2, b""), "over the limit"),
        (png_bytes(16000, 16000, 8, 2, b""), "cannot hold"),
        (png_bytes(2**14 + 1, 2**14, 1, 0, bytes(2**22)), "tiled TIFF"),
        (png_bytes(5, 5, 3, 2, bytes(80)), "header is damaged"),
        (png_bytes(5, 5, 8, 2, bytes(79)), "damaged PNG"),
    ],
)
def test_one_clear_line(tmp_path, data, what):
    path = save(tmp_path, data, "scan.png")
    with pytest.raises(ImageError, match=what) as caught:
        read(path)
    assert caught.value.where == str(path)
    assert caught.value.fix
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("magic", "what"),
    [
        (b"hello, this is no picture", "is not a PNG, JPEG or TIFF file, nor a slide"),
        (b"II, this is no picture", "is not a PNG, JPEG or TIFF file, nor a slide"),
        (b"\x89PNG\r\n\x1a\n", "1,073,741,825 bytes are too many for this format; save it as a tiled TIFF"),
        (b"\xff\xd8\xff", "1,073,741,825 bytes are too many for this format; save it as a tiled TIFF"),
    ],
)
def test_what_cannot_be_read_is_refused_unread(tmp_path, monkeypatch, magic, what):
    path = save(tmp_path, magic)
    os.truncate(path, content_module.MAX_ENCODED_BYTES + 1)
    for read_all in ("sha256_of", "_read_whole"):
        monkeypatch.setattr(content_module, read_all, lambda *_: pytest.fail("it was read"))
    with pytest.raises(ImageError, match=what):
        open_image(path)


@pytest.mark.parametrize("name", ["a.png", "text.png", "a.jpg"])
def test_the_encoded_image_is_let_go_when_it_is_decoded(tmp_path, name):
    side, extra = 700, PngInfo()
    rgb = RNG.integers(0, 256, (side, side, 3), np.uint8)
    extra.add_text("a", "b" if name == "text.png" else "")
    options = {"quality": 100, "subsampling": 0} if name == "a.jpg" else {"pnginfo": extra}
    Image.fromarray(rgb).save(tmp_path / name, **options)
    size = (tmp_path / name).stat().st_size
    assert size > 2**20
    tracemalloc.start()
    source = open_image(tmp_path / name)
    source.read_rows(0, 1, np.zeros((1, side, 3), np.uint8))  # of these formats, all is decoded
    assert tracemalloc.get_traced_memory()[0] < rgb.nbytes + 2**19
    source.close()
    assert tracemalloc.get_traced_memory()[0] < 2**19
    tracemalloc.stop()


def test_a_closed_tiff_holds_no_bytes(tmp_path):
    rgb = RNG.integers(0, 256, (700, 700, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", rgb, photometric="rgb")
    read(tmp_path / "a.tif")  # what is imported for it
    tracemalloc.start()
    source = open_image(tmp_path / "a.tif")
    assert tracemalloc.get_traced_memory()[0] > rgb.nbytes
    source.close()
    assert tracemalloc.get_traced_memory()[0] < 2**19
    tracemalloc.stop()


def test_what_is_no_readable_file(tmp_path):
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="check the path"):
        open_image(tmp_path / "gone.png")
    with pytest.raises(ImageError, match="cannot be read"):
        open_image("nul\0byte.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ImageError, match="not a regular file"):
            open_image(tmp_path / "pipe.png")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = save(tmp_path, b"x")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ImageError, match="Permission denied; give this user the right"):
        open_image(path)


def test_an_interrupt_is_not_an_image_error(samples, monkeypatch):
    import imagecodecs

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(imagecodecs, "deflate_decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(next(p for p in samples if p.name == "rgb.png"))


def test_nothing_is_printed_about_odd_tags(tmp_path, capfd):
    tifffile.imwrite(tmp_path / "t.tif", picture(), photometric="rgb", rowsperstrip=4)
    data = bytearray((tmp_path / "t.tif").read_bytes())
    with tifffile.TiffFile(tmp_path / "t.tif") as file:
        tag = file.pages[0].tags[278]
    struct.pack_into("<H", data, tag.offset + 2, 200)  # a type that does not exist
    path = save(tmp_path, bytes(data))
    root = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(root)
    try:
        with pytest.raises(ImageError):
            read(path)
    finally:
        logging.getLogger().removeHandler(root)
    assert capfd.readouterr() == ("", "")


def test_import_is_light():
    code = "import sys, histoseg_fast.images; print(sorted({'tifffile', 'PIL', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_limits_fit_together():
    assert MAX_DECODED_PIXELS * 3 < 2**30
    assert ".svs" not in SUFFIXES


# ------------------------------------------------------------------------------------------------------ real images


@pytest.mark.skipif(not SHARED.is_dir(), reason="no folder of real images (set HISTOSEG_DATA)")
@pytest.mark.parametrize("folder", ["lung/images", "colon/images", "breast_tma", "unlabelled"])
def test_real_images(folder):
    paths = [path for path in sorted((SHARED / folder).iterdir()) if path.suffix.lower() in SUFFIXES]
    assert paths
    for path in paths:
        with Image.open(path) as image:
            if "A" in image.getbands():
                white = Image.new("RGBA", image.size, "white")
                want = np.asarray(Image.alpha_composite(white, image.convert("RGBA")).convert("RGB"))
            else:
                want = np.asarray(image.convert("RGB"))
            tolerance = 1 if "A" in image.getbands() else 0
        assert np.abs(read(path).astype(int) - want).max() <= tolerance, path
