"""Overlays against a slow plain twin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE

LEVELS = ["baseline", "avx2", "avx512"]
LEVELS = LEVELS[: LEVELS.index(_core.best_simd_level()) + 1]


@pytest.fixture(autouse=True)
def restore_simd_level():
    yield
    _core.set_simd_level(_core.best_simd_level())


def twin(rgb, ids, above, colours, alpha):
    """Pixel by pixel, as the contract reads."""
    out = np.empty_like(rgb)
    for y, x in np.ndindex(ids.shape):
        own = ids[y, x]
        left = ids[y, x - 1] if x > 0 else own
        upper = ids[y - 1, x] if y > 0 else own if above is None else above[x]
        if own != left or own != upper:
            out[y, x] = colours[own or left or upper]
        elif own == 0:
            out[y, x] = rgb[y, x]
        else:
            blend = rgb[y, x].astype(float) * (255 - alpha) + colours[own].astype(float) * alpha
            out[y, x] = np.floor(blend / 255 + 0.5)
    return out


@given(
    st.integers(0, 2**32), st.integers(0, 7), st.integers(0, 70), st.sampled_from([2, 3, 5, 20]), st.integers(0, 255),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_equals_the_twin_at_every_level(seed, height, width, classes, alpha, in_place, has_above):
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (classes, 3)).astype(np.uint8)
    rgb = random.integers(0, 256, (height, width, 3)).astype(np.uint8)
    ids = np.repeat(random.integers(0, classes, (height, width)), 3, 1)[:, :width].astype(np.uint8)
    above = random.integers(0, classes, width).astype(np.uint8) if has_above else None
    wanted = twin(rgb, ids, above, colours, alpha)
    for level in LEVELS:
        _core.set_simd_level(level)
        source = rgb.copy()
        out = source if in_place else np.zeros_like(rgb)
        _core.tint(source, ids, above, colours, alpha, out)
        np.testing.assert_array_equal(out, wanted)


@given(st.integers(0, 2**32), st.integers(1, 39))
def test_bands_give_the_whole(seed, cut):
    random = np.random.default_rng(seed)
    ids = random.integers(0, 3, (40, 30)).astype(np.uint8)
    rgb = random.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    whole = np.empty_like(rgb)
    _core.tint(rgb, ids, None, PAPER_PALETTE.array, 100, whole)
    banded = np.empty_like(rgb)
    _core.tint(rgb[:cut], ids[:cut], None, PAPER_PALETTE.array, 100, banded[:cut])
    _core.tint(rgb[cut:], ids[cut:], ids[cut - 1], PAPER_PALETTE.array, 100, banded[cut:])
    np.testing.assert_array_equal(banded, whole)


def test_wide_rows_and_row_strides():
    random = np.random.default_rng(3)
    ids = random.integers(0, 3, (6, 2600)).astype(np.uint8)[::-2]
    rgb = random.integers(0, 256, (6, 2600, 3)).astype(np.uint8)[::-2]
    out = np.zeros((3, 2700, 3), np.uint8)[:, 50:-50]
    _core.tint(rgb, ids, None, PAPER_PALETTE.array, 77, out)
    np.testing.assert_array_equal(out, twin(rgb, ids, None, PAPER_PALETTE.array, 77))


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rgb", np.zeros((4, 6, 4), np.uint8)),
        ("rgb", np.zeros((4, 5, 3), np.uint8)),
        ("rgb", np.zeros((4, 6, 4), np.uint8)[:, :, :3]),
        ("rgb", np.zeros((4, 6, 3), np.float32)),
        ("ids", np.zeros((4, 12), np.uint8)[:, ::2]),
        ("ids", np.full((4, 6), 3, np.uint8)),
        ("ids", np.zeros(6, np.uint8)),
        ("above", np.zeros(5, np.uint8)),
        ("above", np.full(6, 3, np.uint8)),
        ("alpha", 256),
        ("alpha", -1),
        ("palette", np.zeros((3, 2), np.uint8)),
        ("out", read_only(np.zeros((4, 6, 3), np.uint8))),
        ("out", np.zeros((4, 6, 6), np.uint8)[:, :, ::2]),
    ],
)
def test_refuses(name, value):
    arguments = {
        "rgb": np.zeros((4, 6, 3), np.uint8),
        "ids": np.zeros((4, 6), np.uint8),
        "above": np.zeros(6, np.uint8),
        "palette": PAPER_PALETTE.array,
        "alpha": 100,
        "out": np.zeros((4, 6, 3), np.uint8),
    }
    with pytest.raises(ValueError, match=name):
        _core.tint(**{**arguments, name: value})
