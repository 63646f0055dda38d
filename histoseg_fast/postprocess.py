"""Noise out of class maps, after the network: what the paper's section 6.2 misses in its results.

Three steps, each off unless asked for, applied in this order:

- a dense conditional random field over the scores, which draws borders along those of the image
  (Chen et al., "DeepLab", 2014 to 2017, the paper's reference [11]; Kraehenbuehl and Koltun, NIPS 2011);
- the majority of a window around each pixel;
- removal of islands (connected pixels of one class) that are too small.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from histoseg_fast import _core
from histoseg_fast.errors import PlanError, UsageError

MAX_MIN_ISLAND = 1 << 28
MAX_MAJORITY_RADIUS: int = _core.max_majority_radius
MAX_ITERATIONS: int = _core.max_crf_iterations
MAX_WEIGHT: float = _core.max_crf_weight
MIN_SIGMA: float = _core.min_crf_sigma
MAX_SIGMA: float = _core.max_crf_sigma
MAX_CRF_PIXELS: int = _core.max_crf_pixels
"""The CRF takes no larger image: it needs 95 to 175 bytes a pixel on tissue, 700 on noise."""
MAX_REGION_PIXELS: int = _core.max_region_pixels
"""Majority and islands take no larger image."""

Ids = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CrfOptions:
    """A dense CRF. The defaults lie in the ranges that Chen et al. search; they fix the first three.

    Parameters
    ----------
    iterations : of the mean field, 0 to 100; 0 gives the softmax.
    smooth_weight : what an unlike neighbour costs, 0 to 1000, in units of logits; 0 leaves this kernel out.
    smooth_sigma : standard deviation of "neighbour", 0.5 to 10000 pixels.
    appearance_weight : what unlike classes of near pixels of like colour cost; same range.
    appearance_sigma_xy : standard deviation of "near", 0.5 to 10000 pixels.
    appearance_sigma_rgb : standard deviation of "like colour", 0.5 to 10000 grey levels (of 255) a channel.

    Raises
    ------
    UsageError
        If a value is out of its range.
    """

    iterations: int = 10
    smooth_weight: float = 3.0
    smooth_sigma: float = 3.0
    appearance_weight: float = 5.0
    appearance_sigma_xy: float = 50.0
    appearance_sigma_rgb: float = 5.0

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, MAX_ITERATIONS)
        for name in ("smooth", "appearance"):
            check_number(f"{name}_weight", getattr(self, f"{name}_weight"), 0, MAX_WEIGHT)
        for name in ("smooth_sigma", "appearance_sigma_xy", "appearance_sigma_rgb"):
            check_number(name, getattr(self, name), MIN_SIGMA, MAX_SIGMA)


class PostProcessed(NamedTuple):
    """What is left of an image's scores.

    Attributes
    ----------
    ids : uint8 (height, width), class ids.
    probabilities : float32 (classes, height, width) from the CRF, before majority and islands; None without a CRF.
    """

    ids: Ids
    probabilities: Floats | None


@dataclass(frozen=True)
class PostProcessing:
    """Which steps to take; by default none.

    Parameters
    ----------
    min_island : islands of fewer pixels take the class around them, 0 to 2^28; 0 and 1 change nothing.
    majority_radius : the window is 2 * radius + 1 pixels a side, 0 to 1024; 0 changes nothing.
    crf : None for no CRF.

    Raises
    ------
    UsageError
        If a value is out of its range.
    """

    min_island: int = 0
    majority_radius: int = 0
    crf: CrfOptions | None = None

    def __post_init__(self) -> None:
        check_integer("min_island", self.min_island, MAX_MIN_ISLAND)
        check_integer("majority_radius", self.majority_radius, MAX_MAJORITY_RADIUS)
        if self.crf is not None and not isinstance(self.crf, CrfOptions):
            raise UsageError(f"crf is CrfOptions or None, not {shown(self.crf)}")

    def __str__(self) -> str:
        """The shortest text that `parse` reads as these steps, in the order in which they are taken."""
        parts = [f"{name}={value}" for name in ("majority_radius", "min_island") if (value := getattr(self, name))]
        if self.crf is not None:
            options, defaults = dataclasses.asdict(self.crf), CrfOptions()
            changed = [f"crf.{name}={value!r}" for name, value in options.items() if value != getattr(defaults, name)]
            parts = ["crf", *(text.removesuffix(".0") for text in changed), *parts]
        return ",".join(parts) or "none"

    def within(self, pixels: int) -> PostProcessing:
        """Those of these steps that take an image of so many pixels."""
        if pixels > MAX_REGION_PIXELS:
            return NO_STEPS
        return dataclasses.replace(self, crf=None) if pixels > MAX_CRF_PIXELS else self

    @classmethod
    def parse(cls, text: str) -> PostProcessing:
        """The steps that `text` names, such as ``"min_island=64,majority_radius=2"`` or ``"crf,crf.iterations=5"``.

        An option of the CRF is ``crf.NAME=VALUE``; ``crf`` alone takes the defaults. ``"none"`` is no step at all.

        Raises
        ------
        UsageError
            If an entry is not known, stands twice, or its value is out of range.
        """
        values: dict[str, Any] = {}
        crf: dict[str, Any] | None = None
        entries = [] if text.strip() == "none" else [entry.strip() for entry in text.split(",")]
        for entry in entries:
            name, _, value = entry.partition("=")
            if entries.count(entry) > 1 or name in values or name.removeprefix("crf.") in (crf or {}):
                raise UsageError(f"post-processing names {shown(name)} twice")
            if entry == "crf":
                crf = crf or {}
            elif name in NUMBERS:
                values[name] = parse_number(name, value, NUMBERS[name])
            elif name.startswith("crf.") and name[4:] in CRF_NUMBERS:
                crf = {**(crf or {}), name[4:]: parse_number(name, value, CRF_NUMBERS[name[4:]])}
            else:
                known = [*NUMBERS, "crf", *(f"crf.{name}" for name in CRF_NUMBERS)]
                raise UsageError(f"{shown(entry)} is no post-processing", fix="known are none, " + ", ".join(known))
        return cls(**values, crf=None if crf is None else CrfOptions(**crf))

    def as_json(self) -> dict[str, Any]:
        """These options as JSON values, for a plan's manifest."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: object) -> PostProcessing:
        """The options that `as_json` gave.

        Raises
        ------
        PlanError
            If `values` lacks a field, has another one, or one is out of its range.
        """
        fields = exact_fields("post-processing", values, cls)
        try:
            crf = fields.pop("crf")
            options = None if crf is None else CrfOptions(**exact_fields("crf", crf, CrfOptions))
            return cls(**fields, crf=options)
        except UsageError as error:
            raise PlanError(f"has post-processing whose {error.what}") from None

    def apply(self, rgb: Ids, logits: Floats) -> PostProcessed:
        """Classes from scores, through the steps that are on; without any, the class with the highest score.

        A pixel with a score that is not finite is class 0, as in stitching; a CRF refuses such scores.

        Parameters
        ----------
        rgb : uint8 (height, width, 3), the image; looked at only by the CRF.
        logits : float32 (classes, height, width), rows contiguous.

        Raises
        ------
        UsageError
            If an array has another type or shape, or the image is too large for the CRF.
        """
        scores = logits if self.crf is None else run_crf(self.crf, rgb, logits)
        ids = self.clean(classify(scores), len(logits))
        return PostProcessed(ids, None if self.crf is None else scores)

    def clean(self, ids: Ids, classes: int) -> Ids:
        """The steps after the CRF: majority and islands of uint8 (height, width) ids below `classes`.

        Raises UsageError if `ids` has another type or shape, or holds another id.
        """
        if self.majority_radius > 0:
            ids = checked(_core.majority, ids, self.majority_radius, classes)
        if self.min_island > 1:
            ids, _ = checked(_core.remove_islands, ids, self.min_island)
        return ids


NUMBERS: dict[str, type] = {"min_island": int, "majority_radius": int}
CRF_NUMBERS: dict[str, type] = {
    field.name: int if field.name == "iterations" else float for field in dataclasses.fields(CrfOptions)
}


def run_crf(options: CrfOptions, rgb: Ids, logits: Floats) -> Floats:
    """float32 (classes, height, width) probabilities; see `PostProcessing.apply` for arguments and errors."""
    if logits.ndim == 3 and (pixels := logits.shape[1] * logits.shape[2]) > MAX_CRF_PIXELS:
        raise UsageError(
            f"the image has {pixels} pixels; a dense CRF takes up to {MAX_CRF_PIXELS}",
            fix="leave the CRF out, or cut the image into smaller ones",
        )
    probabilities: Floats = checked(_core.dense_crf, rgb, logits, **dataclasses.asdict(options))
    return probabilities


def classify(scores: Floats) -> Ids:
    """The uint8 (height, width) class with the highest of float32 (classes, height, width) scores, the lower on a tie.

    A pixel with a score that is not finite is class 0. Raises UsageError for other arrays.
    """
    if scores.ndim != 3:
        raise UsageError(f"scores have axes (classes, height, width), not the shape {scores.shape}")
    ids = np.empty(scores.shape[1:], np.uint8)
    counts, confidence = np.zeros((2, len(scores)), np.uint64)
    checked(_core.stitch, scores, (0, 0, *ids.shape), ids, counts, confidence)
    return ids


def checked(call: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """What `call` of the core returns; its ValueError as a UsageError."""
    try:
        return call(*arguments, **options)
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_integer(name: str, value: object, most: int) -> None:
    """Raises UsageError unless `value` is an integer from 0 to `most`."""
    if type(value) is not int or not 0 <= value <= most:
        raise UsageError(f"{name} is {shown(value)}; whole numbers from 0 to {most} are allowed")


def check_number(name: str, value: object, least: float, most: float) -> None:
    """Raises UsageError unless `value` is a number from `least` to `most`."""
    if type(value) not in (int, float) or not least <= value <= most:  # type: ignore[operator]
        raise UsageError(f"{name} is {shown(value)}; numbers from {least:g} to {most:g} are allowed")


def parse_number(name: str, text: str, kind: type[int] | type[float]) -> int | float:
    """`text` as an int or float; UsageError otherwise."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{name}={shown(text)} is no {'whole number' if kind is int else 'number'}")
    return number


def exact_fields(what: str, values: object, kind: type) -> dict[str, Any]:
    """`values` as a dictionary that has exactly the fields of the dataclass `kind`; PlanError otherwise."""
    names = {field.name for field in dataclasses.fields(kind)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise PlanError(f"has no valid {what} in its manifest", fix="its fields are " + ", ".join(sorted(names)))
    return dict(values)


def shown(value: object) -> str:
    """`value` as a short text."""
    return repr(value)[:40]


NO_STEPS = PostProcessing()
