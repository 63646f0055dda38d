"""Scores of class maps against labels, pooled over pixels (paper, section 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from histoseg_fast.evaluation._counts import score_logits


@dataclass
class Scores:
    """Scores pooled over the pixels of every image added; pixels without a label are not counted.

    confusion : int64 (C, C), rows true, columns predicted. cross_entropy_sum : summed -log softmax of the
    true class, natural logarithm. A class that neither labels nor prediction hold has IoU and Dice NaN and
    is left out of their means.
    """

    names: tuple[str, ...]
    confusion: np.ndarray = field(init=False)
    cross_entropy_sum: float = 0.0
    images: int = 0

    def __post_init__(self) -> None:
        self.confusion = np.zeros((len(self.names), len(self.names)), np.int64)

    def add(self, logits: np.ndarray, labels: np.ndarray) -> None:
        """Count one image: logits float32 (C, H, W), labels uint8 (H, W), 255 where unlabelled."""
        self.cross_entropy_sum += score_logits(logits, labels, self.confusion)
        self.images += 1

    def pool(self, add_up: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replace every count by `add_up` of it: how several processes join what each has counted."""
        self.confusion = add_up(self.confusion)
        sums = add_up(np.array([self.cross_entropy_sum, self.images]))
        self.cross_entropy_sum, self.images = float(sums[0]), int(sums[1])

    @property
    def pixels(self) -> int:
        """How many pixels were counted."""
        return int(self.confusion.sum())

    @property
    def cross_entropy(self) -> float:
        """Mean softmax cross entropy a pixel, in nats (paper, section 4.3)."""
        return self.cross_entropy_sum / self.pixels if self.pixels else float("nan")

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels whose class is right."""
        return float(np.trace(self.confusion) / self.pixels) if self.pixels else float("nan")

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union by class, float64 (C,)."""
        hit = np.diag(self.confusion)
        return _ratio(hit, self.confusion.sum(0) + self.confusion.sum(1) - hit)

    @property
    def dice(self) -> np.ndarray:
        """Dice coefficient (F1) by class, float64 (C,)."""
        return _ratio(2 * np.diag(self.confusion), self.confusion.sum(0) + self.confusion.sum(1))

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(np.nanmean(self.iou)) if self.pixels else float("nan")

    def as_json(self) -> dict[str, Any]:
        """The scores as plain JSON values; NaN becomes null."""
        by_class = {
            key: {name: _number(v) for name, v in zip(self.names, values, strict=True)}
            for key, values in (("iou", self.iou), ("dice", self.dice))
        }
        return {
            "cross_entropy": _number(self.cross_entropy),
            "pixel_accuracy": _number(self.pixel_accuracy),
            "mean_iou": _number(self.mean_iou),
            **by_class,
            "confusion": self.confusion.tolist(),
            "images": self.images,
            "pixels": self.pixels,
        }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _number(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
