"""Data folders for tests: DATA/images, DATA/labels and, if wanted, DATA/split.csv."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from histoseg_fast.images import write_png
from histoseg_fast.labels import encode

TINTS = np.array([[240, 240, 240], [120, 60, 160], [230, 150, 190]], np.float64)
"""What background, cancer and stroma look like in `easy_pair`: a network tells them apart by colour alone."""


def easy_pair(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB uint8 (H, W, 3) and ids uint8 (H, W): blocks of 8 pixels of one class, tinted by class, a little noise."""
    blocks = rng.integers(3, size=(-(-height // 8), -(-width // 8)), dtype=np.uint8)
    ids = blocks.repeat(8, 0).repeat(8, 1)[:height, :width]
    rgb = TINTS[ids] + rng.normal(0, 4, (height, width, 3))
    return np.clip(rgb, 0, 255).astype(np.uint8), np.ascontiguousarray(ids)


def write_folder(
    root: Path, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], splits: Mapping[str, str] | None = None
) -> Path:
    """Write `pairs` (stem: (rgb, ids)) as PNG below `root`, and split.csv if there are `splits`; return `root`."""
    for folder in ("images", "labels"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (rgb, ids) in pairs.items():
        write_png(root / "images" / f"{name}.png", rgb)
        write_png(root / "labels" / f"{name}.png", encode(ids))
    if splits is not None:
        rows = [f"{name}.png,{split}" for name, split in splits.items()]
        (root / "split.csv").write_text("\n".join(["name,split", *rows]) + "\n")
    return root


def easy_folder(root: Path, train: int = 2, val: int = 1, side: int = 32, seed: int = 0) -> Path:
    """A folder of `easy_pair`s: train0.png, ... and val0.png, ... with their split.csv."""
    rng = np.random.default_rng(seed)
    splits = {f"train{i}": "train" for i in range(train)} | {f"val{i}": "val" for i in range(val)}
    return write_folder(root, {name: easy_pair(rng, side, side) for name in splits}, splits)
