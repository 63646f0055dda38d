"""`histoseg-fast infer`: images in, masks out."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from histoseg_fast.errors import one_line

if TYPE_CHECKING:
    from histoseg_fast.engines import Engine
    from histoseg_fast.pipeline.stream import Stream

NAME = "infer"
REPORT_SECONDS = 10.0
"""Off a terminal, a line of progress at most this often."""


def command(
    inputs: list[str] = typer.Argument(..., metavar="INPUT...", help="Images, folders (recursive) or glob patterns."),
    engine: str = typer.Option("fast", help="A plan file, or a shipped plan: fast, or final (the paper's)."),
    out: Path = typer.Option(Path("out"), help="Folder for masks/, summary.csv, manifest.jsonl and run.json."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1 or several: cuda:0,1."),
    precision: str = typer.Option("auto", help="auto; on the CPU fp32, bf16 or int8; on GPUs fp16 or fp32."),
    tile: int = typer.Option(0, min=0, help="Tile size in pixels, halo included (0: the plan's)."),
    batch: int = typer.Option(0, min=0, max=1024, help="Tiles in a batch (0: 1 on the CPU, 4 on a GPU)."),
    threads: int = typer.Option(0, min=0, max=1024, help="CPU threads of the engine (0: every core)."),
    overlay: bool = typer.Option(False, "--overlay", help="Also write the image tinted and outlined by class."),
    geojson: bool = typer.Option(False, "--geojson", help="Also write outlines of the classes, for QuPath."),
    min_area: int = typer.Option(
        4, min=0, metavar="PIXELS", help="Of the outlines: leave out pieces and holes of fewer pixels."
    ),
    exact_outlines: bool = typer.Option(
        False, "--exact-outlines", help="Outlines along pixel edges, not simplified by up to half a pixel."
    ),
    probabilities: bool = typer.Option(False, "--probabilities", help="Also write class probabilities (8-bit TIFF)."),
    postprocess: str = typer.Option(
        "plan",
        metavar="SPEC",
        help='Steps after the network, e.g. "min_island=64" or "crf" (plan: what the plan records; none).',
    ),
) -> int:
    """Segment images: masks, overlays and a summary of areas, streamed through the engine.

    A second run over the same folder skips what is complete and unchanged. Exit codes: 0 all done,
    3 some inputs failed (each named), 130 or 143 interrupted.
    """
    from histoseg_fast.images import OutlineOptions
    from histoseg_fast.pipeline.run import InferOptions, Progress, infer
    from histoseg_fast.plans import open_plan

    outlines = OutlineOptions(min_area, exact_outlines) if geojson else None
    options = InferOptions(device, precision, tile, batch, threads, overlay, outlines, probabilities, postprocess)
    display = Display()
    try:
        totals, record = infer(
            open_plan(engine),
            inputs,
            out,
            options,
            Progress(display.start, display.image, display.poll, display.report),
        )
    finally:
        display.close()
    print(
        f"{totals.done} done, {totals.failed} failed, {totals.skipped} skipped; "
        f"{display.rate(totals.pixels, record['wall_seconds'])}; {record['plan']} plan on {record['device']}, "
        f"{record['engine']}, {record['precision']}; results in {one_line(str(out))}"
    )
    if display.signal:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 128 + display.signal
    return 3 if totals.failed else 0


class Display:
    """Progress for a person (a bar on a terminal) or a log (a line now and then), and what signals do.

    The first Ctrl-C or SIGTERM lets the stream finish what is in flight; a second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.signal, self._told = 0, False
        self._total = 0
        self._bar: Any = None
        self._stream: Any = None
        self._terminal = sys.stderr.isatty()
        self._last = self._started = time.perf_counter()
        self._handlers: dict[int, Any] = {}

    def start(self, engine: Engine, images: int, stream: Stream) -> None:
        self._stream, self._total = stream, images
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        ran = f"{engine.name}, {engine.precision}; post-processing {stream.outputs.postprocess}"
        print(f"{images} image(s) on {engine.device}: {ran}", file=sys.stderr)
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=images, rate="")
            self._bar.start()

    def image(self, entry: dict[str, Any]) -> None:
        if entry["status"] == "failed":
            self._print(f"failed: {one_line(entry['error'])}")
        for warning in entry.get("warnings", ()):
            self._print(f"{one_line(entry['input'])}: {warning}")

    def report(self, line: str) -> None:
        self._print(one_line(line))

    def poll(self) -> None:
        if self.signal and not self._told:
            self._told = True
            self._print(f"{signal.Signals(self.signal).name}: finishing what is in flight")
        totals, now = self._stream.totals, time.perf_counter()
        over = totals.done + totals.failed + totals.skipped
        if self._bar is not None:
            self._bar.update(self._task, completed=over, rate=self.rate(totals.segmented, now - self._started))
        elif now - self._last > REPORT_SECONDS:
            self._last = now
            self._print(f"{over} of {self._total}; {self.rate(totals.segmented, now - self._started)}")

    def rate(self, pixels: int, seconds: float) -> str:
        """Throughput so far, in words."""
        return f"{self._stream.totals.done / seconds:.2f} images/s, {pixels / 1e6 / seconds:.2f} megapixels/s"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, _frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)  # whatever is half written bears a temporary name, and the next run removes it
        self.signal = number
        self._stream.stop()  # `poll` says so: a handler that prints may meet the print it interrupted

    def _print(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(f"{line}\n")  # in one piece: several threads tell what they finished
