"""Post-processing of one noisy 1128x720 image against SciPy and, where installed, scikit-image and pydensecrf.

pytest benchmarks/bench_postprocess.py; prints the ratios at the end (run with -s) and asserts nothing about time.
"""

from __future__ import annotations

import numpy as np
import pytest

from histoseg_fast import _core
from histoseg_fast.postprocess import CrfOptions, PostProcessing, classify
from histoseg_fast.synthetic import make_field

CLASSES = 3
AREA = 100
RADIUS = 5
ITERATIONS = 10
seconds: dict[str, float] = {}


@pytest.fixture(scope="module")
def image():
    """An image, logits that are right on most of it, and their classes."""
    rgb, labels = make_field(0)
    random = np.random.default_rng(0)
    coarse = random.normal(size=(CLASSES, -(-labels.shape[0] // 8), -(-labels.shape[1] // 8)))
    noise = np.kron(coarse, np.ones((8, 8)))[:, : labels.shape[0], : labels.shape[1]]
    fine = random.normal(size=noise.shape) * 0.3
    logits = (1.5 * (np.arange(CLASSES)[:, None, None] == labels) + noise + fine).astype(np.float32)
    return rgb, logits, classify(logits)


@pytest.fixture(scope="module", autouse=True)
def summary():
    yield
    print("\n")
    for name in sorted(seconds):
        topic = name.partition(",")[0]
        ours = seconds.get(f"{topic}, ours")
        ratio = f"  {seconds[name] / ours:6.1f} times ours" if ours and not name.endswith("ours") else ""
        print(f"{name:42} {seconds[name] * 1e3:9.2f} ms{ratio}")


def measure(benchmark, name, function, *arguments, rounds=5):
    result = benchmark.pedantic(function, arguments, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is not None:  # --benchmark-disable
        seconds[name] = benchmark.stats.stats.min  # the quietest round: others may share the machine
    return result


def scipy_islands(ids):
    """Small components of each class take the class of the nearest pixel that is in none: simpler than ours."""
    ndimage = pytest.importorskip("scipy.ndimage")
    small = np.zeros(ids.shape, bool)
    for c in range(CLASSES):
        components, _ = ndimage.label(ids == c)
        small |= (np.bincount(components.ravel()) < AREA)[components] & (components > 0)
    y, x = ndimage.distance_transform_edt(small, return_distances=False, return_indices=True)
    return ids[y, x]


def scipy_majority(ids):
    """Running means of each class; ties go to the lowest class."""
    ndimage = pytest.importorskip("scipy.ndimage")
    masks = [(ids == c).astype(np.float32) for c in range(CLASSES)]
    return np.argmax([ndimage.uniform_filter(mask, 2 * RADIUS + 1, mode="constant") for mask in masks], 0)


def scipy_gaussians(logits):
    """What the smoothness kernel alone costs as separable Gaussians: no appearance kernel, no softmax."""
    ndimage = pytest.importorskip("scipy.ndimage")
    for _ in range(ITERATIONS):
        for plane in logits:
            ndimage.gaussian_filter(plane, 3)


def pydensecrf(rgb, logits):
    dcrf = pytest.importorskip("pydensecrf.densecrf")
    crf = dcrf.DenseCRF2D(rgb.shape[1], rgb.shape[0], CLASSES)
    crf.setUnaryEnergy(np.ascontiguousarray(-logits.reshape(CLASSES, -1)))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=50, srgb=5, rgbim=rgb, compat=5)
    return np.array(crf.inference(ITERATIONS)).reshape(logits.shape)


def test_islands(benchmark, image):
    measure(benchmark, "islands, ours", _core.remove_islands, image[2], AREA)


def test_islands_of_a_clean_map(benchmark, image):
    clean = _core.majority(image[2], RADIUS, CLASSES)
    measure(benchmark, "islands of a clean map, ours", _core.remove_islands, clean, AREA)


def test_islands_scipy(benchmark, image):
    measure(benchmark, "islands, scipy", scipy_islands, image[2])


@pytest.mark.parametrize("radius", [1, RADIUS, 50])
def test_majority(benchmark, image, radius):
    name = "majority, ours" if radius == RADIUS else f"majority of radius {radius}, ours"
    measure(benchmark, name, _core.majority, image[2], radius, CLASSES)


def test_majority_scipy(benchmark, image):
    theirs = measure(benchmark, "majority, scipy", scipy_majority, image[2])
    assert (theirs == _core.majority(image[2], RADIUS, CLASSES)).mean() > 0.95  # they differ on ties


def test_majority_skimage(benchmark, image):
    rank = pytest.importorskip("skimage.filters.rank")
    window = np.ones((2 * RADIUS + 1, 2 * RADIUS + 1), np.uint8)
    measure(benchmark, "majority, scikit-image", rank.majority, image[2], window)


@pytest.mark.parametrize("threads", [1, 2])
def test_crf(benchmark, image, threads):
    name = "crf, ours" if threads == 1 else f"crf on {threads} threads, ours"
    rgb, logits, _ = image
    measure(benchmark, name, lambda: _core.dense_crf(rgb, logits, ITERATIONS, 3, 3, 5, 50, 5, threads), rounds=3)


def test_crf_smoothness_only(benchmark, image):
    rgb, logits, _ = image
    run = PostProcessing(crf=CrfOptions(iterations=ITERATIONS, appearance_weight=0)).apply
    measure(benchmark, "crf smoothness only, ours", run, rgb, logits, rounds=3)


def test_crf_smoothness_only_scipy(benchmark, image):
    measure(benchmark, "crf smoothness only, scipy gaussians", scipy_gaussians, image[1], rounds=3)


def test_crf_pydensecrf(benchmark, image):
    measure(benchmark, "crf, pydensecrf", pydensecrf, *image[:2], rounds=3)
