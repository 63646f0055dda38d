"""Stitching against NumPy in float64: classes exactly, confidence and probabilities to a unit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core

LEVELS = ["baseline", "avx2", "avx512"]
LEVELS = LEVELS[: LEVELS.index(_core.best_simd_level()) + 1]


@pytest.fixture(autouse=True)
def restore_simd_level():
    yield
    _core.set_simd_level(_core.best_simd_level())


def run(logits, core, probabilities=True):
    """The outputs of one call on fresh arrays."""
    classes, height, width = len(logits), core[2] - core[0], core[3] - core[1]
    ids = np.full((height, width), 99, np.uint8)
    counts, confidence = np.zeros(classes, np.uint64), np.zeros(classes, np.uint64)
    planes = np.full((classes, height, width), 99, np.uint8) if probabilities else None
    nonfinite = _core.stitch(logits, core, ids, counts, confidence, planes)
    return ids, counts, confidence, planes, nonfinite


def twin(logits, core):
    """Classes, probabilities (float64) and the mask of pixels that are not finite."""
    y0, x0, y1, x1 = core
    part = logits[:, y0:y1, x0:x1]
    bad = ~np.isfinite(part).all(0)
    clean = np.where(bad, 0, part).astype(np.float64)
    ids = np.where(bad, 0, np.where(bad, 0, part).argmax(0)).astype(np.uint8)
    powers = np.exp(clean - clean.max(0, initial=-np.inf))
    return ids, np.where(bad, 0, powers / powers.sum(0)), bad


@st.composite
def tiles(draw):
    classes = draw(st.sampled_from([1, 2, 3, 4, 5, 32]))
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 70) | st.sampled_from([513, 1100]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0, 1e-3, 1, 30, 1e4, 3e38]))
    logits = (random.uniform(-1, 1, (classes, height, width)) * scale).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        for value in (np.nan, np.inf, -np.inf):
            logits[random.random(logits.shape) < 0.05] = value
    layout = draw(st.sampled_from(["plain", "channels", "reversed"]))
    if layout == "channels":  # rows of all classes beside each other
        logits = np.ascontiguousarray(logits.swapaxes(0, 1)).swapaxes(0, 1)
    if layout == "reversed":
        logits = np.ascontiguousarray(logits[::-1, ::-1])[::-1, ::-1]
    y0, x0 = draw(st.integers(0, height)), draw(st.integers(0, width))
    return logits, (y0, x0, draw(st.integers(y0, height)), draw(st.integers(x0, width)))


@given(tiles())
def test_equals_the_twin_and_every_level_gives_the_same_bytes(tile):
    logits, core = tile
    ids, probabilities, bad = twin(logits, core)
    answers = []
    for level in LEVELS:
        _core.set_simd_level(level)
        answers.append(run(logits, core))
    for answer in answers[1:]:
        for mine, first in zip(answer, answers[0], strict=True):
            np.testing.assert_array_equal(mine, first)
    got, counts, confidence, planes, nonfinite = answers[0]
    np.testing.assert_array_equal(got, ids)
    np.testing.assert_array_equal(counts, np.bincount(ids.ravel(), minlength=len(logits)))
    assert nonfinite == bad.sum()
    assert np.abs(planes - np.round(probabilities * 255)).max(initial=0) <= 1
    assert not planes[:, bad].any()
    top = np.round(probabilities.max(0, initial=0) * 65535)
    wanted = np.bincount(ids.ravel(), weights=top.ravel(), minlength=len(logits))
    assert (np.abs(confidence.astype(np.float64) - wanted) <= counts).all()


@given(st.integers(0, 2**32), st.sampled_from([2, 3, 4, 7]))
def test_confidence_of_each_pixel_is_within_a_unit(seed, classes):
    random = np.random.default_rng(seed)
    logits = (random.normal(size=(classes, 1, 40)) * random.choice([0.1, 3, 60])).astype(np.float32)
    _, probabilities, _ = twin(logits, (0, 0, 1, 40))
    for x in range(40):
        ids, _, confidence, _, _ = run(logits, (0, x, 1, x + 1))
        assert abs(int(confidence[ids[0, 0]]) - probabilities[:, 0, x].max() * 65535) <= 1
        assert confidence.sum() == confidence[ids[0, 0]]


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60))
def test_tiles_in_any_order_give_the_whole(seed, cut_y, cut_x):
    random = np.random.default_rng(seed)
    logits = random.normal(size=(3, 61, 61)).astype(np.float32)
    whole = run(logits, (0, 0, 61, 61))
    ids = np.full((61, 61), 99, np.uint8)
    planes = np.full((3, 61, 61), 99, np.uint8)
    counts, confidence = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    cores = [(y0, x0, y1, x1) for y0, y1 in ((0, cut_y), (cut_y, 61)) for x0, x1 in ((0, cut_x), (cut_x, 61))]
    for i in random.permutation(4):
        y0, x0, y1, x1 = cores[i]
        out = (slice(y0, y1), slice(x0, x1))
        _core.stitch(logits, cores[i], ids[out], counts, confidence, planes[:, out[0], out[1]])
    for mine, wanted in zip((ids, counts, confidence, planes), whole, strict=False):
        np.testing.assert_array_equal(mine, wanted)


@given(tiles(), st.data())
def test_before_a_pixel_shuffle_they_give_the_same(tile, data):
    """Cores at odd places, steps that end within a row, every level."""
    logits, _ = tile
    logits = np.concatenate([logits] * 2, 2)[:, : len(logits[0]) // 2 * 2]
    classes, height, width = logits.shape
    y0, x0 = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    core = (y0, x0, data.draw(st.integers(y0, height)), data.draw(st.integers(x0, width)))
    planes = logits.reshape(classes, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3)
    order = data.draw(st.permutations(range(4)))  # memory in any order but for the last axis
    back = np.argsort(order)
    planes = np.ascontiguousarray(planes.transpose(*order, 4)).transpose(*back, 4)
    wanted = run(np.ascontiguousarray(logits), core)
    for level in LEVELS:
        _core.set_simd_level(level)
        for mine, first in zip(run(planes, core), wanted, strict=True):
            np.testing.assert_array_equal(mine, first)


def test_ties_go_to_the_lowest_class_and_sums_are_added_to():
    logits = np.zeros((3, 1, 2), np.float32)
    logits[1:, 0, 1] = 5
    ids = np.empty((1, 2), np.uint8)
    counts, confidence = np.full(3, 10, np.uint64), np.full(3, 100, np.uint64)
    assert _core.stitch(logits, (0, 0, 1, 2), ids, counts, confidence) == 0
    assert ids.tolist() == [[0, 1]]
    assert counts.tolist() == [11, 11, 10]
    second = 65535 / (2 + np.exp(-5))
    assert confidence.tolist() == [100 + 21845, 100 + round(second), 100]


def test_numpy_integers_are_a_core():
    logits = np.zeros((2, 4, 4), np.float32)
    core = tuple(np.array([1, 1, 3, 4]))
    assert run(logits, core)[1].tolist() == [6, 0]


def arguments():
    return {
        "logits": np.zeros((3, 8, 8), np.float32),
        "core": (1, 1, 5, 7),
        "classes": np.zeros((4, 6), np.uint8),
        "counts": np.zeros(3, np.uint64),
        "confidence": np.zeros(3, np.uint64),
        "probabilities": np.zeros((3, 4, 6), np.uint8),
    }


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", np.zeros((3, 8, 8))),
        ("logits", np.zeros((3, 8, 8), ">f4")),
        ("logits", np.zeros((8, 8), np.float32)),
        ("logits", np.zeros((3, 8, 16), np.float32)[:, :, ::2]),
        ("logits", np.zeros((33, 8, 8), np.float32)),
        ("logits", np.zeros((3, 2, 8, 8), np.float32)),
        ("logits", np.zeros((3, 2, 3, 4, 4), np.float32)),
        ("logits", np.zeros((3, 2, 2, 4, 8), np.float32)[..., ::2]),
        ("logits", np.zeros((33, 2, 2, 4, 4), np.float32)),
        ("logits", np.zeros((0, 8, 8), np.float32)),
        ("logits", np.zeros(769, np.uint8)[1:].view(np.float32).reshape(3, 8, 8)),  # not aligned
        ("core", (1, 1, 5)),
        ("core", 7),
        ("core", (1, 1, 5, 9)),
        ("core", (1, 1, 9, 7)),
        ("core", (-1, 1, 3, 7)),
        ("core", (5, 1, 1, 7)),
        ("core", (1, 1, 5, 7.0)),
        ("core", (1, 1, 5, 2**80)),
        ("classes", np.zeros((4, 5), np.uint8)),
        ("classes", np.zeros((4, 12), np.uint8)[:, ::2]),
        ("classes", np.zeros((4, 6), np.int8)),
        ("classes", read_only(np.zeros((4, 6), np.uint8))),
        ("classes", [[0] * 6] * 4),
        ("counts", np.zeros(4, np.uint64)),
        ("counts", np.zeros(3, np.int64)),
        ("counts", np.zeros(6, np.uint64)[::2]),
        ("confidence", np.zeros(2, np.uint64)),
        ("probabilities", np.zeros((3, 4, 7), np.uint8)),
        ("probabilities", np.zeros((3, 6, 4), np.uint8).swapaxes(1, 2)),
    ],
)
def test_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        _core.stitch(**{**arguments(), name: value})
