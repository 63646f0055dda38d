"""`histoseg-fast merge`: the outputs of shards as one folder."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from histoseg_fast.errors import one_line

NAME = "merge"


def command(
    folders: list[Path] = typer.Argument(..., metavar="OUT...", help="The --out folders of infer --shard."),
    out: Path = typer.Option(..., "-o", "--out", metavar="ALL", help="Folder for all of them, as of one run."),
) -> int:
    """Join the output folders of shards in one, as if all images had been one run: hard links, or copies.

    Exit codes: 0 all there and done, 3 some inputs failed, or shards are missing (each named).
    """
    from histoseg_fast.pipeline.merge import merge

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)

    merged = merge(folders, out, progress)
    for entry in merged.failed:
        print(f"failed: {one_line(str(entry.get('error')))}", file=sys.stderr)
    for line in merged.gaps:
        print(one_line(line), file=sys.stderr)
    files = merged.files
    print(
        f"{merged.done} done, {len(merged.failed)} failed, of {merged.shards} shard(s); {files['linked']} file(s) "
        f"linked, {files['copied']} copied, {files['kept']} there before; results in {one_line(str(out))}"
    )
    return 3 if merged.failed or merged.gaps else 0
