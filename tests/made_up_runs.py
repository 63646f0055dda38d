"""Output folders as `infer` leaves them, made up in a moment: for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from running import picture

from histoseg_fast.files import sha256_of
from histoseg_fast.images import MaskWriter, write_png
from histoseg_fast.labels import PAPER_PALETTE, Palette

KEY = "settings one"


def made_up_ids(seed: int, height: int, width: int, classes: int = 3) -> np.ndarray:
    """Class ids in patches, uint8 (height, width)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes, (height // 7 + 1, width // 7 + 1), np.uint8)
    return np.ascontiguousarray(coarse.repeat(7, 0).repeat(7, 1)[:height, :width])


class MadeUpRun:
    """A run into `root`/out over images in `root`/in; every method adds to it."""

    def __init__(self, root: Path, palette: Palette = PAPER_PALETTE):
        self.images, self.out, self.palette = root / "in", root / "out", palette
        self.out.mkdir(parents=True)
        (self.out / "manifest.jsonl").touch()

    def done(
        self,
        name: str,
        changes: dict[str, Any] | None = None,
        *,
        seed: int = 0,
        height: int = 30,
        width: int = 40,
        stem: str = "",
    ) -> None:
        """An image and its mask; `stem` where the name makes no file name, `changes` to its manifest line."""
        file = self.images / f"{stem or name}.png"
        write_png(file, picture(seed, height, width))
        ids = made_up_ids(seed, height, width, len(self.palette))
        mask = f"masks/{stem or name}.png"
        writer = MaskWriter(self.out / mask, width, height, self.palette.array)
        writer.write_rows(ids)
        counts = {n: int(np.count_nonzero(ids == i)) for i, n in enumerate(self.palette.names)}
        self.line(
            {
                "input": name,
                "path": str(file),
                "sha256": digest(file),
                "key": KEY,
                "warnings": [],
                "mask": mask,
                "mask_sha256": writer.finish(),
                "width": width,
                "height": height,
                "pixels": counts,
                "mean_confidence": round(0.5 + seed % 50 / 100, 6),
                "status": "done",
                "error": None,
                "seconds": {"read": 0.5, "engine": 1.0},
            }
            | (changes or {})
        )

    def failed(self, name: str, error: str) -> None:
        """An image that could not be opened."""
        self.line({"input": name, "path": str(self.images / "x"), "status": "failed", "error": error})

    def line(self, entry: dict[str, Any]) -> None:
        """Any manifest line."""
        with open(self.out / "manifest.jsonl", "a") as stream:
            stream.write(json.dumps(entry) + "\n")

    def end(self, **changes: Any) -> None:
        """run.json."""
        record = {
            "arguments": {"inputs": ["in"], "out": "out", "overlay": False},
            "versions": {"histoseg-fast": "0.1.0", "engine": "made up 1"},
            "plan": "fast",
            "plan_sha256": "0" * 64,
            "key": KEY,
            "device": "cpu",
            "engine": "made up 1",
            "precision": "int8",
            "postprocess": {"min_island": 32, "majority_radius": 0, "crf": None},
            "images_done": 1,
            "interrupted": False,
            "wall_seconds": 12.5,
            "peak_rss_bytes": 300 << 20,
        }
        (self.out / "run.json").write_text(json.dumps(record | changes))


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as stream:
        return sha256_of(stream)
