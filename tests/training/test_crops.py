"""The crop dataset: how many, which, and how much of the data stays in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import easy_pair, write_folder

from histoseg_fast.data import Pair, find_pairs
from histoseg_fast.training import crops
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.crops import MIRRORS, CropDataset

SIZES = [(33, 20), (16, 16), (5, 7), (40, 64), (1, 1)]
NOISY = Augmentation(noise=5, turns=True, scale=0.2, stain=0.1, colour=0.1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Pairs of the SIZES, in their order."""
    rng = np.random.default_rng(1)
    root: Path = tmp_path_factory.mktemp("crops")
    return find_pairs(write_folder(root, {f"{i}": easy_pair(rng, *size) for i, size in enumerate(SIZES)}))


@pytest.mark.parametrize("crop", [16, 24, 64])
def test_an_epoch_covers_every_image_three_times(pairs: list[Pair], crop: int) -> None:
    data = CropDataset(pairs, crop, Augmentation(), seed=0)
    draws = [max(1, round(height * width / crop**2)) for height, width in SIZES]
    assert len(data) == 3 * sum(draws)
    names = [data.name(item) for item in range(len(data))]
    assert [names.count(pair.name) for pair in pairs] == [3 * n for n in draws]


def test_items_are_three_mirrorings_of_the_same_image(pairs: list[Pair]) -> None:
    data = CropDataset(pairs[1:2], 16, Augmentation(), seed=0)  # 16x16: the crop is the whole image
    assert len(data) == MIRRORS
    rgb, ids = data.load(0)
    for item, flipped in enumerate((ids, ids[::-1], ids[:, ::-1])):
        np.testing.assert_array_equal(data[item][1].numpy(), flipped)
    np.testing.assert_array_equal(data[2][0].numpy(), rgb[:, ::-1])


def test_types(pairs: list[Pair]) -> None:
    rgb, ids = CropDataset(pairs, 24, NOISY, seed=0)[0]
    assert rgb.dtype == torch.uint8 and rgb.shape == (24, 24, 3)
    assert ids.dtype == torch.int64 and ids.shape == (24, 24)
    assert set(ids.unique().tolist()) <= {0, 1, 2}


def same(a: CropDataset, b: CropDataset) -> list[bool]:
    return [all(torch.equal(x, y) for x, y in zip(a[i], b[i], strict=True)) for i in range(len(a))]


def test_seed_epoch_and_item_decide_the_crop(pairs: list[Pair]) -> None:
    first, again, other = (CropDataset(pairs, 16, NOISY, seed=seed) for seed in (7, 7, 8))
    assert all(same(first, again)) and not any(same(first, other))
    again.epoch = 3
    assert not any(same(first, again))
    first.epoch = 3
    items = list(range(len(first)))
    backwards = {i: first[i] for i in reversed(items)}  # no state is carried from item to item
    assert all(torch.equal(backwards[i][0], again[i][0]) for i in items)


def test_the_cache_is_bounded_and_changes_nothing(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    free = CropDataset(pairs, 16, NOISY, seed=0)
    loads: list[str] = []

    def counted(pair: Pair, *options: Any) -> tuple[np.ndarray, np.ndarray]:
        loads.append(pair.name)
        return load_pair(pair, *options)

    load_pair = crops.load_pair
    monkeypatch.setattr(crops, "load_pair", counted)
    limit = 4 * (33 * 20 + 16 * 16)  # three channels and the label: the first two, and what fits beside them
    monkeypatch.setattr(crops, "CACHE_BYTES", limit)
    tight = CropDataset(pairs, 16, NOISY, seed=0)
    assert loads == [pair.name for pair in pairs]
    assert all(same(free, tight))
    kept = sum(rgb.nbytes + ids.nbytes for rgb, ids in tight._cache.values())
    assert kept == tight._cached_bytes == limit
    assert set(loads[len(pairs) :]) == {"2.png", "3.png", "4.png"}  # only what is not kept is decoded again


def test_memory_of_the_cache_is_never_handed_out(pairs: list[Pair]) -> None:
    """A whole-image crop without augmentation would be the cached array itself."""
    data = CropDataset(pairs[1:2], 16, Augmentation(), seed=0)
    before = data.load(0)[0].copy()
    data[0][0].zero_()
    np.testing.assert_array_equal(data.load(0)[0], before)
