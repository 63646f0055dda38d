"""`histoseg-fast export`: a plan's network in the form that another program loads."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from histoseg_fast.cli.building import (
    HARDWARE,
    HARDWARE_HELP,
    VERSION_HELP,
    WORKSPACE_GIB,
    WORKSPACE_HELP,
    BuildDisplay,
    EngineRequest,
)
from histoseg_fast.cli.checks import check_target, refuse

if TYPE_CHECKING:
    from histoseg_fast.engines.trt.options import BuildOptions
    from histoseg_fast.engines.trt.prepare import Prepared
    from histoseg_fast.plan import Plan

NAME = "export"
FORMATS = ("onnx", "triton", "tensorrt")


def command(
    plan: str = typer.Argument(..., metavar="PLAN", help="A plan file, or a shipped plan's name."),
    form: str = typer.Option(..., "--format", help="onnx, triton (a model repository) or tensorrt (a bare engine)."),
    out: Path = typer.Option(..., "-o", "--out", help="The file to write; for triton, the repository's folder."),
    platform: str = typer.Option(
        "onnx", help="What Triton runs: onnx (any machine) or tensorrt (an engine for this GPU)."
    ),
    precision: str = typer.Option("", help="Of an engine: fp16 (the default), fp32, int8 or fp8."),
    batch: int = typer.Option(0, min=0, max=1024, help="Most images or tiles in a batch (0: 4, or fewer large ones)."),
    tile: int = typer.Option(0, min=0, help="Longest side an engine takes, in pixels (0: the plan's tile)."),
    hardware_compatible: str = typer.Option(HARDWARE, help=HARDWARE_HELP),
    version_compatible: bool = typer.Option(False, "--version-compatible", help=VERSION_HELP),
    workspace: float = typer.Option(WORKSPACE_GIB, metavar="GIB", help=WORKSPACE_HELP),
) -> None:
    """Write a plan's network for other programs: the ONNX file, a Triton model repository, a bare TensorRT engine."""
    from histoseg_fast.compiling.triton import PLATFORMS, write_repository
    from histoseg_fast.engines.trt.options import BuildOptions
    from histoseg_fast.errors import UsageError, one_line
    from histoseg_fast.plan import MODEL
    from histoseg_fast.plans import open_plan

    for name, value, known in (("format", form, FORMATS), ("platform", platform, PLATFORMS)):
        if value not in known:
            raise UsageError(f"unknown {name} {value!r}", fix="choose one of " + ", ".join(known))
    engine = form == "tensorrt" or (form, platform) == ("triton", "tensorrt")
    if form != "triton":
        refuse({"--platform": platform != "onnx"}, "--format triton")
    if not engine:
        given = EngineRequest(precision, hardware_compatible, version_compatible, workspace).given()
        refuse({"--precision": bool(precision)} | given, "an engine (--format tensorrt, or --platform tensorrt)")
    opened = open_plan(plan)
    if form != "triton":
        check_target(out, *([] if opened.path is None else [opened.path]))
    options = BuildOptions.of(
        opened,
        tile=tile,
        batch=batch,
        precision=precision or "fp16",
        hardware=hardware_compatible,
        version_compatible=version_compatible,
        workspace_gib=workspace,
    )
    prepared = _prepare(opened, options) if engine else None
    if form == "triton":
        written = write_repository(out, opened, options.batch, (prepared.info, prepared.data) if prepared else None)
    else:
        written = _write(out, prepared.data if prepared else opened.members[MODEL])
    what = f"engine for {prepared.info.built_for}, {prepared.info.precision}" if prepared else "ONNX, fp32"
    print(f"{one_line(str(written))}: {opened.name}, {what}")


def _prepare(plan: Plan, options: BuildOptions) -> Prepared:
    from histoseg_fast.engines.trt.check import synthetic_check
    from histoseg_fast.engines.trt.prepare import prepare

    with BuildDisplay() as display:
        return prepare(
            plan,
            options,
            check=synthetic_check(plan, options),
            report=lambda line: print(line, file=sys.stderr, flush=True),
            progress=display,
        )


def _write(out: Path, data: bytes) -> Path:
    from histoseg_fast.errors import UsageError
    from histoseg_fast.files import atomic_write

    try:
        with atomic_write(out) as stream:
            stream.write(data)
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror or error})", where=out) from error
    return out
