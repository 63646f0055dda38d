"""`histoseg-fast bench`: how fast a plan runs on this machine, and what limits it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from histoseg_fast.cli.checks import check_target
from histoseg_fast.errors import UsageError, one_line

if TYPE_CHECKING:
    from rich.table import Table

NAME = "bench"
WIDTH = 120
"""Columns of the tables where there is no terminal that says."""
GIB = 1 << 30


def command(
    inputs: list[str] = typer.Argument(None, metavar="INPUT", help="Images or folders (default: made-up fields)."),
    engine: str = typer.Option("fast", help="A plan file, or a shipped plan: fast, or final (the paper's)."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1 or several: cuda:0,1."),
    precision: list[str] = typer.Option(["auto"], help="As for infer; give it again for more rows; all: every one."),
    images: int = typer.Option(0, min=0, max=100_000, help="Images a run (0: all of INPUT, or 24 made-up fields)."),
    repeats: int = typer.Option(3, min=1, max=1000, help="Runs of each kind."),
    tile: int = typer.Option(0, min=0, help="Tile size in pixels, halo included (0: the plan's)."),
    batch: int = typer.Option(0, min=0, max=1024, help="Tiles in a batch (0: 1 on the CPU, 4 on a GPU)."),
    threads: int = typer.Option(0, min=0, max=1024, help="CPU threads of the engine (0: every core)."),
    postprocess: str = typer.Option("none", metavar="SPEC", help="As for infer (plan: what the plan records; none)."),
    sweep: bool = typer.Option(False, "--sweep", help="Also run a grid of tile sizes and batches."),
    json_file: Path = typer.Option(None, "--json", metavar="FILE", help="Also write every figure as JSON (-: stdout)."),
    plot: Path = typer.Option(None, metavar="FILE", help="Draw the grid as PNG (implies --sweep)."),
) -> int:
    """Measure a plan: files to files and the engine alone, by precision, with its agreement with fp32.

    Says what limits the run and which option would help. Leaves nothing behind but the files it is told to write.
    """
    from histoseg_fast.benchmarking import BenchOptions, bench
    from histoseg_fast.extras import need
    from histoseg_fast.pipeline.run import InferOptions
    from histoseg_fast.plans import open_plan

    if plot is not None:
        need("bench", "matplotlib")
    for target in (json_file, plot):
        if target is not None and str(target) != "-":
            check_target(target)
    plan = open_plan(engine)
    infer = InferOptions(device, tile=tile, batch=batch, threads=threads, postprocess=postprocess)
    options = BenchOptions(tuple(precision), images, repeats, sweep or plot is not None, infer)
    signals = Signals()
    try:
        with signals.scratch() as scratch:
            found = bench(plan, inputs or [], options, scratch, _progress, signals.poll)
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 128 + signals.received
    if str(json_file) == "-":
        print(json.dumps(found, indent=1))
    else:
        show(found)
        if json_file is not None:
            _write(json_file, found)
    if plot is not None:
        from histoseg_fast.benchmarking.plot import draw_sweep

        with _writable(plot):
            draw_sweep(plot, found)
    return 0


def _progress(line: str) -> None:
    print(one_line(line), file=sys.stderr, flush=True)


class Signals:
    """The first Ctrl-C or SIGTERM, `received`, lets `poll` raise KeyboardInterrupt; a second one ends at once.

    Raised by the handler itself it would strike anywhere, in a destructor too, where it is lost.
    """

    def __init__(self) -> None:
        self.received = 0
        self._folder: str | None = None

    def poll(self) -> None:
        """Raise KeyboardInterrupt once a signal has come."""
        if self.received:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, _frame: object) -> None:
        if self.received:
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(128 + number)
        self.received = number

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder that is removed however the block ends. Raises UsageError if there can be none."""
        with contextlib.ExitStack() as stack:
            for number in (signal.SIGINT, signal.SIGTERM):
                stack.callback(signal.signal, number, signal.signal(number, self._interrupt))
            try:
                self._folder = tempfile.mkdtemp(prefix="histoseg-bench-")
            except OSError as error:
                fix = "set TMPDIR to one that can be written"
                raise UsageError(f"no temporary folder ({error})", fix=fix) from error
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            yield Path(self._folder)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    from histoseg_fast.files import atomic_write

    with _writable(path), atomic_write(path) as stream:
        stream.write(json.dumps(found, indent=1).encode() + b"\n")


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot be written ({error.strerror})", where=path) from error


# -- what is printed -----------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """Print the figures for a person."""
    from rich.console import Console

    from histoseg_fast.postprocess import PostProcessing

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False, soft_wrap=True)
    what = "made-up fields" if found["made_up"] else "images"
    steps = PostProcessing.from_json(found["postprocess"])
    console.print(
        f"{found['plan']} on {found['device']}, {found['engine']}; {found['cpu']}, {found['cores']} cores\n"
        f"{found['images']} {what}, {found['megapixels']:.1f} megapixels; tile {found['tile']}, "
        f"batch {found['batch']}; post-processing {steps}; median of {found['repeats']}"
    )
    console.print(speeds(found["rows"]), stages(found["rows"]), sep="\n", soft_wrap=False)
    if found["sweep"]:
        console.print(grid(found["sweep"]), soft_wrap=False)
    for row in found["rows"]:
        console.print(f"{row['precision']}: limited by {row['limit']}: {row['because']}")
        for line in row["advice"]:
            console.print(f"  would help: {line}")
    for line in found["warnings"]:
        console.print(f"warning: {line}")


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def speeds(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Throughput, latency and agreement, a row for each precision."""
    heads = ("", "images/s", "least, most", "megapixels/s", "engine alone", "of engine", "cold cache")
    table = _table(*heads, "p50 p95 p99, s", "as fp32")
    for row in rows:
        cold, kept = row["cold_images_per_second"], row["agreement_with_fp32"]
        table.add_row(
            row["precision"],
            f"{row['images_per_second']:.2f}",
            ", ".join(f"{value:.2f}" for value in row["images_per_second_range"]),
            f"{row['megapixels_per_second']:.2f}",
            f"{row['engine_images_per_second']:.2f}",
            f"{row['share_of_engine']:.1%}",
            "-" if cold is None else f"{cold:.2f}",
            " ".join(f"{value:.3f}" for value in row["latency_seconds"].values()),
            "-" if kept is None else f"{kept:.3%}",
        )
    return table


def stages(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Milliseconds an image by stage, and what was taken of the machine."""
    table = _table(
        "ms an image", "read", "engine", "stitch", "write", "CPU busy", "GPU busy", "peak RSS", "VRAM", "start, s"
    )
    for row in rows:
        busy, vram = row["gpu_busy_share"], row["peak_vram_bytes"]
        table.add_row(
            row["precision"],
            *(
                f"{1e3 * row['stage_seconds'][stage] / row['images']:.1f}"
                for stage in ("read", "engine", "stitch", "write")
            ),
            f"{row['cpu_busy_share']:.0%}",
            "-" if busy is None else f"{busy:.0%}",
            f"{row['peak_rss_bytes'] / GIB:.2f} GiB",
            "-" if vram is None else f"{vram / GIB:.2f} GiB",
            f"{row['start_seconds']:.2f}",
        )
    return table


def grid(points: Sequence[Mapping[str, Any]]) -> Table:
    """Throughput by tile size and batch."""
    table = _table("tile", "batch", "images/s", "megapixels/s", "engine s a megapixel", "pixels computed", "spread")
    for point in points:
        table.add_row(
            str(point["tile"]),
            str(point["batch"]),
            f"{point['images_per_second']:.2f}",
            f"{point['megapixels_per_second']:.2f}",
            f"{point['engine_seconds_per_megapixel']:.3f}",
            f"{point['computed_over_kept']:.2f}x",
            f"{point['spread']:.0%}",
        )
    return table
