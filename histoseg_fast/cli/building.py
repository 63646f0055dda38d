"""What the commands that build TensorRT engines share: their options' meaning, and the builder's progress."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from histoseg_fast.plan import Plan

REPORT_SECONDS = 10.0
"""Off a terminal, a line of progress at most this often."""

HARDWARE, WORKSPACE_GIB = "none", 4.0
"""Defaults of the options."""

HARDWARE_HELP = (
    "GPUs the engine must run on: none (this one), ampere+ (Ampere and newer), same-cc (compute capability)."
)
VERSION_HELP = "The engine also runs under newer TensorRT versions (larger, and it carries code)."
WORKSPACE_HELP = "Scratch memory that one layer of the engine may use, in GiB."


class BuildDisplay:
    """TensorRT's progress: a bar on a terminal, a line now and then in a log. Its threads call it."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._last = self._started = time.monotonic()

    def __enter__(self) -> BuildDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, phase: str, share: float) -> None:
        """`share` of `phase` is done, 0 to 1."""
        with self._lock:
            if self._terminal:
                self._draw(phase, share)
            elif (now := time.monotonic()) - self._last > REPORT_SECONDS:
                self._last = now
                print(f"TensorRT: {phase}, {share:.0%} after {now - self._started:.0f} s", file=sys.stderr)

    def _draw(self, phase: str, share: float) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bar is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=1.0)
        self._bar.update(self._tasks[phase], completed=share, visible=share < 1.0)


@dataclass(frozen=True)
class EngineRequest:
    """What `compile --tensorrt` was asked for, in the command's own words; `precision` is the plan's."""

    precision: str
    hardware: str
    version_compatible: bool
    workspace_gib: float

    def given(self) -> dict[str, bool]:
        """Which of the engine's own options are not their defaults."""
        return {
            "--hardware-compatible": self.hardware != HARDWARE,
            "--version-compatible": self.version_compatible,
            "--workspace": self.workspace_gib != WORKSPACE_GIB,
        }

    def check(self) -> None:
        """Fail before anything slow is done: unknown options, no TensorRT, no GPU, or one without the precision."""
        from histoseg_fast.engines.trt.gpu import current_gpu
        from histoseg_fast.engines.trt.library import tensorrt
        from histoseg_fast.engines.trt.options import BuildOptions, check_card

        options = BuildOptions(1, 1, 1, **self._options())
        tensorrt()
        check_card(options.precision, current_gpu())

    def add_to(self, plan: Plan, calibrate: Path | None, tolerance: float) -> None:
        """Build the engine, measure it on the images of `calibrate`, write it into the plan's file."""
        from histoseg_fast.compiling.calibrate import load_calibration
        from histoseg_fast.compiling.tensorrt import add_engine
        from histoseg_fast.engines.trt.options import BuildOptions
        from histoseg_fast.errors import EngineError

        options = BuildOptions.of(plan, **self._options())
        calibration = load_calibration(calibrate, plan.palette, tolerance)
        try:
            with BuildDisplay() as display:
                add_engine(plan, options, calibration, report=say, progress=display)
        except EngineError as error:
            done = f"{plan.path} was written without the engine"
            raise EngineError(error.what, where=error.where, fix="; ".join(filter(None, (error.fix, done)))) from error

    def _options(self) -> dict[str, Any]:
        from histoseg_fast.engines.trt.options import PRECISIONS

        return {
            "precision": self.precision if self.precision in PRECISIONS else "fp16",
            "hardware": self.hardware,
            "version_compatible": self.version_compatible,
            "workspace_gib": self.workspace_gib,
        }


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)
