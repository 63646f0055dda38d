"""Stitching and tinting against NumPy, on the logits of one 1128x720 image: pytest benchmarks/bench_stitch.py

Prints the ratios at the end (run with -s) and asserts nothing about time.
"""

from __future__ import annotations

import numpy as np
import pytest

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE

HEIGHT, WIDTH = 720, 1128
PIXELS = HEIGHT * WIDTH
seconds: dict[str, float] = {}


def numpy_stitch(logits, classes, counts, confidence):
    """Argmax and softmax of the winner, float32, no array larger than needed."""
    classes[:] = logits.argmax(0)
    top = logits.max(0)
    units = np.rint(65535 / np.exp(logits - top).sum(0))
    counts += np.bincount(classes.ravel(), minlength=len(logits)).astype(np.uint64)
    confidence += np.bincount(classes.ravel(), units.ravel(), len(logits)).astype(np.uint64)


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
    for name in ("stitch with probabilities", "tint"):
        if name in seconds:
            print(f"{name}: {seconds[name] / PIXELS * 1e9:.2f} ns a pixel")


def measure(benchmark, name, function, *arguments):
    result = benchmark(function, *arguments)
    if benchmark.stats is not None:  # --benchmark-disable
        seconds[name] = benchmark.stats.stats.min  # the quietest round: others may share the machine
    return result


def test_copy_of_the_logits(benchmark, tile):
    measure(benchmark, "read", np.copyto, np.empty_like(tile[0]), tile[0])


def test_stitch(benchmark, tile):
    logits, outputs = tile
    measure(benchmark, "stitch", _core.stitch, logits, (0, 0, HEIGHT, WIDTH), *outputs)
    np.testing.assert_array_equal(outputs[0], logits.argmax(0))


def test_stitch_with_probabilities(benchmark, tile):
    logits, outputs = tile
    planes = np.zeros(logits.shape, np.uint8)
    measure(benchmark, "stitch with probabilities", _core.stitch, logits, (0, 0, HEIGHT, WIDTH), *outputs, planes)


def test_numpy(benchmark, tile):
    measure(benchmark, "numpy", numpy_stitch, tile[0], *tile[1])


def test_tint(benchmark, tile):
    rgb = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    measure(benchmark, "tint", _core.tint, rgb, tile[1][0], None, PAPER_PALETTE.array, 100, np.empty_like(rgb))
