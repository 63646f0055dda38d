"""Slots as every engine has them, and several engines behind the interface of one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from running import FakeEngine, make_pictures, results, run_stream

from histoseg_fast import _core
from histoseg_fast.engines.base import CLASSES, Slot
from histoseg_fast.engines.several import SeveralEngines

SHAPES = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)), min_size=1)


@given(SHAPES)
def test_input_and_cores_share_a_buffer_and_never_a_byte(shapes):
    slot = Slot()
    assert slot.wants is CLASSES
    for n, h, w, filled in shapes:
        assert slot.reshape(n, h, w) is slot.input
        assert slot.input.shape == (n, h, w, 3) and slot.cores.shape == (n, 4) and slot.cores.dtype == np.int32
        assert not slot.cores.any() and slot.cores.ctypes.data % 4 == 0
        slot.input[...], slot.cores[...] = 255, 7
        assert (slot.input == 255).all() and (slot.cores == 7).all()
        slot.shorten(min(filled, n))
        assert len(slot.input) == len(slot.cores) == min(filled, n)


def test_a_slot_stitches_its_logits():
    slot = Slot()
    slot.reshape(2, 4, 5)
    slot.logits = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    slot.logits[1, 0, 2, 2] = np.nan
    found = []
    for stitch in (lambda *given: slot.stitch(1, *given), lambda *given: _core.stitch(slot.logits[1], *given)):
        arrays = np.zeros((2, 3), np.uint8), np.ones(3, np.uint64), np.ones(3, np.uint64), np.zeros((3, 2, 3), np.uint8)
        assert stitch((1, 2, 3, 5), *arrays) == 1
        found.append(arrays)
    for mine, wanted in zip(*found, strict=True):
        np.testing.assert_array_equal(mine, wanted)


class OneOfTwo(FakeEngine):
    def __init__(self, index, failing=False):
        super().__init__()
        self.device, self.depth, self.batch, self.failing, self.closed = f"cuda:{index}", 2 + index, 4, failing, False

    def close(self):
        self.closed = True
        if self.failing:
            raise RuntimeError("gone")


def test_several_engines_take_turns(tmp_path):
    first, second = OneOfTwo(0), OneOfTwo(1)
    engine = SeveralEngines([first, second])
    assert (engine.device, engine.depth, engine.batch, engine.name) == ("cuda:0,1", 5, 4, "fake 1")
    assert [len(engine.slots(count)) for count in (0, 1, 2, 7)] == [0, 1, 2, 7]
    make_pictures(tmp_path / "in", 9)
    run_stream(engine, tmp_path / "in", tmp_path / "out", tile=16, readers=2)
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", tile=16)
    assert results(tmp_path / "out") == results(tmp_path / "plain")
    assert first.submits and second.submits and (first.submits, second.submits) == (first.waits, second.waits)


def test_every_engine_is_closed_though_one_fails():
    engines = OneOfTwo(0, failing=True), OneOfTwo(1)
    with pytest.raises(RuntimeError, match="gone"), SeveralEngines(engines):
        pass
    assert all(engine.closed for engine in engines)
