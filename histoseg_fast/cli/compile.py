"""`histoseg-fast compile`: a checkpoint in, a plan out."""

from __future__ import annotations

from pathlib import Path

import typer

NAME = "compile"


def command(
    checkpoint: Path = typer.Argument(..., metavar="CHECKPOINT", help="best.safetensors of a training."),
    out: Path = typer.Option(..., "-o", "--out", help="The plan file to write."),
    precision: str = typer.Option(
        "auto", help="What the plan runs in: auto (the fastest that agrees with fp32), fp32 or bf16."
    ),
    calibrate: Path = typer.Option(
        None, metavar="DIR", help="Folder of images on which the precisions are compared (default: synthetic fields)."
    ),
) -> None:
    """Compile a checkpoint to a plan: ONNX, stride, halo, and the measured agreement of each precision with fp32."""
    from histoseg_fast.extras import need

    need("train", "torch", "onnx", "onnxscript", "safetensors")
    from histoseg_fast.compiling.compile import compile_plan
    from histoseg_fast.pipeline.sources import find_sources

    images = [source.path for source in find_sources([str(calibrate)], out)] if calibrate else []
    compile_plan(checkpoint, out, precision=precision, calibration=images, report=lambda line: print(line, flush=True))
