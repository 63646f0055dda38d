"""Checkpoint to plan: export, measure stride and halo, measure how far each precision agrees with fp32."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch

from histoseg_fast import __version__
from histoseg_fast.compiling.calibrate import (
    Calibration,
    candidate_ranges,
    choose_ranges,
    fit_temperature,
    load_calibration,
    measure_precisions,
    scale_logits,
    verdict,
)
from histoseg_fast.compiling.export import export_onnx
from histoseg_fast.compiling.foreign import Normalisation, read_onnx
from histoseg_fast.compiling.halo import measure
from histoseg_fast.engines import check_precision
from histoseg_fast.engines.trt.options import EIGHT_BITS
from histoseg_fast.errors import LabelError, PlanError, UsageError
from histoseg_fast.labels import Palette
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.models.architectures import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD
from histoseg_fast.models.base import Network
from histoseg_fast.models.network import make_network
from histoseg_fast.plan import DEFAULT_GATE, MAX_MPP, MAX_TEXT, MIN_MPP, MODEL, Plan, pack, unpack, write_plan
from histoseg_fast.postprocess import NO_STEPS, PostProcessing
from histoseg_fast.training.checkpoint import read_checkpoint

DEFAULT_TILE = 1152
"""Holds a 1128x720 image whole, and keeps 90 % of a tile's pixels at the final network's halo."""


def load_network(checkpoint: str | Path) -> tuple[Network, dict[str, Any]]:
    """The network of a checkpoint, without batch norms, and the checkpoint's description.

    Raises PlanError if they do not fit.
    """
    tensors, description = read_checkpoint(checkpoint)
    _check_description(description, checkpoint)
    batch_norm = any(name.endswith(".running_var") for name in tensors)
    network = make_network(description["arch"], len(description["classes"]), batch_norm=batch_norm)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise PlanError(f"does not hold a network {description['arch']!r} ({reason})", where=checkpoint) from error
    return network.fold(), description


def _check_description(description: dict[str, Any], checkpoint: str | Path) -> None:
    if description["arch"] not in ARCHITECTURES:
        raise PlanError(f"holds an unknown network {str(description['arch'])[:40]!r}", where=checkpoint)
    try:
        Palette(tuple(description["classes"]), tuple(tuple(colour) for colour in description["colours"]))
    except (LabelError, TypeError) as error:
        raise PlanError(f"has no valid classes ({str(error)[:200]})", where=checkpoint) from error
    if description["normalisation"] != {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}:
        raise PlanError("was trained with another normalisation than this version exports", where=checkpoint)


def plan_of_checkpoint(checkpoint: str | Path) -> Plan:
    """The plan of a checkpoint, in memory: stride and halo measured, no precision compared with fp32 yet."""
    network, description = load_network(checkpoint)
    return plan_of_network(network, description, Path(checkpoint))


def plan_of_network(network: Network, description: Mapping[str, Any], where: Path, **more: Any) -> Plan:
    """The plan of a network and its checkpoint's description, in memory; `more` goes into the manifest."""
    return plan_of_model(export_onnx(network), {"name": description["arch"], **description}, where, **more)


def plan_of_model(model: onnx.ModelProto, description: Mapping[str, Any], where: Path, **more: Any) -> Plan:
    """The plan of a network as ONNX, in memory: stride and halo measured. `more` goes into the manifest."""
    receptive = measure(model)
    manifest = {
        "name": description["name"],
        "arch": description["arch"],
        "classes": [
            {"name": name, "colour": colour}
            for name, colour in zip(description["classes"], description["colours"], strict=True)
        ],
        "normalisation": description["normalisation"],
        "stride": receptive.stride,
        "halo": receptive.halo,
        "tile": {"default": max(DEFAULT_TILE, 4 * receptive.halo)},
        "precision": "auto",
        "precisions": {"fp32": {"agreement": 1.0}},
        "training": description["training"],
        "scores": description.get("scores", {}),
        "made_with": {
            "histoseg-fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
        **more,
    }
    return unpack(pack(manifest, {MODEL: model.SerializeToString(deterministic=True)}), where)


@dataclass(frozen=True)
class CompileOptions:
    """What a plan is to be. precision : what it runs in ("auto": the fastest that passes the gate). gate : how far a
    precision may fall behind fp32 (see `plan.DEFAULT_GATE`). postprocess : what `infer` and `eval` do by default.
    tolerance : how far the colours of calibration labels may be from the palette. mpp : micrometres a pixel that the
    network was trained at, None where that is not known.
    """

    precision: str = "auto"
    gate: Mapping[str, float] = field(default_factory=lambda: DEFAULT_GATE)
    postprocess: PostProcessing = NO_STEPS
    tolerance: float = 0.0
    mpp: float | None = None

    def __post_init__(self) -> None:
        if self.mpp is not None and not MIN_MPP <= self.mpp <= MAX_MPP:
            raise UsageError(f"{self.mpp:g} is not {MIN_MPP:g} to {MAX_MPP:g}", where="--mpp")

    def as_manifest(self) -> dict[str, Any]:
        """What of these options a plan's manifest holds."""
        fields = {"precision": self.precision, "gate": dict(self.gate), "postprocess": self.postprocess.as_json()}
        return fields if self.mpp is None else {**fields, "mpp": self.mpp}


def compile_plan(
    checkpoint: str | Path,
    out: str | Path,
    *,
    calibrate: Path | None = None,
    options: CompileOptions = CompileOptions(),
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile `checkpoint` to the plan file `out` and return it.

    With images in the folder `calibrate` the plan can run in int8, and with labels its probabilities are calibrated
    (see `load_calibration` for what the folder may be). Every precision that this CPU runs is compared with fp32 on
    images that set no ranges; the figures go into the manifest, where `auto` reads them.
    Raises PlanError for a checkpoint that is none; ImageError, LabelError and DataError for the calibration folder;
    UsageError for a folder without images, and for int8 and fp8 without a folder.
    """
    check_precision(options.precision)
    if options.precision in EIGHT_BITS and calibrate is None:
        raise UsageError(f"{options.precision} takes its ranges from images", fix="--calibrate DIR")
    network, description = load_network(checkpoint)
    palette = Palette(tuple(description["classes"]), tuple(tuple(colour) for colour in description["colours"]))
    calibration = load_calibration(calibrate, palette, options.tolerance)
    more = options.as_manifest()
    if calibration.labelled:
        plan = plan_of_network(network, description, Path(checkpoint))
        temperature = round(fit_temperature(plan, calibration.measuring), 4)
        scale_logits(network, 1 / temperature)
        more["temperature"] = temperature
        report(f"temperature {temperature:.3f} on {calibration.source}")
    if calibration.ranging:
        candidates = candidate_ranges(network, calibration.ranging)
        plan = plan_of_network(network, description, Path(checkpoint))
        more["int8"] = asdict(choose_ranges(plan, candidates, calibration.ranging, report))
    plan = plan_of_network(network, description, Path(checkpoint), **more)
    return _finish(plan, out, calibration, options, report)


def compile_onnx(
    source: str | Path,
    out: str | Path,
    palette: Palette,
    normalisation: Normalisation,
    *,
    calibrate: Path | None = None,
    options: CompileOptions = CompileOptions(),
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile an ONNX network of the user's own (see `read_onnx`) to the plan file `out` and return it.

    `palette` names its classes in the order of its logits. Halo and stride are found from its graph; a network with an
    operator that looks at the whole image has none, and is refused. It runs in 16 bits or more: ranges are chosen for
    the package's own architectures alone. Raises what `compile_plan` does.
    """
    check_precision(options.precision)
    if options.precision in EIGHT_BITS:
        raise UsageError("an ONNX network runs in 16 bits or more", fix="--precision auto, fp32, bf16 or fp16")
    source = Path(source)
    calibration = load_calibration(calibrate, palette, options.tolerance)
    description = {
        "name": "".join(c for c in source.stem if c.isprintable())[:MAX_TEXT] or "onnx",
        "arch": "onnx",
        "classes": palette.names,
        "colours": palette.colours,
        "normalisation": asdict(normalisation),
        "training": {"source": "an ONNX file"},
    }
    try:
        model = read_onnx(source, len(palette.names), normalisation)
        plan = plan_of_model(
            model,
            description,
            source,
            **options.as_manifest(),
        )
    except PlanError as error:
        raise PlanError(error.what, where=source, fix=error.fix) from None
    return _finish(plan, out, calibration, options, report)


def _finish(
    plan: Plan, out: str | Path, calibration: Calibration, options: CompileOptions, report: Callable[[str], None]
) -> Plan:
    """Measure the precisions, write the plan, and say what came out."""
    report(f"network {plan.manifest['arch']}: stride {plan.stride}, halo {plan.halo}")
    candidates = [p for p in cpu_precisions() if p != "int8" or plan.ranges is not None]
    measured = measure_precisions(plan, candidates, calibration, report)
    plan = write_plan(out, {**plan.manifest, "precisions": measured}, plan.members)
    for precision in candidates[1:]:
        report(verdict(plan, precision))
    report(f"{out}: {Path(out).stat().st_size / 2**20:.1f} MiB, sha256 {plan.sha256[:12]}")
    return plan
