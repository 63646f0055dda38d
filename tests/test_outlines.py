"""Outlines of class maps: back to the same pixels, valid, shared by neighbours, the same for any cut into bands."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import shapely
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterise import Rings, rasterise

from histoseg_fast import _core

Polygons = list[tuple[int, Rings]]


def trace(ids: np.ndarray, min_area: int = 0, simplify: bool = True, scale=(1.0, 1.0), cuts=()) -> Polygons:
    """All pieces of `ids`, given in bands that end at `cuts`."""
    outlines = _core.Outlines(ids.shape[1], min_area, simplify, scale)
    found = [piece for band in np.split(ids, sorted(cuts)) for piece in outlines.add_rows(band)]
    return [(number, json.loads(text)) for number, text in found + outlines.finish()]


def components(ids: np.ndarray) -> list[tuple[int, int]]:
    """Class and size of each set of pixels of one class but 0 that are connected by edges, by flood fill."""
    left = {(y, x) for y, x in np.argwhere(ids)}
    found = []
    while left:
        waiting, size = [left.pop()], 0
        while waiting:
            y, x = waiting.pop()
            size += 1
            for near in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if near in left and ids[near] == ids[y, x]:
                    left.remove(near)
                    waiting.append(near)
        found.append((int(ids[y, x]), size))
    return sorted(found)


@st.composite
def class_maps(draw, classes: int = 4, least: int = 0) -> np.ndarray:
    """Noise, blocks or blobs with some noise, ids from `least` on."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    height, width, ids = draw(st.integers(1, 24)), draw(st.integers(1, 24)), draw(st.integers(1, classes))
    block = draw(st.sampled_from([1, 1, 3, 7]))
    coarse = rng.integers(least, least + ids, (height // block + 1, width // block + 1), np.uint8)
    found = coarse.repeat(block, 0).repeat(block, 1)[:height, :width]
    noisy = rng.random((height, width)) < draw(st.sampled_from([0, 0, 0.05, 0.3]))
    return np.where(noisy, rng.integers(least, least + ids, (height, width), np.uint8), found)


CHECKERBOARD = (np.indices((6, 7)).sum(0) % 2).astype(np.uint8)
RING_WITH_A_GAP = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]], np.uint8)
NESTED = np.pad(np.pad(np.pad([[1]], 1, constant_values=2), 1, constant_values=0), 2, constant_values=1).astype(
    np.uint8
)
SPECIAL = [np.ones((1, 1), np.uint8), np.zeros((3, 4), np.uint8), CHECKERBOARD, 1 - CHECKERBOARD, CHECKERBOARD + 1]
SPECIAL += [RING_WITH_A_GAP, NESTED, np.full((5, 9), 2, np.uint8), np.tril(np.ones((9, 9), np.uint8))]


def with_special(test):
    for ids in SPECIAL:
        test = example(ids, 1)(test)
    return settings(max_examples=300, deadline=None)(given(class_maps(), st.integers(0, 2**16))(test))


@with_special
def test_pieces_are_valid_polygons_of_exactly_their_pixels(ids: np.ndarray, seed: int) -> None:
    height, width = ids.shape
    cuts = np.random.default_rng(seed).integers(0, height + 1, 3)
    sizes = {}
    for simplify in (False, True):
        found = trace(ids, simplify=simplify)
        assert trace(ids.repeat(2, 1)[:, ::2], simplify=simplify, cuts=cuts) == found
        np.testing.assert_array_equal(rasterise(found, height, width), ids)
        for number, rings in found:
            assert number != 0 and all(ring[0] == ring[-1] and len(ring) >= 4 for ring in rings)
            polygon = shapely.Polygon(rings[0], rings[1:])
            assert polygon.is_valid, shapely.is_valid_reason(polygon)
            assert polygon.exterior.is_ccw and not any(hole.is_ccw for hole in polygon.interiors)
        sizes[simplify] = [(number, len(rings)) for number, rings in found]
        if not simplify:
            areas = [(number, int(shapely.Polygon(rings[0], rings[1:]).area)) for number, rings in found]
            assert sorted(areas) == components(ids)
    assert sizes[False] == sizes[True]


@settings(max_examples=200, deadline=None)
@given(class_maps(least=1), st.booleans())
def test_neighbours_neither_overlap_nor_gap(ids: np.ndarray, simplify: bool) -> None:
    polygons = [shapely.Polygon(rings[0], rings[1:]) for _, rings in trace(ids, simplify=simplify)]
    assert sum(polygon.area for polygon in polygons) == ids.size  # halves and their products: exact in float64
    assert shapely.union_all(polygons).equals(shapely.box(0, 0, ids.shape[1], ids.shape[0]))


@settings(max_examples=100, deadline=None)
@given(class_maps())
def test_simplified_outlines_stay_within_half_a_pixel(ids: np.ndarray) -> None:
    for (_, exact), (_, fewer) in zip(trace(ids, simplify=False), trace(ids), strict=True):
        lines = shapely.MultiLineString(exact)
        fine = shapely.segmentize(shapely.MultiLineString(fewer), 0.1)
        assert shapely.distance(shapely.points(shapely.get_coordinates(fine)), lines).max() <= 0.5 + 1e-12


@settings(max_examples=200, deadline=None)
@given(class_maps(), st.integers(0, 40))
def test_small_pieces_and_small_holes_are_left_out(ids: np.ndarray, min_area: int) -> None:
    def kept(ring: list) -> bool:
        return shapely.Polygon(ring).area >= min_area

    wanted = [
        (number, [ring for i, ring in enumerate(rings) if i == 0 or kept(ring)])
        for number, rings in trace(ids, simplify=False)
        if shapely.Polygon(rings[0], rings[1:]).area >= min_area
    ]

    def shape(found: Polygons) -> list:
        return [(number, rings[0], sorted(rings[1:])) for number, rings in found]

    found = trace(ids, min_area, simplify=False)
    assert shape(found) == shape(wanted)
    rasterise(found, *ids.shape)  # which asserts that what fills a hole covers no other piece
    assert [(n, len(rings)) for n, rings in trace(ids, min_area)] == [(n, len(rings)) for n, rings in found]


def test_a_hole_that_touches_the_outside_is_a_hole() -> None:
    ((_, rings),) = trace(RING_WITH_A_GAP[:3], simplify=False)
    assert len(rings) == 2
    outer = shapely.LinearRing([(0, 0), (4, 0), (4, 3), (3, 3), (3, 2), (2, 2), (2, 3), (0, 3)])
    assert shapely.LinearRing(rings[0]).normalize() == outer.normalize()
    assert sorted(rings[1][:-1]) == [[1, 1], [1, 2], [2, 1], [2, 2]]


def test_simplified_outlines_need_few_points() -> None:
    y, x = np.mgrid[:400, :400]
    disc = ((y - 200) ** 2 + (x - 200) ** 2 < 150**2).astype(np.uint8)
    slope = (3 * y > x + 50).astype(np.uint8)
    assert len(trace(disc)[0][1][0]) < len(trace(disc, simplify=False)[0][1][0]) / 6
    assert len(trace(slope)[0][1][0]) <= 16


def test_up_to_255_classes() -> None:
    ids = np.random.default_rng(0).integers(0, 256, (60, 70), np.uint8)
    assert ids.max() == 255
    found = trace(ids)
    np.testing.assert_array_equal(rasterise(found, 60, 70), ids)


@pytest.mark.parametrize("scale", [(1.0, 1.0), (4.0, 4.0), (3.9997, 1 / 0.7), (0.25, 1000.5), (0.5, 2.0**20)])
def test_coordinates_are_scaled(scale: tuple[float, float]) -> None:
    ids = np.kron(CHECKERBOARD + 1, np.ones((3, 5), np.uint8))
    for (_, plain), (_, scaled) in zip(trace(ids), trace(ids, scale=scale), strict=True):
        for one, other in zip(plain, scaled, strict=True):
            np.testing.assert_allclose(np.multiply(one, scale[::-1]), other, rtol=1e-15, atol=5.1e-7)


def test_coordinates_are_short() -> None:
    outlines = _core.Outlines(3, 0, True, (1.5, 2.25))
    outlines.add_rows(np.ones((1, 3), np.uint8))
    assert outlines.finish() == [(1, b"[[[6.75,1.5],[0,1.5],[0,0],[6.75,0],[6.75,1.5]]]")]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((0, 0, True), "width"),
        ((_core.max_outline_side + 1, 0, True), "width"),
        ((4, -1, True), "min_area"),
        ((4, 0, True, (0.2, 1.0)), "scale"),
        ((4, 0, True, (1.0, 2.0**20 + 1)), "scale"),
        ((4, 0, True, (float("nan"), 1.0)), "scale"),
        ((4, 0, True, (1.0, float("inf"))), "scale"),
    ],
)
def test_wrong_arguments(arguments: tuple, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        _core.Outlines(*arguments)


def test_wrong_rows() -> None:
    outlines = _core.Outlines(4, 0, True)
    for rows in (np.zeros((2, 5), np.uint8), np.zeros((2, 4), np.int64), np.zeros(4, np.uint8), [[0, 0, 0, 0]]):
        with pytest.raises(ValueError, match="ids"):
            outlines.add_rows(rows)
    outlines.finish()
    for late in (lambda: outlines.add_rows(np.zeros((1, 4), np.uint8)), outlines.finish):
        with pytest.raises(ValueError, match=r"finish|end of the image"):
            late()


GROWTH = """
import resource, numpy as np
from histoseg_fast import _core
side = 20000
y, x = np.ogrid[:500, : side + 500]
stripes = ((x // 3000 + (y + x) // 4000) % 3).astype(np.uint8)
outlines, pieces = _core.Outlines(side, 16, True), 0
for number, top in enumerate(range(0, side, 500)):
    shift = 7 * (number % 9)
    pieces += len(outlines.add_rows(stripes[:, shift : shift + side]))
    if number == 1:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pieces += len(outlines.finish())
print(pieces, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ru_maxrss in KiB")
def test_memory_does_not_grow_with_the_area() -> None:
    run = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    pieces, kib = map(int, run.stdout.split())
    assert pieces > 5 and kib < 16 << 10  # of a class map of 400 MB
