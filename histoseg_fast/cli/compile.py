"""`histoseg-fast compile`: a checkpoint in, a plan out."""

from __future__ import annotations

from pathlib import Path

import typer

from histoseg_fast.cli.building import HARDWARE_HELP, VERSION_HELP, WORKSPACE_HELP

NAME = "compile"


def command(
    checkpoint: Path = typer.Argument(..., metavar="CHECKPOINT", help="best.safetensors of a training."),
    out: Path = typer.Option(..., "-o", "--out", help="The plan file to write."),
    precision: str = typer.Option(
        "auto",
        help="What the plan runs in: auto (the fastest that passes the gate), fp32, bf16, int8, or fp16 on a GPU.",
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
    mpp: float = typer.Option(
        None, help="Micrometres a pixel that the network was trained at: what infer reads slides at."
    ),
    tensorrt: bool = typer.Option(False, "--tensorrt", help="Also build the TensorRT engine for this GPU (fp16)."),
    hardware_compatible: str = typer.Option("none", help=HARDWARE_HELP),
    version_compatible: bool = typer.Option(False, "--version-compatible", help=VERSION_HELP),
    workspace: float = typer.Option(4.0, metavar="GIB", help=WORKSPACE_HELP),
) -> None:
    """Compile a checkpoint to a plan: ONNX, stride, halo, int8 ranges, and what each precision was measured to lose."""
    from histoseg_fast.extras import need

    need("train", "torch", "onnx", "onnxscript", "safetensors")
    from histoseg_fast.cli.building import EngineRequest, say
    from histoseg_fast.compiling.compile import CompileOptions, compile_plan
    from histoseg_fast.postprocess import PostProcessing

    request = EngineRequest(precision, hardware_compatible, version_compatible, workspace)
    if tensorrt:
        request.check()
    gate = {"agreement": gate_agreement, "mean_iou": gate_miou / 100}
    options = CompileOptions(precision, gate, PostProcessing.parse(postprocess), tolerance, mpp)
    plan = compile_plan(checkpoint, out, calibrate=calibrate, options=options, report=say)
    if tensorrt:
        request.add_to(plan, calibrate, tolerance)
