"""Labels against NumPy, OpenCV (where installed) and memcpy, on one 1128x720 label: pytest benchmarks/bench_labels.py

Prints the ratios at the end (run with -s) and asserts nothing about time.
"""

from __future__ import annotations

import numpy as np
import pytest
from micro import measure_into, one_thread_of_opencv

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE

COLOURS = PAPER_PALETTE.array
PIXELS = 720 * 1128
seconds: dict[str, float] = {}
measure = measure_into(seconds)


def numpy_decode(rgb):
    """Colours packed to one integer each, compared once a class."""
    codes = rgb[..., 0] | rgb[..., 1].astype(np.uint32) << 8 | rgb[..., 2].astype(np.uint32) << 16
    ids = np.full(codes.shape, 255, np.uint8)
    for index, (r, g, b) in enumerate(COLOURS.tolist()):
        ids[codes == (r | g << 8 | b << 16)] = index
    return ids


def numpy_decode_by_planes(rgb):
    """No packing: three byte comparisons a class."""
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    ids = np.full(rgb.shape[:2], 255, np.uint8)
    for index, (red, green, blue) in enumerate(COLOURS.tolist()):
        np.copyto(ids, index, where=(r == red) & (g == green) & (b == blue))
    return ids


def opencv_decode(cv2, rgb, planes):
    """A mask a class, and a copy through it."""
    ids = np.full(rgb.shape[:2], 255, np.uint8)
    for colour, plane in zip(COLOURS.tolist(), planes, strict=True):
        cv2.copyTo(plane, cv2.inRange(rgb, tuple(colour), tuple(colour)), ids)
    return ids


@pytest.fixture(scope="module")
def label():
    """Class areas of about ten pixels, as ids and RGB."""
    areas = np.random.default_rng(0).integers(0, len(COLOURS), (72, 113)).astype(np.uint8)
    ids = np.ascontiguousarray(areas.repeat(10, 0).repeat(10, 1)[:, :1128])
    return ids, COLOURS[ids]


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    if not {"memcpy", "decode", "numpy decode", "numpy decode by planes"} <= seconds.keys():
        return
    best_numpy = min(seconds["numpy decode"], seconds["numpy decode by planes"])
    # Bytes read and written: 3 + 1 a pixel against 3 + 3.
    share = (4 / seconds["decode"]) / (6 / seconds["memcpy"])
    print(f"\n\ndecode ({_core.simd_level()}, one thread): {seconds['decode'] / PIXELS * 1e9:.3f} ns a pixel, ", end="")
    print(f"{best_numpy / seconds['decode']:.0f} times the best NumPy, {share:.2f} of memcpy's bytes a second")
    if {"encode", "numpy encode"} <= seconds.keys():
        share = (4 / seconds["encode"]) / (6 / seconds["memcpy"])
        print(f"encode: {seconds['encode'] / PIXELS * 1e9:.3f} ns a pixel, ", end="")
        print(f"{seconds['numpy encode'] / seconds['encode']:.0f} times NumPy, {share:.2f} of memcpy's bytes a second")
    for name in ("decode", "encode"):
        if {name, f"opencv {name}"} <= seconds.keys():
            print(f"{name}: {seconds[f'opencv {name}'] / seconds[name]:.1f} times OpenCV")


def test_memcpy(benchmark, label):
    measure(benchmark, "memcpy", np.copyto, np.empty_like(label[1]), label[1])


def test_decode(benchmark, label):
    found = measure(benchmark, "decode", _core.decode_labels, label[1], COLOURS, 0.0, 1)
    np.testing.assert_array_equal(found[0], label[0])


def test_decode_one_pixel_in_a_hundred_inexact(benchmark, label):
    rgb = label[1].copy()
    rgb.reshape(-1, 3)[::100, 2] += 1
    found = measure(benchmark, "decode inexact", _core.decode_labels, rgb, COLOURS, 2.0, 1)
    np.testing.assert_array_equal(found[0], label[0])


def test_numpy_decode(benchmark, label):
    np.testing.assert_array_equal(measure(benchmark, "numpy decode", numpy_decode, label[1]), label[0])


def test_numpy_decode_by_planes(benchmark, label):
    found = measure(benchmark, "numpy decode by planes", numpy_decode_by_planes, label[1])
    np.testing.assert_array_equal(found, label[0])


def test_encode(benchmark, label):
    np.testing.assert_array_equal(measure(benchmark, "encode", _core.encode_labels, label[0], COLOURS, 1), label[1])


def test_numpy_encode(benchmark, label):
    np.testing.assert_array_equal(measure(benchmark, "numpy encode", COLOURS.take, label[0], 0), label[1])


def test_opencv_decode(benchmark, label):
    cv2 = one_thread_of_opencv()
    planes = [np.full(label[0].shape, index, np.uint8) for index in range(len(COLOURS))]
    np.testing.assert_array_equal(measure(benchmark, "opencv decode", opencv_decode, cv2, label[1], planes), label[0])


def test_opencv_encode(benchmark, label):
    cv2 = one_thread_of_opencv()
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(COLOURS), 0] = COLOURS
    np.testing.assert_array_equal(measure(benchmark, "opencv encode", cv2.applyColorMap, label[0], table), label[1])
