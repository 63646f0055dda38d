"""The synthetic fields: the same for the same seed, at any size, and like H&E where a network would look."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from histoseg_fast.synthetic import BACKGROUND, CANCER, EOSIN, GLASS_RGB, HAEMATOXYLIN, STROMA, make_field

SEEDS = [0, 1, 2, 7, 42, 2**40]
SHARES = {BACKGROUND: (0.08, 0.35), CANCER: (0.25, 0.50), STROMA: (0.25, 0.50)}


@pytest.fixture(scope="module")
def fields() -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Fields of the default size by seed: image uint8 (720, 1128, 3) and labels uint8 (720, 1128)."""
    return {seed: make_field(seed) for seed in SEEDS}


def dyes(pixels: np.ndarray) -> np.ndarray:
    """Amounts of haematoxylin and eosin, float64 (2, m), that best explain every seventh of the pixels uint8 (n, 3)."""
    density = -np.log(np.maximum(pixels[::7], 1) / GLASS_RGB)
    return np.linalg.lstsq(np.stack([HAEMATOXYLIN, EOSIN], axis=1), density.T, rcond=None)[0]


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 40), (40, 1), (3, 5), (129, 257), (1128, 720)])
def test_shape_and_type_at_any_size(width: int, height: int) -> None:
    image, labels = make_field(3, width, height)
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((height, width), np.uint8)
    assert labels.max() <= STROMA


@pytest.mark.parametrize("seed", range(12))
def test_tiny_fields_never_fail(seed: int) -> None:
    """Few pixels leave some class empty, whichever one it is."""
    for size in (1, 2, 4, 9):
        assert make_field(seed, size, size)[1].shape == (size, size)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_refuses_a_field_without_pixels(width: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"{width}x{height}"):
        make_field(0, width, height)


def test_same_seed_gives_the_same_bytes(fields) -> None:
    image, labels = make_field(7)
    np.testing.assert_array_equal(image, fields[7][0])
    np.testing.assert_array_equal(labels, fields[7][1])


def test_different_seeds_differ(fields) -> None:
    for first, second in itertools.pairwise(SEEDS):
        assert (fields[first][1] != fields[second][1]).mean() > 0.2
        assert (fields[first][0] != fields[second][0]).mean() > 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_every_class_has_a_sensible_share(fields, seed: int) -> None:
    labels = fields[seed][1]
    for class_id, (low, high) in SHARES.items():
        assert low <= (labels == class_id).mean() <= high


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_look_like_their_tissue(fields, seed: int) -> None:
    image, labels = fields[seed]
    cancer, stroma, glass = (image[labels == class_id] for class_id in (CANCER, STROMA, BACKGROUND))
    assert cancer.mean() + 15 < stroma.mean() < glass.mean() - 40
    assert dyes(cancer)[0].mean() > 1.5 * dyes(stroma)[0].mean(), "cancer holds more haematoxylin"
    haematoxylin, eosin = np.median(dyes(stroma), axis=1)
    assert eosin > 2 * haematoxylin, "stroma is mostly eosin"
    assert np.median(glass, axis=0).min() > 220, "glass is near white"


@pytest.mark.parametrize("seed", SEEDS)
def test_tissue_has_texture_and_glass_has_none(fields, seed: int) -> None:
    image, labels = fields[seed]
    red = image[..., 0].astype(float)
    spread = {class_id: red[labels == class_id].std() for class_id in SHARES}
    assert spread[CANCER] > 25
    assert spread[STROMA] > 20
    low, high = np.percentile(red[labels == BACKGROUND], [25, 75])
    assert high - low < 10
