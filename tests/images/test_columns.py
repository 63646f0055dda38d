"""Reading of some columns: the pixels of the whole rows, and nothing else decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from histoseg_fast.images import Resolution, open_image
from histoseg_fast.images.tiff import TiffSource

HEIGHT, WIDTH = 301, 410
POISON = 99


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same picture tiled, in strips (compressed and not), and as a slide of two levels with a resolution."""
    folder = tmp_path_factory.mktemp("columns")
    rgb = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    options = {"photometric": "rgb", "resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(folder / "tiles.tif", rgb, tile=(32, 48), compression="deflate", **options)
    tifffile.imwrite(folder / "strips.tif", rgb, rowsperstrip=7, compression="deflate", **options)
    tifffile.imwrite(folder / "plain.tif", rgb, rowsperstrip=7, **options)
    with tifffile.TiffWriter(folder / "slide.tif") as file:
        file.write(rgb, tile=(32, 48), compression="deflate", **options)
        file.write(np.ascontiguousarray(rgb[::4, ::4]), tile=(32, 48), subfiletype=1, photometric="rgb")
    return folder


def drawn_columns(data: st.DataObject, width: int) -> list[tuple[int, int]]:
    cuts = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=8, unique=True)))
    return list(zip(cuts[::2], cuts[1::2], strict=False))


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    name=st.sampled_from(["tiles.tif", "strips.tif", "plain.tif", "slide.tif"]),
    mpp=st.sampled_from([None, 0.4, 0.5, 0.9, 1.7]),
)
def test_columns_hold_what_whole_rows_hold(folder: Path, data: st.DataObject, name: str, mpp: float | None) -> None:
    resolution = Resolution(level=0) if mpp is None else Resolution(mpp=mpp)
    with open_image(folder / name, resolution) as image:
        whole = np.empty((image.height, image.width, 3), np.uint8)
        image.read_rows(0, image.height, whole)
    with open_image(folder / name, resolution) as image:
        y0 = 0
        for _ in range(4):  # bands as the pipeline reads them: forwards, overlapping, each with columns of its own
            y0 = data.draw(st.integers(y0, image.height))
            y1 = data.draw(st.integers(y0, image.height))
            columns, out = drawn_columns(data, image.width), np.full((y1 - y0, image.width, 3), POISON, np.uint8)
            image.read_rows(y0, y1, out, columns)
            for first, end in columns:
                assert (out[:, first:end] == whole[y0:y1, first:end]).all()


def test_tiles_beside_the_columns_are_not_decoded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[tuple[int, int]] = []
    segment = TiffSource._segment
    monkeypatch.setattr(TiffSource, "_segment", lambda self, *at: (decoded.append(at), segment(self, *at))[1])
    with open_image(folder / "slide.tif", Resolution(level=0)) as image:
        image.read_rows(40, 60, np.empty((20, WIDTH, 3), np.uint8), [(10, 48), (100, 150)])
    assert sorted(decoded) == [(1, 0), (1, 2), (1, 3)]
    decoded.clear()
    with open_image(folder / "slide.tif", Resolution(mpp=1)) as image:  # twice as coarse: columns 96 to 144
        image.read_rows(20, 30, np.empty((10, WIDTH // 2, 3), np.uint8), [(48, 72)])
    assert set(decoded) <= {(1, 2), (1, 3)} and (1, 2) in decoded
