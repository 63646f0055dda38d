"""Tiling against its definition: every property that "tiled = whole" rests on, and NumPy's own reflection."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from histoseg_fast.errors import UsageError
from histoseg_fast.tiling import (
    CORE_SHARE,
    MAX_LARGE_PIXELS,
    Span,
    TileGrid,
    Tiling,
    check_tile,
    large_tile,
    least_tile,
    pad_to_stride,
    padded_length,
    reflect_indices,
    reflect_rows,
    split_axis,
    split_interval,
)

SETTINGS = settings(deadline=None, max_examples=400)


@st.composite
def axes(draw):
    """Length, tile, halo and stride that go together; the tile need not be a multiple of the stride."""
    stride = draw(st.sampled_from([1, 2, 3, 4, 8, 16, 32]))
    halo = stride * draw(st.integers(0, 12))
    tile = 2 * halo + 2 * stride + draw(st.integers(0, 8 * stride) | st.integers(0, 1500))
    return draw(st.integers(1, 3000)), tile, halo, stride


@SETTINGS
@given(axes())
@example((1, 64, 28, 4))
@example((1128, 64, 28, 4))
def test_cores_are_disjoint_and_cover_the_image(axis):
    spans = split_axis(*axis)
    assert spans[0].core == 0 and spans[-1].core_end == axis[0]
    assert all(span.core < span.core_end for span in spans)
    assert all(before.core_end == after.core for before, after in itertools.pairwise(spans))


@SETTINGS
@given(axes())
def test_tiles_are_equal_aligned_and_inside_the_padded_image(axis):
    length, tile, _, stride = axis
    spans = split_axis(*axis)
    assert len({span.outer_end - span.outer for span in spans}) == 1
    assert spans[0].outer_end - spans[0].outer <= max(tile, stride)
    assert all(span.outer % stride == 0 and span.outer_end % stride == 0 for span in spans)
    assert spans[0].outer == 0 and spans[-1].outer_end == padded_length(length, stride)
    assert all(before.outer < after.outer for before, after in itertools.pairwise(spans))


@SETTINGS
@given(axes())
def test_every_core_keeps_its_halo_on_inner_sides(axis):
    length, _, halo, stride = axis
    end = padded_length(length, stride)
    for span in split_axis(*axis):
        assert span.outer <= span.core < span.core_end <= span.outer_end
        assert span.outer == 0 or span.core - span.outer >= halo
        assert span.outer_end == end or span.outer_end - span.core_end >= halo


@SETTINGS
@given(axes())
def test_no_more_and_no_larger_tiles_than_needed(axis):
    length, tile, halo, stride = axis
    padded, largest = padded_length(length, stride), tile // stride * stride
    spans = split_axis(*axis)
    if padded <= largest:
        return _one(spans, padded)
    inner = padded - 2 * halo  # what the tiles' middles must cover
    least = next(n for n in range(1, padded) if n * (largest - 2 * halo) >= inner)
    assert len(spans) == least
    outer = spans[0].outer_end - spans[0].outer
    assert least * (outer - stride - 2 * halo) < inner  # tiles one stride smaller would not do


def _one(spans, padded):
    assert [(span.outer, span.outer_end) for span in spans] == [(0, padded)]


@SETTINGS
@given(st.integers(1, 60), st.integers(0, 200))
@example(1, 7)
@example(2, 32)
def test_reflection_is_numpys(length, extra):
    expected = np.pad(np.arange(length), (0, extra), mode="reflect")
    np.testing.assert_array_equal(reflect_indices(length, length + extra), expected)


@SETTINGS
@given(st.integers(1, 60), st.integers(0, 200), st.data())
@example(1, 7, None)
@example(2, 1, None)
def test_rows_are_reflected_in_place(length, extra, data):
    """From any row on that reflection does not reach behind."""
    expected = np.pad(np.arange(length), (0, extra), mode="reflect")
    start = data.draw(st.integers(0, int(expected[length:].min(initial=length - 1)))) if data else 0
    rows = np.where(np.arange(length + extra) < length, np.arange(length + extra), -1)[start:]
    reflect_rows(rows, length, start)
    np.testing.assert_array_equal(rows, expected[start:])


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 4, 16, 32]))
@example(1, 1, 32)
def test_padding_is_numpys(height, width, stride):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    down, right = (-height % stride), (-width % stride)
    expected = np.pad(image, ((0, down), (0, right), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(pad_to_stride(image, stride), expected)


def test_an_image_of_whole_strides_is_not_copied():
    image = np.zeros((8, 12, 3), np.uint8)
    assert pad_to_stride(image, 4) is image


@given(st.integers(0, 200), st.integers(1, 64))
def test_the_least_tile_is_named_and_works(strides_of_halo, stride):
    halo = strides_of_halo * stride
    least = 2 * halo + 2 * stride
    check_tile(least, halo, stride)
    with pytest.raises(UsageError, match=f"--tile {least} or more"):
        check_tile(least - 1, halo, stride)
    with pytest.raises(UsageError):
        split_axis(1, least - 1, halo, stride)  # even where the image would fit


@given(st.integers(1, 700), st.integers(1, 700))
def test_a_grid_is_both_axes(height, width):
    grid = TileGrid.cover(height, width, 64, 8, 2)
    rows, columns = split_axis(height, 64, 8, 2), split_axis(width, 64, 8, 2)
    assert grid.rows == rows and grid.columns == (columns,) * len(rows)
    assert grid.tile_shape(0, 0) == (rows[-1].outer_end - rows[-1].outer, columns[0].outer_end)
    assert grid.tiles == len(rows) * len(columns) and list(grid.glass()) == []
    assert grid.whole_rows == (len(columns) == 1)


@SETTINGS
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 8), st.sampled_from([1, 4, 32]), st.integers(0, 300))
def test_large_tiles_are_for_images_that_others_cut(height, width, strides_of_halo, stride, more):
    halo = strides_of_halo * stride
    tile = least_tile(halo, stride) + more
    large = large_tile(tile, halo, stride)
    assert large == tile or (large**2 <= MAX_LARGE_PIXELS and large > tile)
    assert (large - 2 * halo) ** 2 >= CORE_SHARE * large**2 or large == tile or (large + stride) ** 2 > MAX_LARGE_PIXELS
    grid = Tiling(tile, large, halo, stride).grid(height, width)
    used = tile if max(height, width) <= tile else large
    assert grid == TileGrid.cover(height, width, used, halo, stride)


def test_large_tiles_of_the_shipped_halos_and_widths():
    assert large_tile(1152, 160, 32) == 2816 and large_tile(1152, 26, 2) == 1152
    assert large_tile(1152, 500, 64) == 2816 and large_tile(4096, 500, 64) == 4096  # memory is the limit
    tiling = Tiling(1152, 1984, 160, 32)
    assert tiling.grid(720, 1128).tile_shape(0, 0) == (736, 1152)
    assert tiling.grid(1500, 1500).tile_shape(0, 0) == (1504, 1504)
    assert [tiling.side(100_000, width) for width in (40_000, 60_000, 100_000)] == [1984, 1856, 1152]


@SETTINGS
@given(axes(), st.data())
def test_an_interval_is_covered_as_an_axis_is(axis, data):
    length, tile, halo, stride = axis
    places = st.integers(0, length // stride)
    first = stride * data.draw(places.filter(lambda i: i * stride < length))
    end = min(length, stride * data.draw(st.integers(first // stride + 1, -(-length // stride))))
    spans = split_interval(first, end, length, tile, halo, stride)
    padded = padded_length(length, stride)
    begin = min(first, max(padded - 2 * stride, 0)) if end == length else first
    assert spans[0].core == begin and spans[-1].core_end == end
    assert all(a.core_end == b.core for a, b in itertools.pairwise(spans))
    for span in spans:
        assert span.outer % stride == span.outer_end % stride == 0 and 0 <= span.outer < span.outer_end <= padded
        assert span.outer_end - span.outer <= tile and span.core < span.core_end
        assert span.outer == 0 or span.core - span.outer >= halo
        assert span.outer_end == padded or span.outer_end - span.core_end >= halo
        if span.outer_end == padded:  # what is reflected lies in the tile
            assert span.outer <= max(2 * length - padded - 1, 0)
    if (first, end) == (0, length):
        assert spans == split_axis(length, tile, halo, stride)


def test_glass_is_what_no_core_covers():
    rows = (Span(0, 8, 2, 6), Span(6, 16, 8, 14))
    grid = TileGrid(20, 30, rows, ((Span(0, 8, 0, 4), Span(8, 16, 10, 14)), (Span(20, 30, 22, 30),)))
    covered = np.zeros((20, 30), int)
    covered[2:6, 0:4] = covered[2:6, 10:14] = covered[8:14, 22:30] = 1
    for top, left, bottom, right in grid.glass():
        assert top < bottom and left < right
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all() and not grid.whole_rows and grid.tiles == 3
