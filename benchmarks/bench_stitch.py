"""Stitching and tinting against NumPy, OpenCV (where installed) and a copy: pytest benchmarks/bench_stitch.py

On the logits of one 1128x720 image. Prints the ratios at the end (run with -s) and asserts nothing about time.
"""

from __future__ import annotations

import numpy as np
import pytest
from micro import measure_into, one_thread_of_opencv

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE

HEIGHT, WIDTH = 720, 1128
PIXELS = HEIGHT * WIDTH
seconds: dict[str, float] = {}
measure = measure_into(seconds)


def numpy_stitch(logits, classes, counts, confidence):
    """Argmax and softmax of the winner, float32, no array larger than needed."""
    classes[:] = logits.argmax(0)
    top = logits.max(0)
    units = np.rint(65535 / np.exp(logits - top).sum(0))
    counts += np.bincount(classes.ravel(), minlength=len(logits)).astype(np.uint64)
    confidence += np.bincount(classes.ravel(), units.ravel(), len(logits)).astype(np.uint64)


def opencv_stitch(cv2, logits, classes, counts, confidence):
    """Plane by plane in OpenCV's vectorised calls."""
    top, winner = logits[0], np.zeros(classes.shape, np.uint8)
    for index in range(1, len(logits)):
        winner = cv2.bitwise_or(
            cv2.bitwise_and(winner, cv2.compare(top, logits[index], cv2.CMP_GE)),
            cv2.bitwise_and(np.full_like(winner, index), cv2.compare(logits[index], top, cv2.CMP_GT)),
        )
        top = cv2.max(top, logits[index])
    total = sum(cv2.exp(cv2.subtract(plane, top)) for plane in logits)
    units = cv2.divide(65535.0, total)
    for index in range(len(logits)):
        mask = cv2.compare(winner, index, cv2.CMP_EQ)
        count = cv2.countNonZero(mask)
        counts[index] += np.uint64(count)
        confidence[index] += np.uint64(round(cv2.mean(units, mask)[0] * count))
    classes[:] = winner


@pytest.fixture(scope="module")
def tile():
    logits = np.random.default_rng(0).normal(size=(3, HEIGHT, WIDTH)).astype(np.float32)
    outputs = np.zeros((HEIGHT, WIDTH), np.uint8), np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    return logits, outputs


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    if not {"read", "stitch", "numpy"} <= seconds.keys():
        return
    nanoseconds = seconds["stitch"] / PIXELS * 1e9
    print(f"\n\nstitch ({_core.simd_level()}, one thread): {nanoseconds:.2f} ns a pixel, ", end="")
    print(f"{seconds['numpy'] / seconds['stitch']:.0f} times NumPy, ", end="")
    print(f"{seconds['stitch'] / seconds['read']:.1f} times as long as copying the logits")
    if "opencv" in seconds:
        print(f"stitch: {seconds['opencv'] / seconds['stitch']:.0f} times OpenCV")
    for name in ("stitch before a pixel shuffle", "stitch with probabilities", "tint"):
        if name in seconds:
            print(f"{name}: {seconds[name] / PIXELS * 1e9:.2f} ns a pixel")


def test_copy_of_the_logits(benchmark, tile):
    measure(benchmark, "read", np.copyto, np.empty_like(tile[0]), tile[0])


def test_stitch(benchmark, tile):
    logits, outputs = tile
    measure(benchmark, "stitch", _core.stitch, logits, (0, 0, HEIGHT, WIDTH), *outputs)
    np.testing.assert_array_equal(outputs[0], logits.argmax(0))


def test_stitch_before_a_pixel_shuffle(benchmark, tile):
    logits, outputs = tile
    planes = np.ascontiguousarray(logits.reshape(3, HEIGHT // 2, 2, WIDTH // 2, 2).transpose(0, 2, 4, 1, 3))
    measure(benchmark, "stitch before a pixel shuffle", _core.stitch, planes, (0, 0, HEIGHT, WIDTH), *outputs)
    np.testing.assert_array_equal(outputs[0], logits.argmax(0))


def test_stitch_with_probabilities(benchmark, tile):
    logits, outputs = tile
    planes = np.zeros(logits.shape, np.uint8)
    measure(benchmark, "stitch with probabilities", _core.stitch, logits, (0, 0, HEIGHT, WIDTH), *outputs, planes)
    np.testing.assert_array_equal(planes.argmax(0)[planes.max(0) > 127], outputs[0][planes.max(0) > 127])


def test_numpy(benchmark, tile):
    measure(benchmark, "numpy", numpy_stitch, tile[0], *tile[1])
    np.testing.assert_array_equal(tile[1][0], tile[0].argmax(0))


def test_opencv(benchmark, tile):
    cv2 = one_thread_of_opencv()
    logits, outputs = tile
    measure(benchmark, "opencv", opencv_stitch, cv2, logits, *outputs)
    np.testing.assert_array_equal(outputs[0], logits.argmax(0))


def test_tint(benchmark, tile):
    rgb = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    measure(benchmark, "tint", _core.tint, rgb, tile[1][0], None, PAPER_PALETTE.array, 100, np.empty_like(rgb))
