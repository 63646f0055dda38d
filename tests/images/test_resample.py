"""Resampling against a slow plain twin, and bands against the whole."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.images import resample as resample_module
from histoseg_fast.images.resample import Resampler, Taps

LEVELS = ["baseline", "avx2", "avx512"]
LEVELS = LEVELS[: LEVELS.index(_core.best_simd_level()) + 1]
SCALES = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.floats(0.5, 9))


@pytest.fixture(autouse=True)
def restore_simd_level():
    yield
    _core.set_simd_level(_core.best_simd_level())


class Picture:
    """What a `Resampler` needs of a source."""

    def __init__(self, rgb):
        self.rgb, (self.height, self.width) = rgb, rgb.shape[:2]

    def read_rows(self, y0, y1, out, columns=None):
        out[...] = self.rgb[y0:y1]


def noise(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mean_along(values, taps):
    """The weighted means along the first axis, in whole units of `_core.resample_one`."""
    out = np.zeros((len(taps.first), *values.shape[1:]), np.int64)
    for i, (first, weights) in enumerate(zip(taps.first, taps.weights, strict=True)):
        for k, weight in enumerate(weights):
            if weight:
                out[i] += int(weight) * values[first + k]
    return out


def twin(source, rows, columns):
    kept = (mean_along(source.astype(np.int64), rows) + 32) // 64
    return ((mean_along(kept.swapaxes(0, 1), columns).swapaxes(0, 1) + 2**21) // 2**22).astype(np.uint8)


def area_mean(source, scale, out):
    """Means over real-valued spans along the first axis, by integrating the step function that pixels are."""
    edges = np.minimum(np.arange(out + 1) * scale, len(source))
    total = np.concatenate([np.zeros((1, *source.shape[1:])), np.cumsum(source, axis=0, dtype=np.float64)])
    whole = np.floor(edges).astype(int)
    at = total[whole] + (edges - whole)[:, None, None] * np.append(source, source[-1:], axis=0)[whole]
    return np.diff(at, axis=0) / np.diff(edges)[:, None, None]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 60), SCALES, SCALES)
def test_equals_the_twin_at_every_level(seed, height, width, down, across):
    source = noise(seed, height, width)
    rows, columns = (Taps.of(n, max(1, round(n / s)), s) for n, s in ((height, down), (width, across)))
    wanted = twin(source, rows, columns)
    for level in LEVELS:
        _core.set_simd_level(level)
        out = np.zeros(wanted.shape, np.uint8)
        _core.resample(source, *rows, *columns, out)
        np.testing.assert_array_equal(out, wanted)


@given(st.integers(1, 3000), st.one_of(SCALES, st.floats(1, 3000)), st.booleans())
def test_weights_add_up_and_stay_inside(size, scale, last_is_cut):
    out = max(1, -int(-size // scale) if last_is_cut else round(size / scale))
    first, weights = Taps.of(size, out, scale)
    assert (weights.sum(axis=1, dtype=np.int64) == _core.resample_one).all()
    index = first[:, None] + np.arange(weights.shape[1])
    assert (index[weights > 0] >= 0).all() and (index[weights > 0] < size).all()
    assert first.dtype == np.int32 and (np.diff(first) >= 0).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(9, 60), st.floats(1, 8))
def test_shrinking_is_the_mean_over_each_pixels_area(seed, size, scale):
    source, out = noise(seed, size, size), int(size / scale)
    got = np.empty((out, out, 3), np.uint8)
    Resampler(Picture(source), out, out, (scale, scale)).read(0, out, got)
    wanted = area_mean(area_mean(source, scale, out).swapaxes(0, 1), scale, out).swapaxes(0, 1)
    assert np.abs(got - wanted).max() < 0.6  # rounding, and weights of 14 bits


def test_whole_factors_are_block_means_and_one_is_a_copy():
    source = noise(3, 48, 64)
    for scale in (1, 2, 4, 8):
        got = np.empty((48 // scale, 64 // scale, 3), np.uint8)
        Resampler(Picture(source), *got.shape[:2], (scale, scale)).read(0, len(got), got)
        blocks = source.reshape(48 // scale, scale, 64 // scale, scale, 3).mean(axis=(1, 3))
        np.testing.assert_array_equal(got, np.floor(blocks + 0.5))


def test_enlarging_interpolates_and_keeps_flat_colours():
    ramp = np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(5, 0)
    got = np.empty((10, 60, 3), np.uint8)
    Resampler(Picture(ramp), 10, 60, (0.5, 0.5)).read(0, 10, got)
    assert (np.diff(got[0, 1:-1, 0].astype(int)) == 4).all() and (got == got[:1]).all()


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(20, 80), st.floats(0.5, 6), st.data())
def test_bands_give_the_whole_whatever_the_blocks(seed, size, scale, data):
    source, out = Picture(noise(seed, size, 30)), max(1, round(size / scale))
    whole, banded = (np.zeros((out, round(30 / scale), 3), np.uint8) for _ in range(2))
    Resampler(source, *whole.shape[:2], (scale, scale)).read(0, out, whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, out), max_size=5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resample_module, "BLOCK_BYTES", data.draw(st.sampled_from([1, 700, 5000])))
        resampler = Resampler(source, *whole.shape[:2], (scale, scale))
    for y0, y1 in zip([0, *cuts], [*cuts, out], strict=True):
        resampler.read(y0, y1, banded[y0:y1])
    np.testing.assert_array_equal(banded, whole)


@st.composite
def spans(draw, width):
    """Disjoint spans of `width` columns, from left to right; they may touch."""
    ends = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=12, unique=True)))
    return [(first, end) for first, end in itertools.pairwise(ends) if draw(st.booleans()) or end == ends[-1]]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 90), st.floats(0.5, 9), st.data())
def test_columns_give_the_whole_and_cost_what_they_cover(seed, size, scale, data):
    class Spans(Picture):
        def read_rows(self, y0, y1, out, columns=None):
            for first, end in columns:
                out[:, first:end] = self.rgb[y0:y1, first:end]

    rgb, summed = noise(seed, 12, size), 0
    whole = np.zeros((max(1, round(12 / scale)), max(2, round(size / scale)), 3), np.uint8)
    Resampler(Picture(rgb), *whole.shape[:2], (scale, scale)).read(0, len(whole), whole)
    columns = data.draw(spans(whole.shape[1]))
    kept = np.zeros(whole.shape[1], bool)
    got = np.full_like(whole, 77)

    def counted(source, *rest):
        nonlocal summed
        summed += source.shape[1]
        resample(source, *rest)

    resample = _core.resample
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_core, "resample", counted)
        Resampler(Spans(rgb), *whole.shape[:2], (scale, scale)).read(0, len(got), got, columns)
    for first, end in columns:
        kept[first:end] = True
    np.testing.assert_array_equal(got, np.where(kept[:, None], whole, 77))
    assert summed <= sum((end - first) * scale + scale + 3 for first, end in columns)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"row_first": np.array([0, 7], np.int32)}, "rows: a tap lies outside"),
        ({"column_first": np.array([0, -1], np.int32)}, "columns: a tap lies outside"),
        ({"row_weights": np.full((2, 2), 9, np.uint16)}, "weights do not add up"),
        ({"row_weights": np.full((1, 2), 8192, np.uint16)}, "a row for each of first"),
        ({"column_weights": np.full((2, 4), 8192, np.uint16)[:, ::2]}, "contiguous weights"),
        ({"out": np.zeros((2, 3, 3), np.uint8)}, "expected shape"),
        ({"source": np.zeros((4, 4, 4), np.uint8)}, "expected shape"),
        ({"row_first": np.array([0, 2])}, "expected dtype int32"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    halves, first = np.full((2, 2), _core.resample_one // 2, np.uint16), np.array([0, 2], np.int32)
    good = {
        "source": np.zeros((4, 4, 3), np.uint8), "row_first": first, "row_weights": halves, "column_first": first,
        "column_weights": halves, "out": np.zeros((2, 2, 3), np.uint8),
    }  # fmt: skip
    _core.resample(**good)
    with pytest.raises(ValueError, match=words):
        _core.resample(**{**good, **change})
