"""The class map of a slide: every level right in every reader, bytes that follow from the map alone, little memory."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import ome_types
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from histoseg_fast.images import PyramidWriter, open_image, pyramid
from histoseg_fast.labels import PAPER_PALETTE, Palette


def class_map(seed: int, height: int, width: int) -> np.ndarray:
    """Patches of three classes, each a few pixels wide, and areas of one class."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (height // 7 + 1, width // 7 + 1), np.uint8)
    coarse[: len(coarse) // 2] *= rng.integers(0, 2, dtype=np.uint8)
    return coarse.repeat(7, 0).repeat(7, 1)[:height, :width]


def write(path: Path, ids: np.ndarray, cuts: list[int] | None = None, mpp: float | None = 0.4987) -> str:
    writer = PyramidWriter(path, ids.shape[1], ids.shape[0], PAPER_PALETTE, mpp)
    for band in np.split(ids, sorted(cuts or [])):
        writer.write_rows(band)
    return writer.finish()


def levels_of(ids: np.ndarray, tile: int) -> list[np.ndarray]:
    levels = [ids]
    while max(levels[-1].shape) > tile:
        levels.append(ids[:: 2 ** len(levels), :: 2 ** len(levels)])
    return levels


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    cuts=st.lists(st.integers(0, 200), max_size=8),
    tile=st.sampled_from([16, 32, 64, 512]),
    big=st.booleans(),
    seed=st.integers(0, 9),
)
def test_every_level_whatever_the_bands(tmp_path_factory, size, cuts, tile, big, seed):
    folder, ids = tmp_path_factory.mktemp("pyramid"), class_map(seed, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pyramid, "TILE_SIDE", tile)
        patch.setattr(pyramid, "CLASSIC_TIFF_BYTES", 0 if big else 2**32)
        whole = write(folder / "a.ome.tif", ids)
        cut = write(folder / "b.ome.tif", np.repeat(ids, 2, axis=1)[:, ::2], [min(at, size[0]) for at in cuts])
    assert whole == cut == hashlib.sha256((folder / "a.ome.tif").read_bytes()).hexdigest()
    expected = levels_of(ids, tile)
    with tifffile.TiffFile(folder / "a.ome.tif") as file:
        assert file.is_ome and file.is_bigtiff == big and len(file.series) == 1
        assert [level.shape for level in file.series[0].levels] == [level.shape for level in expected]
        for level, values in zip(file.series[0].levels, expected, strict=True):
            assert (level.asarray() == values).all() and level.keyframe.is_tiled
            assert level.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE
    with tifffile.TiffFile(folder / "a.ome.tif", is_ome=False) as file:  # what readers of plain pyramids see
        for page, values in zip(file.pages, expected, strict=True):
            assert (page.asarray() == values).all() and page.is_reduced == (values is not ids)
    with open_image(folder / "a.ome.tif") as source:
        out = np.empty((*size, 3), np.uint8)
        source.read_rows(0, size[0], out)
    assert (out == PAPER_PALETTE.array[ids]).all()
    with Image.open(folder / "a.ome.tif") as image:
        assert image.mode == "P" and (np.asarray(image) == ids).all()


@pytest.mark.parametrize("big", [False, True])
def test_openslide_shows_the_colours_and_knows_the_size(tmp_path, monkeypatch, big):
    monkeypatch.setattr(pyramid, "CLASSIC_TIFF_BYTES", 0 if big else 2**32)
    ids = class_map(1, 1500, 2100)
    write(tmp_path / "a.ome.tif", ids, [700])
    expected = levels_of(ids, pyramid.TILE_SIDE)
    with openslide.OpenSlide(tmp_path / "a.ome.tif") as slide:
        assert slide.level_dimensions == tuple(level.shape[::-1] for level in expected)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.4987, rel=1e-6)
        for number, values in enumerate(expected):
            region = np.asarray(slide.read_region((0, 0), number, values.shape[::-1]))
            assert (region == np.dstack([PAPER_PALETTE.array[values], np.full_like(values, 255)])).all()


@pytest.mark.parametrize("mpp", [None, 0.25, 0.0, float("nan"), 1e9])
def test_the_ome_xml_is_valid_and_says_size_and_classes(tmp_path, mpp):
    palette = Palette(('a < b & "c"', "µ\n\ud800"), ((0, 0, 0), (9, 8, 7)))
    with PyramidWriter(tmp_path / "a.ome.tif", 30, 20, palette, mpp) as writer:
        writer.write_rows(np.ones((20, 30), np.uint8))
        writer.finish()
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as file:
        text, resolution = file.ome_metadata, file.pages.first.get_resolution("micrometer")
        unit, colours = file.pages.first.resolutionunit, file.pages.first.colormap
    assert (palette.array.astype(int) * 257 == colours[:, :2].T).all() and not colours[:, 2:].any()
    ome_types.validate_xml(text)
    assert "&#" not in text  # Bio-Formats takes such references apart and refuses the file
    ome = ome_types.from_xml(text)
    pixels = ome.images[0].pixels
    assert (pixels.size_x, pixels.size_y, pixels.type.value) == (30, 20, "uint8")
    assert {m.k: m.value for m in ome.structured_annotations[0].value.ms} == {"0": palette.names[0], "1": "µ\\n\\ud800"}
    if mpp == 0.25:
        assert (pixels.physical_size_x, pixels.physical_size_y, pixels.physical_size_x_unit.value) == (0.25, 0.25, "µm")
        assert resolution == pytest.approx((4, 4)) and unit == 3
    else:
        assert pixels.physical_size_x is None and unit == 1


def test_plain_tiles_share_their_bytes(tmp_path):
    write(tmp_path / "small.ome.tif", np.zeros((1024, 1024), np.uint8))
    write(tmp_path / "large.ome.tif", np.zeros((8192, 8192), np.uint8))
    sizes = [(tmp_path / f"{name}.ome.tif").stat().st_size for name in ("small", "large")]
    assert sizes[1] < sizes[0] + 16384  # nothing but tables of tiles
    assert not tifffile.imread(tmp_path / "large.ome.tif").any()


def test_a_tall_map_needs_no_more_memory_than_a_short_one(tmp_path):
    band, most = class_map(2, 256, 12000), []
    for height in (2048, 12288):
        tracemalloc.start()
        with PyramidWriter(tmp_path / "m.ome.tif", 12000, height, PAPER_PALETTE) as writer:
            for _ in range(height // 256):
                writer.write_rows(band)
            writer.finish()
        most.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert most[1] < 1.1 * most[0] < 20 * 2**20


def test_a_class_without_a_colour_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no colour"), PyramidWriter(tmp_path / "m", 4, 4, PAPER_PALETTE) as writer:
        writer.write_rows(np.full((4, 4), 3, np.uint8))
    assert not list(tmp_path.iterdir())
