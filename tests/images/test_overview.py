"""Overviews: means of blocks, and the tint of the very class map."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.images import OverviewWriter, read_image
from histoseg_fast.images.overview import OVERVIEW_MAX_SIDE, overview_step, shrink
from histoseg_fast.labels import PAPER_PALETTE

SIDES = st.integers(1, 60)


@given(SIDES, SIDES, st.integers(1, 70))
def test_shrinking_takes_the_mean_of_each_block(height, width, factor):
    rgb = np.random.default_rng(height * 61 + width).integers(0, 256, (height, width, 3), np.uint8)
    small = shrink(rgb, factor)
    assert small.dtype == np.uint8 and small.shape == (-(-height // factor), -(-width // factor), 3)
    for y in range(small.shape[0]):
        for x in range(small.shape[1]):
            block = rgb[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
            assert np.abs(small[y, x] - block.mean((0, 1))).max() <= 0.5


@given(st.integers(1, 2**20), st.integers(1, 2**20))
def test_the_step_is_the_smallest_that_fits(height, width):
    step = overview_step(height, width)
    assert -(-max(height, width) // step) <= OVERVIEW_MAX_SIDE
    assert step == 1 or -(-max(height, width) // (step - 1)) > OVERVIEW_MAX_SIDE


@given(SIDES, SIDES, st.integers(1, 9), st.booleans(), st.lists(st.integers(0, 60), max_size=5))
def test_the_picture_is_tinted_by_every_nth_pixel(tmp_path_factory, height, width, step, pictured, cuts):
    path = tmp_path_factory.mktemp("overview") / "o.png"
    rng = np.random.default_rng(step)
    ids = rng.integers(0, 3, (height, width), np.uint8)
    kept = np.ascontiguousarray(ids[::step, ::step])
    rgb = rng.integers(0, 256, (*kept.shape, 3), np.uint8)
    expected = PAPER_PALETTE.array[kept]
    if pictured:
        _core.tint(rgb, kept, None, PAPER_PALETTE.array, 90, expected)
    writer = OverviewWriter(path, width, height, PAPER_PALETTE, 90, step, rgb if pictured else None)
    for band in np.split(ids, sorted(min(at, height) for at in cuts)):
        writer.write_rows(band)
    assert writer.finish() == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (read_image(path) == expected).all()


def test_a_picture_of_another_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match="picture is"):
        OverviewWriter(tmp_path / "o.png", 20, 20, PAPER_PALETTE, 90, 4, np.zeros((4, 5, 3), np.uint8))
    assert not list(tmp_path.iterdir())
