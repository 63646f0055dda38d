"""`histoseg-fast compile`: a checkpoint in, a plan out."""

from __future__ import annotations

from pathlib import Path

import typer

from histoseg_fast.cli.building import HARDWARE, HARDWARE_HELP, VERSION_HELP, WORKSPACE_GIB, WORKSPACE_HELP
from histoseg_fast.cli.checks import check_target, parse_palette, refuse
from histoseg_fast.errors import UsageError

NAME = "compile"


def command(
    source: Path = typer.Argument(
        ..., metavar="CHECKPOINT", help="best.safetensors of a training; or an .onnx file of your own, with --classes."
    ),
    out: Path = typer.Option(..., "-o", "--out", help="The plan file to write."),
    precision: str = typer.Option(
        "auto",
        help="What the plan runs in: auto (the fastest that passes the gate), fp32, bf16, int8; on GPUs fp16, fp8.",
    ),
    calibrate: Path = typer.Option(
        None, metavar="DIR", help="Images, or a data folder: adds int8, calibrates probabilities, measures precisions."
    ),
    gate_agreement: float = typer.Option(
        0.995, min=0.0, max=1.0, help="Gate: share of pixels whose class must equal fp32's."
    ),
    gate_miou: float = typer.Option(0.2, min=0.0, max=100.0, help="Gate: points of mIoU that may be lost (labels)."),
    tolerance: float = typer.Option(0.0, min=0.0, help="How far label colours may be from the palette (RGB distance)."),
    postprocess: str = typer.Option(
        "none", metavar="SPEC", help='Steps after the network that the plan records, e.g. "min_island=64" or "crf".'
    ),
    classes: str = typer.Option(
        "", metavar="PALETTE", help='Of an .onnx file: "background=0,0,0;tumour=255,0,0;...", in order of its logits.'
    ),
    mean: str = typer.Option("", help="Of an .onnx file of floats: subtracted from RGB in 0..1 (0,0,0)."),
    std: str = typer.Option("", help="Of an .onnx file of floats: what that is divided by (1,1,1)."),
    mpp: float = typer.Option(
        None, help="Micrometres a pixel that the network was trained at: what infer reads slides at."
    ),
    tensorrt: bool = typer.Option(False, "--tensorrt", help="Also build the TensorRT engine for this GPU."),
    hardware_compatible: str = typer.Option(HARDWARE, help=HARDWARE_HELP),
    version_compatible: bool = typer.Option(False, "--version-compatible", help=VERSION_HELP),
    workspace: float = typer.Option(WORKSPACE_GIB, metavar="GIB", help=WORKSPACE_HELP),
) -> None:
    """Compile a checkpoint to a plan: ONNX, stride, halo, int8 ranges, and what each precision was measured to lose."""
    from histoseg_fast.extras import need

    need("train", "torch", "onnx", "onnxscript", "safetensors")
    from histoseg_fast.cli.building import EngineRequest, say
    from histoseg_fast.compiling.compile import CompileOptions, compile_onnx, compile_plan
    from histoseg_fast.compiling.foreign import Normalisation
    from histoseg_fast.postprocess import PostProcessing

    request = EngineRequest(precision, hardware_compatible, version_compatible, workspace)
    if tensorrt:
        request.check()
    else:
        refuse(request.given(), "--tensorrt")
    gate = {"agreement": gate_agreement, "mean_iou": gate_miou / 100}
    options = CompileOptions(precision, gate, PostProcessing.parse(postprocess), tolerance, mpp)
    foreign = source.suffix.lower() == ".onnx"
    if foreign != bool(classes):
        raise UsageError("an .onnx file and --classes need each other", where=source)
    if not foreign:
        refuse({"--mean": bool(mean), "--std": bool(std)}, "an .onnx file")
    check_target(out, source)
    if foreign:
        normalisation = Normalisation(_numbers("--mean", mean or "0,0,0"), _numbers("--std", std or "1,1,1"))
        palette = parse_palette("--classes", classes)
        plan = compile_onnx(source, out, palette, normalisation, calibrate=calibrate, options=options, report=say)
    else:
        plan = compile_plan(source, out, calibrate=calibrate, options=options, report=say)
    if tensorrt:
        request.add_to(plan, calibrate, tolerance)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option}: {text!r} are no numbers", fix="separate them by commas") from None
