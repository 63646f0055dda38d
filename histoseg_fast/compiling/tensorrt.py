"""`compile --tensorrt`: a TensorRT engine into a plan, inspected and measured against fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from histoseg_fast.compiling.calibrate import Calibration, verdict
from histoseg_fast.engines import Engine, open_engine, run_tiled
from histoseg_fast.engines.trt import check as checking
from histoseg_fast.engines.trt.build import Progress
from histoseg_fast.engines.trt.member import member_name, with_engine
from histoseg_fast.engines.trt.options import BuildOptions, figures_key
from histoseg_fast.engines.trt.prepare import Prepared, prepare
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.plan import Plan, write_plan


def add_engine(
    plan: Plan,
    options: BuildOptions,
    calibration: Calibration,
    *,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda phase, share: None,
) -> Plan:
    """Build the engine of `plan` (a file) for this GPU, measure it on the calibration images, write it into the file.

    The figures of its precision go into the manifest, and a line says whether they pass the gate. Raises EngineError
    where it cannot be built, its convolutions do not run in that precision or its logits are not finite; the file stays
    as it is then. Raises PlanError where the plan lacks the ranges that the precision needs.
    """
    assert plan.path is not None
    measured: dict[str, Any] = {}

    def check(prepared: Prepared) -> float:
        with checking.open_prepared(plan, prepared) as engine:
            measured.update(_measure(engine, plan, calibration, options.tile))
        return float(measured["agreement"])

    prepared = prepare(plan, options, check=check, report=report, progress=progress)
    if not measured:  # it came from the cache, checked on whatever images the build had
        check(prepared)
    info = prepared.info
    counts = ", ".join(f"{count} in {precision}" for precision, count in info.convolutions.items())
    report(f"engine for {info.built_for}: {info.size / 2**20:.1f} MiB, convolutions: {counts}")
    manifest, members = with_engine(plan, info, prepared.data)
    if options.precision != "fp32":
        figures = {**measured, "measured_on": f"{calibration.source}, TensorRT {info.tensorrt} on {info.gpu.name}"}
        manifest["precisions"] = {**manifest["precisions"], figures_key(options.precision): figures}
        report(f"{options.precision}: {measured['agreement']:.3%} of pixels as fp32 on {calibration.source}")
    written = write_plan(plan.path, manifest, members)
    if options.precision != "fp32":
        report(verdict(written, figures_key(options.precision)))
    report(f"{plan.path}: with {member_name(info)}, sha256 {written.sha256[:12]}")
    return written


def _measure(engine: Engine, plan: Plan, calibration: Calibration, tile: int) -> dict[str, Any]:
    """What the manifest says of a precision: agreement with fp32 and, with labels, mIoU and cross entropy."""
    scores, same, pixels = Scores(plan.palette), 0, 0
    with open_engine(plan, device="cpu", precision="fp32") as exact:
        for rgb, labels in calibration.measuring:
            logits = checking.checked_logits(engine, plan, rgb, tile)
            same += int((logits.argmax(0) == run_tiled(exact, plan, rgb).argmax(0)).sum())
            pixels += logits[0].size
            if labels is not None:
                scores.add(logits, labels)
    found: dict[str, Any] = {"agreement": round(same / pixels, 6)}
    if calibration.labelled:
        found |= {"mean_iou": round(scores.mean_iou, 6), "cross_entropy": round(scores.cross_entropy, 6)}
    return found
