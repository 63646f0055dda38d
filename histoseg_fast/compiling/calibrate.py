"""What compiling learns from images: int8 ranges, the temperature of the probabilities, what each precision loses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from histoseg_fast.data import find_pairs, load_pair
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import DataError, PlanError
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.images import read_image
from histoseg_fast.labels import Palette
from histoseg_fast.models.base import Network
from histoseg_fast.models.network import UInt8Network
from histoseg_fast.pipeline.sources import find_sources
from histoseg_fast.plan import DEFAULT_GATE, Plan, Ranges
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

MAX_SIDE = 1024
"""Calibration images are cut to this many pixels a side: enough pixels to measure, bounded time."""
MAX_IMAGES = 32
"""Of the images that set ranges and of those that measure, so many at most, evenly drawn."""
SYNTHETIC_FIELDS = 2
"""Fields of the demo generator that stand in when no calibration images are given."""
SAMPLES = 20_000
"""Values of a tensor an image that its range is chosen from."""
EXPONENTS = (2.0, 1.5, 1.25, 1.0)
"""A range has the least mean of |rounding error| to one of these. Rare large values count less with a small one."""
LEAST_RANGE = 1e-6
"""Of a tensor that is nothing but zeros."""
FITTED_PIXELS = 100_000
"""Pixels an image that the temperature is fitted to, at most."""
TEMPERATURES = (0.1, 10.0)
"""A network that is always right on the images, or always wrong, would get 0 or infinity."""
BISECTIONS = 20
TIMED_SHAPE = (720, 1128)
TIMED_RUNS = 3

Image = tuple[np.ndarray, np.ndarray | None]
"""RGB uint8 (H, W, 3) and, where known, labels uint8 (H, W)."""


@dataclass(frozen=True)
class Calibration:
    """Images that int8 takes its ranges from, others that everything is measured on, and what to call them."""

    ranging: Sequence[Image]
    measuring: Sequence[Image]
    source: str

    @property
    def labelled(self) -> bool:
        """Whether the measuring images have labels."""
        return all(labels is not None for _, labels in self.measuring)


def load_calibration(folder: Path | None, palette: Palette, tolerance: float = 0.0) -> Calibration:
    """The images of `folder`: a data folder's train split for ranges and val split to measure on, or every other image.

    Without a folder: synthetic fields, which measure agreement but set no ranges.
    Raises DataError where a split is empty or the folder has one image only, UsageError where it has none, ImageError
    and LabelError as reading does.
    """
    if folder is None:
        return Calibration((), [(make_field(seed)[0], None) for seed in range(SYNTHETIC_FIELDS)], "synthetic fields")
    if (folder / "images").is_dir() and (folder / "labels").is_dir():
        splits = {split: [p for p in find_pairs(folder) if p.split == split] for split in ("train", "val")}
        for split, pairs in splits.items():
            if not pairs:
                raise DataError(f"the {split} split is empty", where=folder, fix="name its images in split.csv")
        parts = [[_cut(*load_pair(pair, palette, tolerance)) for pair in _thin(pairs)] for pairs in splits.values()]
        source = f"the val split of {folder.resolve().name}"
    else:
        paths = [source.path for source in find_sources([str(folder)], folder)]
        if len(paths) < 2:
            raise DataError("has one image: some set ranges, others measure", where=folder, fix="give two or more")
        parts = [[_cut(read_image(path), None) for path in _thin(paths[start::2])] for start in (0, 1)]
        source = f"every other image of {folder.resolve().name}"
    return Calibration(parts[0], parts[1], f"{len(parts[1])} image(s), {source}")


def _thin(items: Sequence[Any]) -> list[Any]:
    """At most `MAX_IMAGES` of `items`, evenly drawn."""
    return list(items)[:: -(-len(items) // MAX_IMAGES) or 1]


def _cut(rgb: np.ndarray, labels: np.ndarray | None) -> Image:
    """Copies, so that no large image stays in memory behind its corner."""
    return rgb[:MAX_SIDE, :MAX_SIDE].copy(), None if labels is None else labels[:MAX_SIDE, :MAX_SIDE].copy()


def candidate_ranges(network: Network, images: Iterable[Image]) -> list[Ranges]:
    """Int8 ranges of `network` (without batch norms): one for each of `EXPONENTS`, of least rounding error.

    The first convolution stays in floating point: its input has a sign, and its time is little.
    """
    layers = {n: module for n, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)}
    inner = list(layers)[1:]
    samples: dict[tuple[str, str], list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def keep(key: tuple[str, str], tensor: torch.Tensor) -> None:
        chosen = torch.randint(tensor.numel(), (SAMPLES,), generator=generator)
        samples.setdefault(key, []).append(tensor.reshape(-1)[chosen])

    hooks = []
    for name in inner:
        hooks.append(layers[name].register_forward_pre_hook(lambda _, given, n=name: keep(("inputs", n), given[0])))
        if name in network.joined:
            hooks.append(layers[name].register_forward_hook(lambda _, __, made, n=name: keep(("outputs", n), made)))
    model = UInt8Network(network).eval()
    with torch.inference_mode():
        for rgb, _ in images:
            model(torch.from_numpy(pad_to_stride(rgb, network.stride))[None])
    for hook in hooks:
        hook.remove()
    limits: list[dict[str, dict[str, float]]] = [{"inputs": {}, "outputs": {}} for _ in EXPONENTS]
    for (side, name), values in samples.items():
        found = torch.cat(values)
        if side == "outputs" or found.min() >= 0:  # inputs are rounded from 0 up: what has a sign stays as it is
            for best, limit in zip(limits, _best_limits(found, signed=side == "outputs"), strict=True):
                best[side][name] = limit
    return [Ranges(**best) for best in limits]


def _best_limits(values: torch.Tensor, signed: bool) -> list[float]:
    """For each of `EXPONENTS` the limit of least error."""
    highest = max(float(values.abs().max()), LEAST_RANGE)
    limits = [highest * share for share in np.geomspace(0.05, 1, 61)]
    lowest_level, levels = (-128, 128) if signed else (0, 255)
    errors = []
    for limit in limits:
        step = limit / levels
        rounded = torch.clamp(torch.round(values / step), lowest_level, 127 if signed else 255) * step
        distance = (rounded - values).abs()
        errors.append([float(distance.pow(exponent).mean()) for exponent in EXPONENTS])
    return [float(f"{limits[index]:.6g}") for index in np.argmin(errors, axis=0)]


def choose_ranges(
    plan: Plan, candidates: Sequence[Ranges], images: Sequence[Image], report: Callable[[str], None]
) -> Ranges:
    """Of `candidates` (as `candidate_ranges` gives them) those with which int8 agrees with fp32 on most pixels."""
    with open_engine(plan, device="cpu", precision="fp32") as engine:
        exact = [run_tiled(engine, plan, rgb).argmax(0) for rgb, _ in images]
    agreements = []
    for ranges in candidates:
        rounded = replace(plan, manifest={**plan.manifest, "int8": asdict(ranges)})
        with open_engine(rounded, device="cpu", precision="int8") as engine:
            classes = [run_tiled(engine, plan, rgb).argmax(0) for rgb, _ in images]
        same = sum(int((ids == wanted).sum()) for ids, wanted in zip(classes, exact, strict=True))
        agreements.append(same / sum(ids.size for ids in exact))
    best = int(np.argmax(agreements))
    report(f"int8 ranges of least error^{EXPONENTS[best]:g}: {agreements[best]:.3%} of these images' pixels as fp32")
    return candidates[best]


def fit_temperature(plan: Plan, images: Iterable[Image]) -> float:
    """The T for which softmax(logits / T) has the least cross entropy (Guo et al., ICML 2017) on labelled images.

    Within `TEMPERATURES`. Raises PlanError if the network's logits are not finite.
    """
    logits, labels = [], []
    with open_engine(plan, device="cpu", precision="fp32") as engine:
        for rgb, ids in images:
            assert ids is not None
            known = np.flatnonzero(ids < len(plan.palette.names))
            known = known[:: -(-len(known) // FITTED_PIXELS) or 1]
            logits.append(torch.from_numpy(run_tiled(engine, plan, rgb).reshape(len(plan.palette), -1)[:, known].T))
            labels.append(torch.from_numpy(ids.ravel()[known].astype(np.int64)))
    scores, targets = torch.cat(logits).double(), torch.cat(labels)
    if not scores.isfinite().all():
        raise PlanError("gives logits that are not finite", where=plan.path)
    right = scores.gather(1, targets[:, None])[:, 0]
    low, high = map(math.log, TEMPERATURES)
    for _ in range(BISECTIONS):  # of the slope in 1 / T, which rises: the cross entropy is convex there
        middle = (low + high) / 2
        expected = ((scores / math.exp(middle)).softmax(1) * scores).sum(1)
        low, high = (middle, high) if float((expected - right).mean()) > 0 else (low, middle)
    return math.exp((low + high) / 2)


def scale_logits(network: Network, factor: float) -> None:
    """Multiply the logits of `network` by `factor`, in the weights of its last convolution."""
    *_, last = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.mul_(factor)


def measure_precisions(
    plan: Plan, candidates: Sequence[str], calibration: Calibration, report: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What each of `candidates` (fp32 first) gives on the measuring images, for the manifest; a line each.

    agreement : share of pixels whose class equals fp32's. With labels also mean_iou and cross_entropy. With images of
    the user's own also megapixels_per_second of the engine here.
    """
    measured: dict[str, dict[str, Any]] = {}
    exact: list[np.ndarray] = []
    for precision in candidates:
        scores, same, pixels = Scores(plan.palette), 0, 0
        with open_engine(plan, device="cpu", precision=precision) as engine:
            for i, (logits, labels) in enumerate(_run(engine, plan, calibration.measuring)):
                classes = logits.argmax(0).astype(np.uint8)
                if precision == "fp32":
                    exact.append(classes)
                same, pixels = same + int((classes == exact[i]).sum()), pixels + classes.size
                if labels is not None:
                    scores.add(logits, labels)
            found: dict[str, Any] = {"agreement": round(same / pixels, 6)}
            if calibration.labelled:
                found |= {"mean_iou": round(scores.mean_iou, 6), "cross_entropy": round(scores.cross_entropy, 6)}
            if calibration.ranging:
                found["megapixels_per_second"] = round(_speed(engine, plan), 3)
        measured[precision] = found if precision == "fp32" else found | {"measured_on": calibration.source}
        report(_line(precision, found))
    return measured


def _run(engine: Any, plan: Plan, images: Iterable[Image]) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for rgb, labels in images:
        yield run_tiled(engine, plan, rgb), labels


def _speed(engine: Any, plan: Plan) -> float:
    """Megapixels a second of the engine alone: the best of a few runs after a first."""
    field = np.zeros((*TIMED_SHAPE, 3), np.uint8)
    seconds = []
    for _ in range(1 + TIMED_RUNS):
        started = time.perf_counter()
        run_tiled(engine, plan, field)
        seconds.append(time.perf_counter() - started)
    return field.shape[0] * field.shape[1] / 1e6 / min(seconds[1:])


def verdict(plan: Plan, precision: str) -> str:
    """Whether the figures of `precision` pass the plan's gate, as a line."""
    gate = plan.manifest.get("gate", DEFAULT_GATE)
    asked = f"{gate['agreement']:.1%} agreement, {100 * gate['mean_iou']:g} points of mIoU"
    return f"{precision} {'passes' if plan.passes(precision) else 'fails'} the gate of {asked}"


def _line(precision: str, found: dict[str, Any]) -> str:
    parts = [f"{found['agreement']:.3%} of pixels as fp32"]
    if "mean_iou" in found:
        parts.append(f"mIoU {found['mean_iou']:.4f}, cross entropy {found['cross_entropy']:.4f}")
    if "megapixels_per_second" in found:
        parts.append(f"{found['megapixels_per_second']:.2f} megapixels/s here")
    return f"{precision}: " + "; ".join(parts)
