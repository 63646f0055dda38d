"""Augmentation: labels follow the image exactly, colours change within what was asked, the rng decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from histoseg_fast.training.augment import Augmentation, jitter_colour, jitter_stain, random_crop, resize

QUICK = settings(max_examples=40, deadline=None)
CODES = np.array([[10, 200, 90], [220, 30, 40], [60, 110, 250]], np.uint8)
"""The colour that stands for each class in `coded`."""


def coded(height: int, width: int, seed: int = 0, block: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """An image whose colour says its label: random classes in blocks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(3, size=(-(-height // block), -(-width // block)), dtype=np.uint8)
    ids = np.ascontiguousarray(blocks.repeat(block, 0).repeat(block, 1)[:height, :width])
    return CODES[ids], ids


def inner(ids: np.ndarray, margin: int) -> np.ndarray:
    """Bool: pixels whose whole neighbourhood of `margin` pixels has their class (the frame's pixels have none)."""
    same = np.zeros(ids.shape, bool)
    size = 2 * margin + 1
    windows = np.lib.stride_tricks.sliding_window_view(ids, (size, size))
    same[margin:-margin, margin:-margin] = windows.min((2, 3)) == windows.max((2, 3))
    return same


@QUICK
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    crop=st.integers(1, 48),
    mirror=st.integers(0, 2),
    turns=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_pixel_keeps_its_label(height: int, width: int, crop: int, mirror: int, turns: bool, seed: int) -> None:
    rgb, ids = coded(height, width, seed)
    out, out_ids = Augmentation(turns=turns)(rgb, ids, mirror, crop, np.random.default_rng(seed))
    assert out.shape == (crop, crop, 3) and out_ids.shape == (crop, crop)
    assert out.dtype == out_ids.dtype == np.uint8
    assert out.flags.c_contiguous and out_ids.flags.c_contiguous
    np.testing.assert_array_equal(out, CODES[out_ids])
    np.testing.assert_array_equal(rgb, CODES[ids])  # the source, which is cached, is untouched


@QUICK
@given(
    height=st.integers(1, 80),
    width=st.integers(1, 80),
    crop=st.integers(4, 48),
    mirror=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_all_augmentations_together_keep_shape_and_type(
    height: int, width: int, crop: int, mirror: int, seed: int
) -> None:
    everything = Augmentation(noise=10, turns=True, scale=1.5, stain=0.5, colour=0.3)
    rgb, ids = coded(height, width, seed)
    out, out_ids = everything(rgb, ids, mirror, crop, np.random.default_rng(seed))
    assert out.shape == (crop, crop, 3) and out_ids.shape == (crop, crop)
    assert out.dtype == out_ids.dtype == np.uint8
    assert out.flags.c_contiguous and out_ids.flags.c_contiguous
    assert out_ids.max() <= 2


@pytest.mark.parametrize("mirror", [0, 1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_scaled_crops_stay_aligned(mirror: int, seed: int) -> None:
    rgb, ids = coded(120, 110, seed, block=16)
    augmentation = Augmentation(turns=True, scale=1.0)
    out, out_ids = augmentation(rgb, ids, mirror, 48, np.random.default_rng(seed))
    sure = inner(out_ids, 3)  # bilinear mixes colours at class borders, where nearest has to choose
    assert sure.sum() > 200
    np.testing.assert_array_equal(out[sure], CODES[out_ids[sure]])


@pytest.mark.parametrize(("side", "target"), [(64, 32), (32, 64), (48, 37), (37, 48), (40, 40)])
def test_resize_keeps_image_and_labels_at_the_same_place(side: int, target: int) -> None:
    ids = np.zeros((side, side), np.uint8)
    ids[side // 4 : side // 2, side // 8 : side * 5 // 8] = 1  # no symmetry hides a shift
    rgb = np.repeat(ids[..., None] * np.uint8(200), 3, 2)
    out, out_ids = resize(rgb, ids, target, target)
    rows, columns = np.nonzero(out_ids)
    weights = out[..., 0].astype(float)
    centre = [(weights.sum(1 - axis) @ np.arange(target)) / weights.sum() for axis in (0, 1)]
    assert abs(rows.mean() - centre[0]) < 0.5 and abs(columns.mean() - centre[1]) < 0.5
    assert out_ids.mean() == pytest.approx(ids.mean(), rel=0.1)


@pytest.mark.parametrize(("scale", "low", "high"), [(1.0, 20, 80), (0.25, 32, 50)])
def test_scale_stays_within_what_was_asked(scale: float, low: int, high: int) -> None:
    """A ramp of one grey level a pixel: the range of greys in a crop is the side that it was taken from."""
    rgb = np.repeat(np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))[..., None], 3, 2)
    ids = np.zeros((200, 200), np.uint8)
    sides = []
    for seed in range(60):
        out, _ = Augmentation(scale=scale)(rgb, ids, 0, 40, np.random.default_rng(seed))
        sides.append(int(out.max()) - int(out.min()))
    assert low - 3 <= min(sides) < 40 / (1 + 0.6 * scale) and 40 * (1 + 0.6 * scale) < max(sides) <= high + 1


def test_mirroring_is_identity_up_down_and_left_right() -> None:
    rgb, ids = coded(24, 24)
    for mirror, expected in ((0, (rgb, ids)), (1, (rgb[::-1], ids[::-1])), (2, (rgb[:, ::-1], ids[:, ::-1]))):
        out, out_ids = Augmentation()(rgb, ids, mirror, 24, np.random.default_rng(0))
        np.testing.assert_array_equal(out, expected[0])
        np.testing.assert_array_equal(out_ids, expected[1])


def test_turns_are_the_four_quarters() -> None:
    rgb, ids = coded(16, 16)
    seen = set()
    for seed in range(40):
        out, out_ids = Augmentation(turns=True)(rgb, ids, 0, 16, np.random.default_rng(seed))
        quarter = next(k for k in range(4) if np.array_equal(np.rot90(ids, k), out_ids))
        np.testing.assert_array_equal(out, np.rot90(rgb, quarter))
        seen.add(quarter)
    assert seen == {0, 1, 2, 3}


def test_crops_reach_every_corner() -> None:
    rgb, ids = coded(5, 6)
    rgb = np.arange(30, dtype=np.uint8).reshape(5, 6)[..., None].repeat(3, 2)
    corners = {int(random_crop(rgb, ids, 4, np.random.default_rng(seed))[0][0, 0, 0]) for seed in range(80)}
    assert corners == {0, 1, 2, 6, 7, 8}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 30), (3, 20), (7, 7), (40, 2)])
def test_small_images_are_reflected(height: int, width: int) -> None:
    rgb, ids = coded(height, width)
    side = 20
    out, out_ids = random_crop(rgb, ids, side, np.random.default_rng(1))
    rows, columns = (np.pad(np.arange(n), (0, max(0, side - n)), mode="reflect") for n in (height, width))
    whole = ids[rows][:, columns]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (side, side)).reshape(-1, side, side)
    assert any(np.array_equal(out_ids, window) for window in windows)
    np.testing.assert_array_equal(out, CODES[out_ids])


def stained(haematoxylin: float, eosin: float) -> np.ndarray:
    """A patch of one colour, uint8 (8, 8, 3), by Beer-Lambert with the published vectors."""
    density = haematoxylin * np.array([0.65, 0.70, 0.29]) + eosin * np.array([0.07, 0.99, 0.11])
    return np.broadcast_to(np.round(256 * np.exp(-density) - 1).clip(0, 255).astype(np.uint8), (8, 8, 3))


@pytest.mark.parametrize("seed", range(10))
def test_stain_jitter_leaves_glass_white(seed: int) -> None:
    white = np.full((8, 8, 3), 255, np.uint8)
    assert jitter_stain(white, 0.5, np.random.default_rng(seed)).min() >= 254
    glass = np.full((8, 8, 3), 245, np.uint8)
    assert jitter_stain(glass, 0.3, np.random.default_rng(seed)).min() >= 235


def test_stain_jitter_without_strength_changes_nothing() -> None:
    rgb = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    out = jitter_stain(rgb, 0.0, np.random.default_rng(0))
    assert np.abs(out.astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("seed", range(10))
def test_stain_jitter_scales_the_stains_by_what_was_asked(seed: int) -> None:
    strength = 0.2
    for patch in (stained(0.8, 0.1), stained(0.1, 0.6), stained(0.5, 0.5)):
        out = jitter_stain(patch, strength, np.random.default_rng(seed))
        assert out.dtype == np.uint8 and out.shape == patch.shape
        before, after = (-np.log((image[0, 0].astype(float) + 1) / 256).sum() for image in (patch, out))
        # Gain, and a shift of a fifth of the strength in each of three stains of at most unit weight.
        assert abs(after - before) <= strength * before + 3 * 0.2 * strength * 2 + 0.05


def test_stain_jitter_varies_and_the_rng_decides() -> None:
    patch = stained(0.6, 0.3)
    outs = [jitter_stain(patch, 0.3, np.random.default_rng(seed)) for seed in range(6)]
    assert len({out.tobytes() for out in outs}) == 6
    np.testing.assert_array_equal(outs[3], jitter_stain(patch, 0.3, np.random.default_rng(3)))
    assert (outs[0] == outs[0][0, 0]).all()  # one gain for the whole crop


def test_noise_statistics() -> None:
    grey = np.full((128, 128, 3), 128, np.uint8)
    spreads = []
    for seed in range(40):
        noise = jitter_colour(grey, 0.0, 20.0, np.random.default_rng(seed)).astype(float) - 128
        assert abs(noise.mean()) < 0.5
        spreads.append(noise.std())
    assert max(spreads) < 20.5 and min(spreads) < 5 and max(spreads) > 15
    assert np.mean(spreads) == pytest.approx(10, abs=2.5)  # uniform between none and what was asked


def test_noise_is_independent_between_pixels_and_channels() -> None:
    noise = jitter_colour(np.full((128, 128, 3), 128, np.uint8), 0.0, 30.0, np.random.default_rng(0)).astype(float)
    assert np.abs(np.corrcoef(noise.reshape(-1, 3).T) - np.eye(3)).max() < 0.05
    assert abs(np.corrcoef(noise[:, 1:, 0].ravel(), noise[:, :-1, 0].ravel())[0, 1]) < 0.05


def test_colour_jitter_is_bounded_affine_by_channel() -> None:
    ramp = np.arange(100, 156, dtype=np.uint8)[None, :, None].repeat(3, 2)
    for seed in range(20):
        out = jitter_colour(ramp, 0.2, 0.0, np.random.default_rng(seed))[0].astype(float)
        for channel in out.T:
            slope, at_mean = np.polyfit(np.arange(100, 156) - 127.5, channel, 1)
            assert 0.79 <= slope <= 1.21
            assert abs(at_mean - 127.5) <= 255 * 0.5 * 0.2 * 1.3 + 1


def test_the_rng_decides_everything() -> None:
    everything = Augmentation(noise=10, turns=True, scale=0.5, stain=0.3, colour=0.2)
    rgb, ids = coded(60, 50)
    first, again, other = (everything(rgb, ids, 1, 32, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
