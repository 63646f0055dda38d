"""The layers' kernels without a GPU: every thread of a launch in turn, or the same sums, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from kernels import HOST
from layer_kernels import check_broken_values, check_layers, launch, layer_cases

from histoseg_fast import _core

SETTINGS = settings(deadline=None, max_examples=60)


@SETTINGS
@given(layer_cases())
def test_layers(case):
    check_layers(HOST, case)


def test_broken_values_reach_the_logits():
    check_broken_values(HOST)


def test_every_half_and_sums_of_two():
    """Rounding and order are NumPy's."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    others = np.float16([0, -0.0, 1, 2049, 65504, -65504, 6e-8, np.inf, np.nan, *every[::4093]])
    skips = every.reshape(1, 64, 128, 8)
    for other in others:
        lows = np.full((1, 32, 64, 8), other)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = np.maximum((skips.astype(np.float32) + np.float32(other)).astype(np.float16), np.float16(0))
        mine = launch(HOST, "join", skips.shape, np.float16, lows, skips, *skips.shape)
        np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((1, 1, 2, 2, 8, 16), "from_ptr: is not aligned to 16 bytes"),
        ((16, 1, 2, 2, 8, 8), "to_ptr: is not aligned to 16 bytes"),
        ((0, 1, 2, 2, 8, 16), "from_ptr: is 0, which is no address"),
        ((16, 70000, 2, 2, 8, 16), "n: expected 0 to 65535, got 70000"),
        ((16, 1, 40000, 2, 8, 16), "rows: expected 0 to 65535, got 80000"),
        ((16, 1, 2, 2, 12, 16), "channels: expected a multiple of 8, got 12"),
    ],
)
def test_wrong_arguments(arguments, words):
    for kernel in (_core.cuda_pool, _core.emulate_spread):
        with pytest.raises(ValueError, match=words):
            kernel(*arguments, 0)
    with pytest.raises(ValueError, match="outputs: expected a multiple of 4 to shuffle"):
        _core.cuda_logits(16, 1, 2, 2, 16, 16, 3, 2, 16, 0)
    with pytest.raises(ValueError, match="h, w: expected multiples of the stride, 2"):
        _core.cuda_first(16, 1, 3, 2, 4, [1.0] * 3, [0.0] * 3, 16, 16, 16, 0)
    with pytest.raises(ValueError, match="h, w: expected multiples of 2"):
        _core.cuda_join(16, 16, 1, 3, 2, 8, 16, 0)
