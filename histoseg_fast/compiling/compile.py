"""Checkpoint to plan: export, measure stride and halo, measure how far each precision agrees with fp32."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from histoseg_fast import __version__
from histoseg_fast.compiling.export import export_onnx
from histoseg_fast.compiling.halo import measure
from histoseg_fast.engines import AGREEMENT_GATE, check_precision, cpu_precisions, open_engine, run_tiled
from histoseg_fast.errors import LabelError, PlanError
from histoseg_fast.images import read_image
from histoseg_fast.labels import Palette
from histoseg_fast.models.architectures import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD
from histoseg_fast.models.network import SegmentationNetwork
from histoseg_fast.plan import MODEL, Plan, pack, unpack, write_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.training.checkpoint import read_checkpoint

DEFAULT_TILE = 1152
"""Holds a 1128x720 image whole, and keeps 90 % of a tile's pixels at the final network's halo."""
CALIBRATION_SIDE = 1024
"""Calibration images are cut to this many pixels a side: enough pixels to measure, bounded time."""
SYNTHETIC_CALIBRATION = 2
"""Fields of the demo generator that stand in when no calibration images are given."""


def load_network(checkpoint: str | Path) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """The network of a checkpoint and the checkpoint's description. Raises PlanError if they do not fit."""
    tensors, description = read_checkpoint(checkpoint)
    _check_description(description, checkpoint)
    network = SegmentationNetwork(description["arch"], len(description["classes"]))
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanError(f"does not hold a network {description['arch']!r} ({reason})", where=checkpoint) from error
    return network.eval(), description


def _check_description(description: dict[str, Any], checkpoint: str | Path) -> None:
    if description["arch"] not in ARCHITECTURES:
        raise PlanError(f"holds an unknown network {str(description['arch'])[:40]!r}", where=checkpoint)
    try:
        Palette(tuple(description["classes"]), tuple(tuple(colour) for colour in description["colours"]))
    except (LabelError, TypeError) as error:
        raise PlanError(f"has no valid classes ({str(error)[:200]})", where=checkpoint) from error
    if description["normalisation"] != {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}:
        raise PlanError("was trained with another normalisation than this version exports", where=checkpoint)


def plan_of_checkpoint(checkpoint: str | Path, precision: str = "auto") -> Plan:
    """The plan of a checkpoint, in memory: stride and halo measured, no precision compared with fp32 yet."""
    network, description = load_network(checkpoint)
    model = export_onnx(network)
    receptive = measure(model)
    manifest = {
        "name": description["arch"],
        "arch": description["arch"],
        "classes": [
            {"name": name, "colour": colour}
            for name, colour in zip(description["classes"], description["colours"], strict=True)
        ],
        "normalisation": description["normalisation"],
        "stride": receptive.stride,
        "halo": receptive.halo,
        "tile": {"default": max(DEFAULT_TILE, 4 * receptive.halo)},
        "precision": precision,
        "precisions": {"fp32": {"agreement": 1.0}},
        "training": description["training"],
        "scores": description.get("scores", {}),
        "made_with": {
            "histoseg-fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
    }
    return unpack(pack(manifest, {MODEL: model.SerializeToString(deterministic=True)}), Path(checkpoint))


def compile_plan(
    checkpoint: str | Path,
    out: str | Path,
    *,
    precision: str = "auto",
    calibration: Sequence[Path] = (),
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile `checkpoint` to the plan file `out` and return it.

    Every precision that this CPU runs is compared with fp32 on the calibration images (synthetic fields where
    none are given); the shares of agreeing pixels go into the manifest, where `auto` reads them. Another
    `precision` than "auto" is what the plan will run in where the CPU has it.
    Raises PlanError for a checkpoint that is none, ImageError for a calibration image that cannot be read.
    """
    check_precision(precision)
    plan = plan_of_checkpoint(checkpoint, precision)
    report(f"network {plan.manifest['arch']}: stride {plan.stride}, halo {plan.halo}")
    images = [read_image(path)[:CALIBRATION_SIDE, :CALIBRATION_SIDE] for path in calibration]
    source = f"{len(images)} calibration image(s)"
    if not images:
        images = [make_field(seed)[0] for seed in range(SYNTHETIC_CALIBRATION)]
        source = f"{len(images)} synthetic field(s)"
    precisions = dict(plan.manifest["precisions"])
    for candidate in cpu_precisions():
        if candidate != "fp32":
            agreement = measure_agreement(plan, candidate, images)
            precisions[candidate] = {"agreement": round(agreement, 6), "measured_on": source}
            verdict = "passes" if agreement >= AGREEMENT_GATE else "fails"
            report(
                f"{candidate}: {agreement:.3%} of pixels agree with fp32 on {source}; "
                f"{verdict} the gate of {AGREEMENT_GATE:.1%}"
            )
    plan = write_plan(out, {**plan.manifest, "precisions": precisions}, plan.members)
    report(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB, sha256 {plan.sha256[:12]}")
    return plan


def measure_agreement(plan: Plan, precision: str, images: Iterable[np.ndarray]) -> float:
    """Share of pixels of `images` (RGB uint8) whose class in `precision` equals fp32's, on this CPU."""
    same = total = 0
    with open_engine(plan, precision="fp32") as exact, open_engine(plan, precision=precision) as other:
        for image in images:
            a, b = (run_tiled(engine, plan, image).argmax(0) for engine in (exact, other))
            same, total = same + int((a == b).sum()), total + a.size
    return same / total
