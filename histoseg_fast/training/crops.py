"""The crops that training draws from image / label pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from histoseg_fast.data import Pair, load_pair
from histoseg_fast.labels import PAPER_PALETTE, Palette
from histoseg_fast.training.augment import Augmentation, resize

MIRRORS = 3
"""Every image counts three times: as it is, mirrored about x, mirrored about y (paper, section 3.2)."""
CACHE_BYTES = 2 << 30
"""Decoded pairs are kept in memory up to this many bytes; beyond it they are decoded again when drawn."""


class CropDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random square crops, augmented: item i of epoch e is the same on every run with the same seed.

    An epoch draws from every image, in each of its three mirrorings, as many crops as cover its area once.
    Items are RGB uint8 (crop, crop, 3) and class ids int64 (crop, crop), 255 where there is no label.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        crop: int,
        augmentation: Augmentation,
        seed: int,
        palette: Palette = PAPER_PALETTE,
        tolerance: float = 0.0,
    ):
        self.pairs, self.crop, self.augmentation, self.seed = list(pairs), crop, augmentation, seed
        self.palette, self.tolerance, self.epoch = palette, tolerance, 0
        self._cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached_bytes = 0
        self._items = []
        for index in range(len(self.pairs)):
            rgb, _ = self.load(index)
            draws = max(1, round(rgb.shape[0] * rgb.shape[1] / crop**2))
            self._items += [(index, mirror) for mirror in range(MIRRORS) for _ in range(draws)]

    def __len__(self) -> int:
        return len(self._items)

    def name(self, item: int) -> str:
        """The file name of the image that item comes from."""
        return self.pairs[self._items[item][0]].name

    def load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The decoded pair `index` at its scale, from memory where it is kept."""
        if index not in self._cache:
            pair = load_pair(self.pairs[index], self.palette, self.tolerance)
            if (scale := self.pairs[index].scale) != 1:
                pair = resize(*pair, *(max(1, round(side * scale)) for side in pair[1].shape))
            size = pair[0].nbytes + pair[1].nbytes
            if self._cached_bytes + size > CACHE_BYTES:
                return pair
            self._cache[index] = pair
            self._cached_bytes += size
        return self._cache[index]

    def __getitem__(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        index, mirror = self._items[item]
        rng = np.random.default_rng((self.seed, self.epoch, item))
        rgb, ids = self.load(index)
        rgb, ids = self.augmentation(rgb, ids, mirror, self.crop, rng)
        # Copies: a crop that is the whole image may be the cached array itself.
        return torch.tensor(rgb), torch.from_numpy(ids.astype(np.int64))
