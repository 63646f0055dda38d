"""Islands and majorities against slow plain twins, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from histoseg_fast import _core


def components(ids):
    """The components (4-neighbours) as lists of (y, x), in the order of their first pixels."""
    height, width = ids.shape
    seen, found = set(), []
    for start in np.ndindex(height, width):
        if start in seen:
            continue
        seen.add(start)
        members = [start]
        for y, x in members:  # grows while it is walked
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                inside = 0 <= near[0] < height and 0 <= near[1] < width
                if inside and near not in seen and ids[near] == ids[start]:
                    seen.add(near)
                    members.append(near)
        found.append(members)
    return found


def islands_twin(ids, area):
    """Labels everything anew after each island."""
    ids = ids.copy()
    while True:
        small = [members for members in components(ids) if len(members) < min(area, ids.size)]
        if not small:
            return ids
        island = min(small, key=len)  # the first of the smallest
        votes = np.zeros(256, int)
        for y, x in island:
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= near[0] < ids.shape[0] and 0 <= near[1] < ids.shape[1] and near not in island:
                    votes[ids[near]] += 1
        ids[tuple(np.transpose(island))] = votes.argmax()


def majority_twin(ids, radius, classes):
    out = ids.copy()
    for y, x in np.ndindex(*ids.shape):
        window = ids[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1]
        counts = np.bincount(window.ravel(), minlength=classes)
        if counts[ids[y, x]] < counts.max():
            out[y, x] = counts.argmax()
    return out


@st.composite
def maps(draw, top=255):
    """Class maps with patches, in any memory layout, and how many classes they may hold."""
    classes = draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 14))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids = random.integers(0, classes, (height, width)).astype(np.uint8)
    block = draw(st.integers(1, 4))
    ids = np.kron(ids, np.ones((block, block), np.uint8))[:height, :width]
    noise = random.random(ids.shape) < draw(st.sampled_from([0, 0.1, 0.5]))
    ids[noise] = random.integers(0, classes, noise.sum())
    if draw(st.booleans()):
        ids += np.uint8(top + 1 - classes)
    layout = draw(st.sampled_from(["plain", "transposed", "reversed", "every second"]))
    if layout == "transposed":
        ids = ids.T
    if layout == "reversed":
        ids = ids[::-1, ::-1]
    if layout == "every second":
        ids = np.repeat(np.repeat(ids, 2, 0), 2, 1)[::2, ::2]
    return ids


@given(maps(), st.integers(0, 30) | st.sampled_from([200, 2**40]))
def test_islands_equal_the_twin(ids, area):
    before = ids.copy()
    got, changed = _core.remove_islands(ids, area)
    np.testing.assert_array_equal(got, islands_twin(ids, area))
    np.testing.assert_array_equal(ids, before)
    assert changed == (got != ids).sum()
    assert all(len(members) >= min(area, ids.size) for members in components(got))
    again, changed = _core.remove_islands(got, area)
    assert changed == 0
    np.testing.assert_array_equal(again, got)


@given(maps(top=31), st.integers(0, 16) | st.just(1024))
def test_majority_equals_the_twin(ids, radius):
    before = ids.copy()
    got = _core.majority(ids, radius, int(ids.max()) + 1)
    np.testing.assert_array_equal(got, majority_twin(ids, radius, int(ids.max()) + 1))
    np.testing.assert_array_equal(ids, before)


def islands(rows, area):
    ids, changed = _core.remove_islands(np.array(rows, np.uint8), area)
    return ids.tolist(), changed


def test_an_island_joins_its_longest_border_and_the_lower_class_on_a_tie():
    assert islands([[1, 1, 1], [0, 5, 1], [0, 0, 1]], 2) == ([[1, 1, 1], [0, 0, 1], [0, 0, 1]], 1)
    assert islands([[1, 1, 1], [1, 5, 1], [0, 0, 0]], 2) == ([[1, 1, 1], [1, 1, 1], [0, 0, 0]], 1)


def test_an_island_of_the_area_stays_and_diagonals_do_not_connect():
    rows = [[0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0], [0, 0, 0, 0]]
    assert islands(rows, 1) == (rows, 0)
    assert islands(rows, 2) == ([[0] * 4] * 4, 2)


def test_islands_within_islands_go_from_the_smallest_out():
    ids = np.zeros((9, 9), np.uint8)
    ids[2:7, 2:7], ids[3:6, 3:6], ids[4, 4] = 1, 2, 3
    assert np.unique(_core.remove_islands(ids, 9)[0]).tolist() == [0, 1, 2]  # the 3 fills the 2 up to 9 pixels
    assert np.unique(_core.remove_islands(ids, 10)[0]).tolist() == [0, 1]
    assert _core.remove_islands(ids, 26)[1] == 25


def test_an_image_smaller_than_the_area_ends_in_one_class():
    assert islands([[0, 0, 1]], 100) == ([[0, 0, 0]], 1)
    assert islands([[7]], 100) == ([[7]], 0)


@pytest.mark.parametrize("pattern", ["checkerboard", "noise", "rows"])
def test_many_islands_at_once(pattern):
    y, x = np.mgrid[:700, :700]
    noise = np.random.default_rng(0).integers(0, 4, (700, 700))
    ids = {"checkerboard": (x + y) % 2, "noise": noise, "rows": y % 2}[pattern].astype(np.uint8)
    got, changed = _core.remove_islands(ids, 1000)
    assert changed == (got != ids).sum() > 0
    assert _core.remove_islands(got, 1000)[1] == 0


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_maps(shape):
    ids = np.zeros(shape, np.uint8)
    assert _core.remove_islands(ids, 10)[0].shape == shape
    assert _core.majority(ids, 3, 2).shape == shape


MAP = np.zeros((4, 5), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((MAP.astype(np.int32), 3), "ids"),
        ((MAP[0], 3), "ids"),
        ((MAP.tolist(), 3), "ids"),
        ((MAP, -1), "area"),
    ],
)
def test_islands_refuse(arguments, name):
    with pytest.raises(ValueError, match=name):
        _core.remove_islands(*arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((MAP.astype(np.int8), 1, 2), "ids"),
        ((MAP[None], 1, 2), "ids"),
        ((MAP + np.uint8(2), 1, 2), "ids: id 2 at x=0, y=0"),
        ((MAP, -1, 2), "radius"),
        ((MAP, 1025, 2), "radius"),
        ((MAP, 1, 0), "classes"),
        ((MAP, 1, 33), "classes"),
    ],
)
def test_majority_refuses(arguments, name):
    with pytest.raises(ValueError, match=name):
        _core.majority(*arguments)


def test_maps_above_the_limit_are_refused():
    huge = np.broadcast_to(np.zeros(1, np.uint8), (1 << 15, (1 << 13) + 1))
    for call in (lambda: _core.remove_islands(huge, 3), lambda: _core.majority(huge, 3, 2)):
        with pytest.raises(ValueError, match="at most 268435456 pixels"):
            call()
