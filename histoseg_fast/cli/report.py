"""`histoseg-fast report`: one HTML page to look at a run."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

NAME = "report"


def command(
    folder: Path = typer.Argument(..., metavar="OUT", help="The --out folder of a run of infer."),
    out: Path = typer.Option(None, "-o", "--out", metavar="FILE", help="The page to write (default: OUT/report.html)."),
) -> None:
    """Write one self-contained HTML page of a run: gallery, table, histograms, failures, and what ran."""
    from histoseg_fast.errors import one_line
    from histoseg_fast.reporting.page import write_report

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)

    written = write_report(folder, out, progress)
    told = [f"{written.done} done, {written.failed} failed"]
    if written.without_image:
        told.append(f"{written.without_image} without the image (gone, changed or unreadable since the run)")
    if written.without_mask:
        told.append(f"{written.without_mask} without the mask")
    print(f"{'; '.join(told)}; {written.size / 2**20:.1f} MiB in {one_line(str(written.path))}")
