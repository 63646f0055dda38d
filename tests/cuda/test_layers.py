"""The layers' kernels without a GPU: every thread of a launch in turn, against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from kernels import HOST
from layer_kernels import (
    check_broken_values,
    check_first,
    check_join,
    check_logits,
    check_pool,
    check_spread,
    layer_cases,
)

from histoseg_fast import _core

SETTINGS = settings(deadline=None, max_examples=60)


@SETTINGS
@given(layer_cases())
def test_layers(case):
    check_first(HOST, _core.emulate_first, case, 3)
    check_first(HOST, _core.emulate_first, case, 4)
    check_pool(HOST, _core.emulate_pool, case)
    check_spread(HOST, _core.emulate_spread, case)
    check_join(HOST, _core.emulate_join, case)


@settings(deadline=None, max_examples=20)
@given(layer_cases())
def test_the_last_convolution(case):
    for outputs, shuffle in ((3, 1), (8, 2), (16, 1), (12, 2)):
        check_logits(HOST, _core.emulate_logits, case, outputs, shuffle)


def test_broken_values_reach_the_logits():
    check_broken_values(HOST, _core.emulate_logits)


def test_every_half_and_every_sum_of_two():
    """Rounding and order are NumPy's: all halves against some, and those that round at every place."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    other = np.concatenate([every[::4093], np.float16([0, -0.0, 1, 2049, 65504, -65504, 6e-8])])
    for low in itertools.batched(other, 8) if hasattr(itertools, "batched") else zip(*[iter(other)] * 8, strict=False):
        lows = np.tile(np.array(low, np.float16), (1, 128, 8, 1))
        skips = np.repeat(every.reshape(1, 256, 32, 8)[:, :, ::2], 1, 0).copy()
        with np.errstate(over="ignore", invalid="ignore"):
            sums = lows.repeat(2, 1).repeat(2, 2).astype(np.float32) + skips.astype(np.float32)
            wanted = np.maximum(sums.astype(np.float16), np.float16(0))
        blocks = [HOST.put(lows), HOST.put(skips), HOST.poisoned(skips.shape, np.float16)]
        _core.emulate_join(blocks[0].address, blocks[1].address, *skips.shape, blocks[2].address, 0)
        np.testing.assert_array_equal(blocks[2].read(), wanted)


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
