"""Writers: right pixels, bytes that do not depend on the banding, and whole files or none."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import tracemalloc

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histoseg_fast.errors import ImageError
from histoseg_fast.images import (
    GeojsonWriter,
    MaskWriter,
    OutlineOptions,
    OverlayWriter,
    OverviewWriter,
    ProbabilityWriter,
    PyramidWriter,
    open_image,
    writing,
)
from histoseg_fast.labels import PAPER_PALETTE

PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
RNG = np.random.default_rng(3)
NAMES = ["background", "cancer", "stroma"]


def class_map(height, width):
    y, x = np.ogrid[:height, :width]
    field = np.sin(y / 11) + np.cos(x / 17) + RNG.normal(0, 0.1, (height, width))
    return np.digitize(field, [-0.5, 0.6]).astype(np.uint8)


def in_bands(writer, rows, cuts, axis=0):
    """Feed `rows` cut at `cuts`; the digest that `finish` gives."""
    for band in np.split(rows, sorted(cuts), axis=axis):
        writer.write_rows(band)
    return writer.finish()


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".partial")]


def make(kind, path, width, height):
    if kind == "mask":
        return MaskWriter(path, width, height, PALETTE)
    if kind == "pyramid":
        return PyramidWriter(path, width, height, PAPER_PALETTE)
    if kind == "overview":
        return OverviewWriter(path, width, height, PAPER_PALETTE, 90, 1, None)
    if kind == "geojson":
        return GeojsonWriter(path, width, height, NAMES, PALETTE, OutlineOptions(0))
    return OverlayWriter(path, width, height) if kind == "overlay" else ProbabilityWriter(path, width, height, NAMES)


def rows_for(kind, width, height):
    classes = class_map(height, width)
    if kind in ("mask", "geojson", "pyramid", "overview"):
        return classes, 0
    if kind == "overlay":
        return PALETTE[classes], 0
    return RNG.integers(0, 256, (3, height, width), dtype=np.uint8), 1


KINDS = ["mask", "overlay", "geojson", "probabilities", "pyramid", "overview"]


# ---------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize(("height", "width"), [(1, 1), (37, 53), (720, 1128)])
def test_mask_is_a_palette_png(tmp_path, height, width):
    classes = class_map(height, width)
    digest = in_bands(MaskWriter(tmp_path / "m.png", width, height, PALETTE), classes, [height // 3])
    assert digest == hashlib.sha256((tmp_path / "m.png").read_bytes()).hexdigest()
    with Image.open(tmp_path / "m.png") as image:
        assert image.mode == "P"
        assert (np.asarray(image) == classes).all()
        assert image.getpalette()[:9] == PALETTE.ravel().tolist()
        assert (np.asarray(image.convert("RGB")) == PALETTE[classes]).all()
    with open_image(tmp_path / "m.png") as source:
        out = np.empty((height, width, 3), np.uint8)
        source.read_rows(0, height, out)
    assert (out == PALETTE[classes]).all()


@settings(max_examples=40, deadline=None)
@given(data=st.data(), chunk=st.sampled_from([1, 500, 5000, 2**22]))
def test_mask_bytes_depend_on_the_class_map_alone(tmp_path_factory, data, chunk):
    folder = tmp_path_factory.mktemp("mask")
    height, width = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 120))
    classes = class_map(height, width)
    cuts = data.draw(st.lists(st.integers(0, height), max_size=8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "MASK_CHUNK_BYTES", chunk)
        whole = in_bands(MaskWriter(folder / "a.png", width, height, PALETTE), classes, [])
        strided = np.repeat(classes, 2, axis=1)[:, ::2]
        cut = in_bands(MaskWriter(folder / "b.png", width, height, PALETTE), strided, cuts)
    assert cut == whole
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    assert (np.asarray(Image.open(folder / "b.png")) == classes).all()


def test_a_mask_of_many_chunks_needs_little_memory(tmp_path):
    width, height = 20000, 3000
    band = class_map(100, width)
    digests = []
    for step in (100, 37):
        tracemalloc.start()
        writer = MaskWriter(tmp_path / "m.png", width, height, PALETTE)
        for y in range(0, height, step):
            writer.write_rows(np.take(band, np.arange(y, min(y + step, height)) % 100, axis=0))
        digests.append(writer.finish())
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()
    assert digests[0] == digests[1]
    with Image.open(tmp_path / "m.png") as image:
        assert (np.asarray(image.crop((0, 2900, width, 3000))) == band).all()


def test_mask_refuses_what_it_cannot_show(tmp_path):
    with pytest.raises(ValueError, match="has no colour"), MaskWriter(tmp_path / "m.png", 4, 4, PALETTE) as writer:
        writer.write_rows(np.full((4, 4), 3, np.uint8))
    for colours in (PALETTE.astype(int), PALETTE[:0], np.zeros((257, 3), np.uint8), PALETTE[:, :2]):
        with pytest.raises(ValueError, match="colours"):
            MaskWriter(tmp_path / "m.png", 4, 4, colours)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- overlays


@pytest.mark.parametrize("cuts", [[], [1, 7, 8, 30]])
def test_overlay_is_a_jpeg_of_the_rows(tmp_path, cuts):
    rows = PALETTE[class_map(61, 83)]
    writer = OverlayWriter(tmp_path / "o.jpg", 83, 61)
    digest = in_bands(writer, rows, cuts)
    assert digest == hashlib.sha256((tmp_path / "o.jpg").read_bytes()).hexdigest()
    with Image.open(tmp_path / "o.jpg") as image:
        assert (image.format, image.size, image.mode) == ("JPEG", (83, 61), "RGB")
        assert np.abs(np.asarray(image).astype(int) - rows).mean() < 12


@settings(max_examples=40, deadline=None)
@given(data=st.data(), side=st.integers(5, 70))
def test_large_overlays_keep_every_nth_pixel(tmp_path_factory, data, side):
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    rows = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "OVERLAY_MAX_SIDE", side)
        writer = OverlayWriter(tmp_path_factory.mktemp("overlay") / "o.jpg", width, height)
    for band in np.split(rows, sorted(data.draw(st.lists(st.integers(0, height), max_size=6)))):
        writer.write_rows(band)
    assert (writer._pixels == rows[:: writer.factor, :: writer.factor]).all()
    assert max(writer._pixels.shape[:2]) <= side
    assert writer.factor == 1 or -(-max(height, width) // (writer.factor - 1)) > side
    writer.finish()


# -------------------------------------------------------------------------------------------------- probabilities


@settings(max_examples=40, deadline=None)
@given(data=st.data(), big=st.booleans(), classes=st.integers(1, 4))
def test_probabilities_open_in_tifffile_and_pil(tmp_path_factory, data, big, classes):
    folder = tmp_path_factory.mktemp("probabilities")
    height, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 50))
    rows = RNG.integers(0, 256, (classes, height, width), dtype=np.uint8)
    cuts = data.draw(st.lists(st.integers(0, height), max_size=6))
    names = [f"class {index}" for index in range(classes)]
    digests = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "STRIP_BYTES", data.draw(st.sampled_from([1, 100, 2**18])))
        patch.setattr(writing, "CLASSIC_TIFF_BYTES", 0 if big else 2**31)
        for name, at in (("a.tif", cuts), ("b.tif", [])):
            digests.append(in_bands(ProbabilityWriter(folder / name, width, height, names), rows, at, axis=1))
    assert digests[0] == digests[1] == hashlib.sha256((folder / "a.tif").read_bytes()).hexdigest()
    with tifffile.TiffFile(folder / "a.tif") as file:
        assert file.is_bigtiff == big
        assert [page.tags[285].value for page in file.pages] == names
        assert (file.asarray().reshape(rows.shape) == rows).all()
    with Image.open(folder / "a.tif") as image:
        assert image.n_frames == classes
        for index in range(classes):
            image.seek(index)
            assert (np.asarray(image) == rows[index]).all()
    with open_image(folder / "a.tif") as source:
        out = np.empty((height, width, 3), np.uint8)
        source.read_rows(0, height, out)
    assert (out == rows[0][..., None]).all()


def test_probabilities_need_little_memory(tmp_path):
    width, height = 20000, 2000
    band = RNG.integers(0, 4, (3, 100, width), dtype=np.uint8)
    tracemalloc.start()
    with ProbabilityWriter(tmp_path / "p.tif", width, height, NAMES) as writer:
        for _ in range(height // 100):
            writer.write_rows(band)
        writer.finish()
    assert tracemalloc.get_traced_memory()[1] < 12 * 2**20
    tracemalloc.stop()
    assert tifffile.imread(tmp_path / "p.tif", key=2)[-100:].tobytes() == band[2].tobytes()


# -------------------------------------------------------------------------------------------- whole files or none


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_appears_before_finish(tmp_path, kind):
    path = tmp_path / "sub" / "file"
    rows, axis = rows_for(kind, 40, 30)
    first, rest = np.split(rows, [20], axis=axis)
    with make(kind, path, 40, 30) as writer:
        writer.write_rows(first)
        assert not path.exists()
        assert leftovers(path.parent)
        writer.write_rows(rest)
        writer.finish()
    assert path.exists() and not leftovers(path.parent)
    with pytest.raises(ValueError, match="already closed"):
        writer.finish()


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_stays_when_it_fails(tmp_path, kind):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    rows, axis = rows_for(kind, 40, 30)
    part = np.split(rows, [20], axis=axis)[0]

    writer = make(kind, path, 40, 30)
    writer.write_rows(part)
    writer.abort()
    writer.abort()

    with pytest.raises(KeyboardInterrupt), make(kind, path, 40, 30) as writer:
        writer.write_rows(part)
        raise KeyboardInterrupt

    writer = make(kind, path, 40, 30)
    writer.write_rows(part)
    with pytest.raises(ValueError, match="20 of 30 rows"):
        writer.finish()

    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_fit(tmp_path, kind):
    rows, _ = rows_for(kind, 40, 30)
    with make(kind, tmp_path / "file", 40, 30) as writer:
        writer.write_rows(rows)
        for bad in (rows, rows.astype(int), rows[..., :1], rows[0]):
            with pytest.raises(ValueError, match="do not fit"):
                writer.write_rows(bad)
        writer.finish()
    with pytest.raises(ValueError, match="cannot be written"):
        make(kind, tmp_path / "other", 0, 30)


class FullDisk(io.BytesIO):
    """Takes `room` bytes and then behaves like a full disk."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 200, 900])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch, kind, room):
    genuine = writing.atomic_write

    @contextlib.contextmanager
    def full(path):
        with genuine(path) as stream:
            disk = FullDisk(room)
            disk.name = stream.name
            yield disk

    monkeypatch.setattr(writing, "atomic_write", full)
    rows, _ = rows_for(kind, 140, 130)
    told = pytest.raises(ImageError, match="file: cannot be written: No space left on device")
    with told, make(kind, tmp_path / "file", 140, 130) as writer:
        writer.write_rows(rows)
        writer.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_made(tmp_path, kind):
    (tmp_path / "taken").write_bytes(b"a file")
    with pytest.raises(ImageError, match="cannot be written"):
        make(kind, tmp_path / "taken" / "file", 4, 4)
    (tmp_path / "folder").mkdir()
    rows, _ = rows_for(kind, 40, 30)
    with pytest.raises(ImageError, match="cannot be written"), make(kind, tmp_path / "folder", 40, 30) as writer:
        writer.write_rows(rows)
        writer.finish()
    assert not leftovers(tmp_path)
