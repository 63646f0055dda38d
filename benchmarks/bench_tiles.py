"""Cutting a tile out of a band of a wide image, as the reader does it: pytest benchmarks/bench_tiles.py

The band is 30,000 pixels wide and as high as the tile, so no cache holds it; each round cuts the next tile of it.
Prints the ratios at the end (run with -s) and asserts nothing about time.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from micro import measure_into, one_thread_of_opencv

TILE, WIDTH = 1152, 30_000
seconds: dict[str, float] = {}
measure = measure_into(seconds)


@pytest.fixture(scope="module")
def band():
    random = np.random.default_rng(0)
    return np.resize(random.integers(0, 256, (64, WIDTH, 3), np.uint8), (TILE, WIDTH, 3))


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    if not {"copy", "gather"} <= seconds.keys():
        return
    rate = 2 * TILE * TILE * 3 / seconds["gather"] / 1e9
    print(f"\n\ngather: {seconds['gather'] * 1e3:.2f} ms a tile of {TILE}, {rate:.1f} GB/s read and written, ", end="")
    print(f"{seconds['copy'] / seconds['gather']:.2f} of memcpy's speed", end="")
    print(f", {seconds['opencv'] / seconds['gather']:.2f} times OpenCV" if "opencv" in seconds else "")


def starts():
    """The left edges of the tiles, again and again."""
    return itertools.cycle(range(0, WIDTH - TILE, TILE))


def test_gather(benchmark, band):
    place, left = np.empty((TILE, TILE, 3), np.uint8), starts()

    def gather() -> int:
        at = next(left)
        place[...] = band[:, at : at + TILE]  # as in pipeline/stream.py
        return at

    at = measure(benchmark, "gather", gather)
    np.testing.assert_array_equal(place, band[:, at : at + TILE])


def test_opencv(benchmark, band):
    cv2 = one_thread_of_opencv()
    place, left = np.empty((TILE, TILE, 3), np.uint8), starts()

    def gather() -> int:
        at = next(left)
        cv2.copyTo(band[:, at : at + TILE], None, place)
        return at

    at = measure(benchmark, "opencv", gather)
    np.testing.assert_array_equal(place, band[:, at : at + TILE])


def test_copy_of_as_many_bytes_in_one_piece(benchmark, band):
    size = TILE * TILE * 3
    flat, place = band.reshape(-1), np.empty(size, np.uint8)
    left = itertools.cycle(range(0, len(flat) - size, size))

    def copy() -> None:
        at = next(left)
        place[...] = flat[at : at + size]

    measure(benchmark, "copy", copy)
