"""The dense CRF against a mean field that compares every pixel with every other one (float64).

The lattice approximates its Gaussians. What is allowed here, for the smoothness and the appearance kernel: filtering a
field that changes slowly is 2 and 5 % of its range off on average, 6 and 15 % at the worst pixel. Class maps agree on
99 % of pixels, probabilities are 0.005 off on average.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoseg_fast import _core

USUAL = {
    "iterations": 5,
    "smooth_weight": 3.0,
    "smooth_sigma": 3.0,
    "appearance_weight": 5.0,
    "appearance_sigma_xy": 10.0,
    "appearance_sigma_rgb": 20.0,
}


def crf(rgb, logits, **changes):
    return _core.dense_crf(rgb, logits, **{**USUAL, **changes})


def softmax(logits):
    powers = np.exp(logits - logits.max(0))
    return powers / powers.sum(0)


def kernel(features):
    """D^-1/2 K D^-1/2 of exp(-|f_i - f_j|^2 / 2), float64 (pixels, pixels)."""
    matrix = np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(-1))
    root = np.sqrt(matrix.sum(1))
    return matrix / root[:, None] / root[None]


def kernels(rgb, options):
    positions = np.stack(np.mgrid[: rgb.shape[0], : rgb.shape[1]], -1).reshape(-1, 2).astype(float)
    smooth = kernel(positions / options["smooth_sigma"])
    colours = rgb.reshape(-1, 3) / options["appearance_sigma_rgb"]
    appearance = kernel(np.concatenate([positions / options["appearance_sigma_xy"], colours], 1))
    return options["smooth_weight"] * smooth + options["appearance_weight"] * appearance


def twin(rgb, logits, **changes):
    options = {**USUAL, **changes}
    unary = logits.reshape(len(logits), -1).astype(float)
    both, beliefs = kernels(rgb, options), softmax(unary)
    for _ in range(options["iterations"]):
        beliefs = softmax(unary + beliefs @ both)
    return beliefs.reshape(logits.shape)


def scene(seed, height=18, width=20, classes=3):
    """A stained-looking image of areas with noise, and logits that mostly follow them."""
    random = np.random.default_rng(seed)
    centres = random.uniform(0, 1, (6, 2)) * (height, width)
    places = np.stack(np.mgrid[:height, :width], -1)
    area = np.linalg.norm(places[:, :, None] - centres, axis=-1).argmin(-1) % classes
    colours = random.integers(40, 216, (classes, 3))
    rgb = np.clip(colours[area] + random.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    logits = 1.5 * (np.arange(classes)[:, None, None] == area) + random.normal(0, 1, (classes, height, width))
    return rgb, logits.astype(np.float32)


def message(rgb, logits, **options):
    """K (q1 - q0) for two classes, read back from one update."""
    p = crf(rgb, logits, iterations=1, **options).astype(float)
    return np.log(p[1] / p[0]) - (logits[1].astype(float) - logits[0])


def smooth_field(seed, side=20):
    """Two-class logits and an image that change slowly."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side
    waves = [random.uniform(-1, 1) * np.sin(3 * (a * x + b * y) + c) for a, b, c in random.uniform(-1, 1, (6, 3)) * 3]
    logits = np.stack([np.zeros((side, side)), sum(waves[:3])]).astype(np.float32)
    rgb = np.stack([128 + 60 * wave for wave in waves[3:]], -1).astype(np.uint8)
    return rgb, logits


@pytest.mark.parametrize(("one", "mean", "worst"), [("smooth", 0.02, 0.06), ("appearance", 0.05, 0.15)])
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_near_exact_gaussians(one, mean, worst, seed):
    rgb, logits = smooth_field(seed)
    weights = {"smooth_weight": float(one == "smooth"), "appearance_weight": float(one == "appearance")}
    got = message(rgb, logits, **weights)
    q = softmax(logits.astype(float)).reshape(2, -1)
    exact = (kernels(rgb, {**USUAL, **weights}) @ (q[1] - q[0])).reshape(got.shape)
    error = np.abs(got - exact) / np.ptp(exact)
    assert error.mean() < mean
    assert error.max() < worst


@pytest.mark.parametrize("strength", [0.25, 1])
def test_class_maps_agree_with_brute_force(strength):
    weights = {"smooth_weight": 3 * strength, "appearance_weight": 5 * strength}
    agreement, differences, flips = [], [], []
    for seed in range(12):
        rgb, logits = scene(seed, height=12 + seed % 9, classes=2 + seed % 5)
        got, exact = crf(rgb, logits, **weights), twin(rgb, logits, **weights)
        agreement.append((got.argmax(0) == exact.argmax(0)).mean())
        differences.append(np.abs(got - exact).mean())
        flips.append((logits.argmax(0) != exact.argmax(0)).mean())
    assert np.mean(agreement) > 0.99
    assert np.mean(differences) < 0.005
    assert np.mean(flips) > 0.15  # there was something to do


def test_a_constant_image_and_constant_logits_stay_constant():
    rgb = np.full((16, 16, 3), 200, np.uint8)
    logits = np.ones((3, 16, 16), np.float32) * np.array([0.2, 1.0, -0.5], np.float32)[:, None, None]
    got, exact = crf(rgb, logits), twin(rgb, logits)
    assert (got.argmax(0) == 1).all()
    np.testing.assert_allclose(got, exact, atol=0.02)


def test_a_class_that_is_certain_stays():
    rgb, logits = scene(3)
    logits[2] = 1e6
    got = crf(rgb, logits)
    np.testing.assert_array_equal(got[2], 1)
    np.testing.assert_array_equal(got[:2], 0)


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 5, 32]), st.sampled_from([0.1, 5, 1e4, 3e38]))
def test_without_weights_it_is_the_softmax(seed, classes, scale):
    random = np.random.default_rng(seed)
    logits = (random.uniform(-1, 1, (classes, 5, 70)) * scale).astype(np.float32)
    rgb = random.integers(0, 256, (5, 70, 3)).astype(np.uint8)
    got = crf(rgb, logits, smooth_weight=0, appearance_weight=0)
    np.testing.assert_allclose(got, softmax(logits.astype(float)), rtol=5e-6, atol=1e-19)
    np.testing.assert_array_equal(got, crf(rgb, logits, iterations=0))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 4, 7]), st.integers(1, 40), st.integers(1, 40))
def test_probabilities_sum_to_one_whatever_the_threads_and_layout(seed, classes, height, width):
    rgb, logits = scene(seed, height, width, classes)
    first = crf(rgb, logits, threads=1)
    assert first.dtype == np.float32 and first.shape == logits.shape
    np.testing.assert_allclose(first.sum(0), 1, atol=1e-5)
    for threads in (0, 2, 5):
        np.testing.assert_array_equal(crf(rgb, logits, threads=threads), first)
    beside = np.ascontiguousarray(logits.swapaxes(0, 1)).swapaxes(0, 1)
    planar = np.ascontiguousarray(rgb.transpose(2, 0, 1)).transpose(1, 2, 0)
    np.testing.assert_array_equal(crf(planar, beside), first)


def test_threads_that_share_a_large_lattice():
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (200, 220, 3)).astype(np.uint8)  # noise: each pixel has vertices of its own
    logits = random.normal(size=(3, 200, 220)).astype(np.float32)
    first = crf(rgb, logits, iterations=2, appearance_sigma_rgb=3.0, threads=1)
    np.testing.assert_array_equal(crf(rgb, logits, iterations=2, appearance_sigma_rgb=3.0, threads=4), first)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_mirrored_input_gives_the_mirrored_output(axis):
    differences, agreement = [], []
    for seed in range(8):
        rgb, logits = scene(seed)
        got = crf(rgb, logits)
        mirrored = crf(np.flip(rgb, axis), np.flip(logits, axis + 1).copy())
        back = np.flip(mirrored, axis + 1)
        differences.append(np.abs(back - got).mean())
        agreement.append((back.argmax(0) == got.argmax(0)).mean())
    assert np.mean(differences) < 0.005
    assert np.mean(agreement) > 0.99


def test_it_removes_noise_inside_an_area_and_keeps_its_edge():
    rgb = np.full((40, 40, 3), (230, 180, 220), np.uint8)
    rgb[:, 20:] = (120, 60, 160)
    logits = np.zeros((2, 40, 40), np.float32)
    logits[0, :, :20] = logits[1, :, 20:] = 1
    noise = np.random.default_rng(0).random((40, 40)) < 0.15
    logits[:, noise] = logits[::-1, noise]
    got = crf(rgb, logits).argmax(0)
    np.testing.assert_array_equal(got, np.repeat([[0, 1]], 20, 1).repeat(40, 0))


def test_noise_under_narrow_kernels_and_extreme_widths():
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (60, 70, 3)).astype(np.uint8)
    logits = random.normal(size=(3, 60, 70)).astype(np.float32)
    for sigma in (0.5, 1e4):
        got = crf(rgb, logits, smooth_sigma=sigma, appearance_sigma_xy=sigma, appearance_sigma_rgb=sigma)
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got.sum(0), 1, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_images(shape):
    got = crf(np.zeros((*shape, 3), np.uint8), np.zeros((3, *shape), np.float32))
    assert got.shape == (3, *shape)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rgb", np.zeros((4, 6, 3), np.uint8)),
        ("rgb", np.zeros((4, 5, 4), np.uint8)),
        ("rgb", np.zeros((4, 5, 3), np.float32)),
        ("logits", np.zeros((3, 4, 5))),
        ("logits", np.zeros((4, 5), np.float32)),
        ("logits", np.zeros((33, 4, 5), np.float32)),
        ("logits", np.full((3, 4, 5), np.nan, np.float32)),
        ("logits", np.full((3, 4, 5), -np.inf, np.float32)),
        ("logits", np.broadcast_to(np.zeros(4096, np.float32), (3, 1025, 4096))),
        ("iterations", -1),
        ("iterations", 101),
        ("smooth_weight", -0.1),
        ("smooth_weight", 1001.0),
        ("smooth_weight", float("nan")),
        ("smooth_sigma", 0.4),
        ("appearance_weight", float("inf")),
        ("appearance_sigma_xy", 0.0),
        ("appearance_sigma_rgb", 1e5),
        ("threads", -1),
        ("threads", 65),
    ],
)
def test_refuses(name, value):
    arguments = {"rgb": np.zeros((4, 5, 3), np.uint8), "logits": np.zeros((3, 4, 5), np.float32), **USUAL}
    with pytest.raises(ValueError, match=name):
        _core.dense_crf(**{**arguments, name: value})
