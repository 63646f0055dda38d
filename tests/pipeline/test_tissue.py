"""The tissue mask: pale stroma is never glass, clean glass is, and the geometry is that of the plain way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast.cli import infer as infer_command
from histoseg_fast.images import read_image
from histoseg_fast.images.overview import shrink
from histoseg_fast.labels import decode
from histoseg_fast.pipeline import tissue as tissue_module
from histoseg_fast.pipeline.tissue import DEFAULT_THRESHOLD, Overview, Tissue, find_tissue, white_level
from histoseg_fast.tiling import TileGrid, Tiling

PALE_STROMA, PINK, PURPLE, PALE_BLUE = (236, 214, 230), (226, 170, 205), (120, 60, 160), (214, 214, 240)
STEP = 16


def slide(glass: tuple[int, int, int], tissue: tuple[int, int, int], noise: float = 1.0) -> np.ndarray:
    """An overview of 200 x 240: glass with a square of tissue of 80 x 60 at (60, 100)."""
    rgb = np.empty((200, 240, 3), float)
    rgb[...] = glass
    rgb[60:140, 100:160] = tissue
    return np.clip(rgb + np.random.default_rng(0).normal(0, noise, rgb.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("glass", [(243, 243, 243), (255, 255, 255), (236, 231, 238), (248, 250, 244)])
@pytest.mark.parametrize("colour", [PALE_STROMA, PINK, PURPLE, PALE_BLUE])
def test_tissue_and_its_margin_and_nothing_else(glass, colour):
    found = find_tissue(Overview(slide(glass, colour), STEP))
    expected = np.zeros((200, 240), bool)
    margin = tissue_module.MARGIN // STEP
    expected[60 - margin : 140 + margin, 100 - margin : 160 + margin] = True
    assert found.step == STEP and (found.mask == expected).all()


@pytest.mark.parametrize("colour", [PALE_STROMA, PINK, PURPLE, (228, 212, 226), (215, 205, 215)])
def test_a_slide_of_tissue_alone_is_all_tissue(colour):
    rgb = slide(colour, colour, noise=4)
    assert find_tissue(Overview(rgb, STEP)).mask.all()


@pytest.mark.parametrize("glass", [(243, 243, 243), (255, 255, 255), (236, 231, 238), (231, 231, 231)])
def test_glass_alone_has_no_tissue(glass):
    assert not find_tissue(Overview(slide(glass, glass), STEP)).mask.any()


def test_uneven_light_is_glass_and_what_was_not_scanned_is_no_white():
    rgb = slide((240, 240, 240), PALE_STROMA).astype(int)
    rgb += np.linspace(-6, 6, 240).astype(int)[:, None]
    rgb[:, :90] = 255  # filled in by the format
    found = find_tissue(Overview(np.clip(rgb, 0, 255).astype(np.uint8), STEP)).mask
    assert found[52:148, 92:168].all() and found.sum() == 96 * 76
    assert white_level(rgb[:, 90:].astype(np.uint8)) < 250


def test_a_smaller_threshold_takes_more_for_tissue():
    rgb = slide((243, 243, 243), (236, 236, 236), noise=0)
    assert not find_tissue(Overview(rgb, STEP)).mask.any()
    assert find_tissue(Overview(rgb, STEP), 0.01).mask.any()


def test_fine_overviews_are_shrunk_first():
    found = find_tissue(Overview(slide((243, 243, 243), PINK, noise=9), 3))  # three pixels a mask pixel: noise of 3
    assert found.step == 9 and found.mask.shape == (67, 80)
    assert found.mask[20:47, 34:53].all() and 0.2 < found.mask.mean() < 0.9


@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(20, 70),
    st.integers(0, 4),
    st.integers(1, 30),
    st.integers(0, 9),
)
def test_tiles_with_tissue_in_their_core_are_kept(height, width, tile, halo, step, seed):
    grid, tiling = TileGrid.cover(height, width, tile, halo, 4), Tiling(tile, tile, halo, 4)
    mask = np.random.default_rng(seed).random((-(-height // step), -(-width // step))) < 0.1
    full = mask.repeat(step, 0).repeat(step, 1)[:height, :width]
    found = Tissue(mask, step).grid(height, width, tiling)
    assert found.rows == grid.rows
    for row, columns, kept in zip(grid.rows, grid.columns, found.columns, strict=True):
        tissue = full[row.core : row.core_end]
        assert kept == tuple(column for column in columns if tissue[:, column.core : column.core_end].any())


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(40, 90),
    st.integers(0, 4),
    st.integers(1, 30),
    st.integers(0, 9),
    st.sampled_from([0, 0.01, 0.1, 1]),
    st.integers(0, 200),
)
def test_fitted_tiles_cover_all_tissue_once_and_little_more(height, width, tile, halo, step, seed, density, more):
    mask = np.random.default_rng(seed).random((-(-height // step), -(-width // step))) < density
    full = mask.repeat(step, 0).repeat(step, 1)[:height, :width]
    tiling = Tiling(tile, tile + more, 4 * halo, 4, fitted=True)
    grid = Tissue(mask, step).grid(height, width, tiling)
    side = tiling.side(height, width)
    covered, pixels = np.zeros((height, width), int), 0
    for row, columns in zip(grid.rows, grid.columns, strict=True):
        for column in columns:
            core = slice(row.core, row.core_end), slice(column.core, column.core_end)
            covered[core] += 1
            tall, wide = row.outer_end - row.outer, column.outer_end - column.outer
            assert tall <= side and tall * wide <= (tile + more) ** 2 and full[row.core : row.core_end].any()
            pixels += tall * wide
    assert grid.pixels == pixels <= Tissue(mask, step)._fitted(height, width, side, side, tiling).pixels
    assert covered.max(initial=0) <= 1 and (covered[full] == 1).all()
    if mask.any():
        first, end = grid.rows[0].core, grid.rows[-1].core_end
        assert full[first : first + 8].any()  # no more than a stride, or two at the far end
        assert full[max(end - 4, 0) : end].any()
    else:
        assert grid.tiles == 0 and grid.rows


def test_low_wide_tiles_win_where_tissue_is_low_and_wide():
    """And where a row of tiles may not be as high as a tile, it may be wider."""
    mask = np.zeros((20, 40), bool)
    mask[9:11, 2:38] = True
    grid = Tissue(mask, 10).grid(200, 400, Tiling(40, 100, 8, 4, fitted=True))
    assert [grid.tile_shape(0, column) for column in range(len(grid.columns[0]))] == [(40, 196), (40, 196)]
    assert grid.pixels < Tissue(mask, 10)._fitted(200, 400, 100, 100, Tiling(40, 100, 8, 4, fitted=True)).pixels


def test_wide_slides_have_tiles_of_the_same_area():
    tissue, tiling = Tissue(np.ones((100, 1000), bool), 100), Tiling(1152, 2816, 160, 32, fitted=True)
    grid = tissue.grid(10_000, 100_000, tiling)
    shapes = {grid.tile_shape(row, column) for row in range(len(grid.rows)) for column in range(len(grid.columns[row]))}
    assert tiling.side(10_000, 100_000) == 1152
    assert all(tall <= 1152 < wide and tall * wide <= 2816**2 for tall, wide in shapes)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 40), st.integers(0, 9))
def test_the_margin_is_a_square(height, width, radius, seed):
    mask = np.random.default_rng(seed).random((height, width)) < 0.05
    expected = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        expected[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = True
    assert (tissue_module._grown(mask, radius) == expected).all()


def test_the_command_line_has_the_same_default():
    assert infer_command.TISSUE_THRESHOLD == DEFAULT_THRESHOLD


@pytest.mark.parametrize("step", [1, 16, 32])
@pytest.mark.parametrize(("folder", "most"), [("lung", 0), ("prostate", 0), ("colon", 1e-5), ("breast_roi", 0)])
def test_labelled_tissue_is_kept(real_data: Path, folder: str, most: float, step: int):
    """In colon, glands are labelled with their lumens, which are clear; of these alone a few pixels are lost."""
    lost = labelled = 0
    for path in sorted((real_data / folder / "images").iterdir()):
        rgb, label = read_image(path), next((real_data / folder / "labels").glob(path.stem + ".*"))
        tissue = decode(read_image(label)).ids > 0
        found = find_tissue(Overview(shrink(rgb, step), step))
        mask = found.mask.repeat(found.step, 0).repeat(found.step, 1)[: tissue.shape[0], : tissue.shape[1]]
        lost, labelled = lost + int((tissue & ~mask).sum()), labelled + int(tissue.sum())
    assert labelled > 0 and lost <= most * labelled
