"""Scores of class maps against labels (paper, section 5): pooled over pixels, averaged over images, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from histoseg_fast.evaluation._counts import score_logits
from histoseg_fast.labels import PAPER_PALETTE, Palette

BOOTSTRAPS = 2000
"""Resamplings of the images behind a confidence interval."""
CONFIDENCE = 0.95
CALIBRATION_BINS = 15
"""Of the highest probability, 0 to 1, for the expected calibration error."""


@dataclass
class Scores:
    """Scores of the images added; pixels without a label are not counted.

    confusions : int64 (images, C, C), rows true, columns predicted. sums : float64 (images, 3), each image's summed
    cross entropy (natural logarithm), L1 and L2 (paper, section 4.3). A class that neither labels nor prediction
    hold has IoU and Dice NaN and is left out of their means. reliability : float64 (images, bins, 3), of the pixels
    in each bin of the highest probability their number, their summed highest probability, and how many are right.
    """

    palette: Palette = PAPER_PALETTE
    confusions: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)
    reliability: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        classes = len(self.palette.names)
        self.confusions = np.zeros((0, classes, classes), np.int64)
        self.sums = np.zeros((0, 3))
        self.reliability = np.zeros((0, CALIBRATION_BINS, 3))
        self._colours = self.palette.array / 255.0

    def add(self, logits: np.ndarray, labels: np.ndarray, predicted: np.ndarray | None = None) -> None:
        """Count one image: logits float32 (C, H, W), labels uint8 (H, W), 255 where unlabelled.

        `predicted`, uint8 (H, W) ids, are counted as the classes where they are not the logits' highest.
        """
        confusion = np.zeros(self.confusions.shape[1:], np.int64)
        reliability = np.zeros(self.reliability.shape[1:])
        sums = score_logits(logits, labels, self._colours, confusion, reliability)
        if predicted is not None:
            confusion = _confusion(labels, predicted, len(confusion))
        self.confusions = np.concatenate([self.confusions, confusion[None]])
        self.sums = np.concatenate([self.sums, np.array([sums])])
        self.reliability = np.concatenate([self.reliability, reliability[None]])

    def join(self, gather: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take what `gather` makes of this process's rows: how several processes join what each has counted."""
        self.confusions, self.sums = gather(self.confusions), gather(self.sums)
        self.reliability = gather(self.reliability)

    @property
    def images(self) -> int:
        """How many images were added."""
        return len(self.confusions)

    @property
    def confusion(self) -> np.ndarray:
        """Pooled confusion matrix, int64 (C, C)."""
        pooled: np.ndarray = self.confusions.sum(0)
        return pooled

    @property
    def pixels(self) -> int:
        """How many pixels were counted."""
        return int(self.confusions.sum())

    @property
    def cross_entropy(self) -> float:
        """Mean softmax cross entropy a pixel, in nats (paper, section 4.3)."""
        return float(pooled(self.confusions.sum(0), self.sums.sum(0))["cross_entropy"])

    @property
    def pixel_accuracy(self) -> float:
        """Share of pixels whose class is right."""
        return float(pooled(self.confusion, self.sums.sum(0))["pixel_accuracy"])

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union by class, float64 (C,)."""
        return by_class(self.confusion)["iou"]

    @property
    def dice(self) -> np.ndarray:
        """Dice coefficient (F1) by class, float64 (C,)."""
        return by_class(self.confusion)["dice"]

    @property
    def mean_iou(self) -> float:
        """Mean of `iou` over the classes that occur."""
        return float(pooled(self.confusion, self.sums.sum(0))["mean_iou"])

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the logits' softmax: |confidence - accuracy| by bin, weighted by its pixels.

        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017; NaN without pixels.
        """
        _, confidence, right = self.reliability.sum(0).T
        return float(_ratio(np.abs(confidence - right).sum(), self.reliability[..., 0].sum()))

    @property
    def tumour_stroma_ratio_error(self) -> float:
        """Mean over images of |predicted - true| cancer / (cancer + stroma); NaN without such classes or images."""
        names = self.palette.names
        if not {"cancer", "stroma"} <= set(names):
            return float("nan")
        cancer, stroma = names.index("cancer"), names.index("stroma")
        true, predicted = self.confusions.sum(2), self.confusions.sum(1)
        ratios = [_ratio(n[:, cancer], n[:, cancer] + n[:, stroma]) for n in (true, predicted)]
        return _mean(np.abs(ratios[0] - ratios[1]))

    def as_json(self) -> dict[str, Any]:
        """The scores as plain JSON values; NaN becomes null.

        Pooled over pixels at the top level; `ci95` has the 95 % bootstrap interval of each (images drawn with
        replacement, percentile method; Efron, 1979) and `per_image` the mean over images.
        """
        totals = pooled(self.confusion, self.sums.sum(0))
        classes = by_class(self.confusion)
        each = pooled(self.confusions, self.sums)
        return {
            **{key: _number(value) for key, value in totals.items()},
            **{
                key: {name: _number(v) for name, v in zip(self.palette.names, values, strict=True)}
                for key, values in classes.items()
            },
            "calibration_error": _number(self.calibration_error),
            "tumour_stroma_ratio_error": _number(self.tumour_stroma_ratio_error),
            "ci95": self._intervals(),
            "per_image": {key: _number(_mean(values)) for key, values in each.items()},
            "confusion": self.confusion.tolist(),
            "images": self.images,
            "pixels": self.pixels,
        }

    def _intervals(self) -> dict[str, list[float | None]]:
        if not self.images:
            return {}
        draws = np.random.default_rng(0).multinomial(self.images, np.full(self.images, 1 / self.images), BOOTSTRAPS)
        confusions = np.einsum("bi,icd->bcd", draws, self.confusions)
        tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
        with np.errstate(invalid="ignore"):
            resampled = pooled(confusions, draws @ self.sums)
        known = {key: values[np.isfinite(values)] for key, values in resampled.items()}
        return {key: [_number(v) for v in np.quantile(values, tails)] for key, values in known.items() if values.size}


def _confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """int64 (classes, classes), rows true, columns predicted, of uint8 (H, W) ids; pixels without a label left out."""
    known = labels < classes
    cells = labels[known].astype(np.int64) * classes + predicted[known]
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def pooled(confusion: np.ndarray, sums: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by name from confusion (..., C, C) and summed losses (..., 3); float64 (...), NaN without pixels."""
    pixels = confusion.sum((-2, -1))
    losses = {name: _ratio(sums[..., i], pixels) for i, name in enumerate(("cross_entropy", "l1", "l2"))}
    accuracy = _ratio(np.trace(confusion, axis1=-2, axis2=-1), pixels)
    classes = by_class(confusion)
    means = {f"mean_{name}": _mean_of_classes(classes[name]) for name in ("iou", "dice")}
    return {**losses, "pixel_accuracy": accuracy, **means}


def by_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """IoU, Dice, precision and recall by class from confusion (..., C, C); float64 (..., C), NaN where undefined."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    return {
        "iou": _ratio(hit, true + predicted - hit),
        "dice": _ratio(2 * hit, true + predicted),
        "class_precision": _ratio(hit, predicted),
        "class_recall": _ratio(hit, true),
    }


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)
    return ratio


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _mean_of_classes(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


def _number(value: Any) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
