"""`histoseg-fast infer`: images in, masks out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from histoseg_fast.cli import log
from histoseg_fast.cli.checks import refuse
from histoseg_fast.cli.progress import Display, in_words
from histoseg_fast.errors import UsageError, one_line

if TYPE_CHECKING:
    from histoseg_fast.pipeline.run import InferOptions

NAME = "infer"
TISSUE_THRESHOLD = 0.03
"""That of `pipeline.tissue`, which is imported when it is needed."""


def command(
    inputs: list[str] = typer.Argument(..., metavar="INPUT...", help="Images, folders (recursive), patterns, or URLs."),
    engine: str = typer.Option("fast", help="A plan file, or a shipped plan: fast, or final (the paper's)."),
    out: str = typer.Option("out", help="Folder, or URL, for masks/, summary.csv, manifest.jsonl and run.json."),
    device: str = typer.Option("auto", help="auto, cpu, cuda, cuda:1 or several: cuda:0,1."),
    precision: str = typer.Option("auto", help="auto; on the CPU fp32, bf16 or int8; on GPUs fp16, fp32, int8 or fp8."),
    tile: int = typer.Option(0, min=0, help="Tile size in pixels, halo included (0: what suits)."),
    batch: int = typer.Option(0, min=0, max=1024, help="Tiles in a batch (0: 1 on the CPU, 4 on a GPU)."),
    threads: int = typer.Option(0, min=0, max=1024, help="CPU threads of the engine (0: every core)."),
    overlay: bool = typer.Option(False, "--overlay", help="Also write the image tinted and outlined by class."),
    geojson: bool = typer.Option(False, "--geojson", help="Also write outlines of the classes, for QuPath."),
    min_area: int = typer.Option(
        None, min=0, metavar="PIXELS", help="Of the outlines: leave out pieces and holes of fewer pixels (4)."
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
    mpp: float = typer.Option(None, help="Micrometres a pixel to read at (default: slides at the plan's)."),
    level: int = typer.Option(None, min=0, help="Read this level of slides as it is (0: full detail)."),
    no_tissue_mask: bool = typer.Option(False, "--no-tissue-mask", help="Segment the glass of slides too."),
    tissue_threshold: float = typer.Option(
        TISSUE_THRESHOLD, min=0.001, max=1.0, help="Optical density under which a slide's pixels are glass."
    ),
    watch: bool = typer.Option(False, "--watch", help="Wait for images in the one INPUT, a folder, until interrupted."),
    watch_idle: float = typer.Option(
        None, min=0, metavar="SECONDS", help="End --watch after so long without new images."
    ),
    log_format: str = typer.Option("text", help="Of what is said on stderr: text, or json, an object a line."),
    metrics: Path = typer.Option(None, metavar="FILE.prom", help="Keep figures for Prometheus' node exporter there."),
    shard: str = typer.Option("", metavar="I/N", help="Do only the I-th of N shares of the images (see `merge`)."),
    runner: str = typer.Option("local", help="Where: local, this machine; or ray, all of a Ray cluster."),
) -> int:
    """Segment images: masks, overlays and a summary of areas, streamed through the engine.

    A second run over the same folder skips what is complete and unchanged. Exit codes: 0 all done,
    3 some inputs failed (each named), 130 or 143 interrupted.
    """
    from histoseg_fast.images import OutlineOptions
    from histoseg_fast.images.geojson import MIN_AREA
    from histoseg_fast.pipeline.run import InferOptions
    from histoseg_fast.pipeline.shards import Shard

    if log_format not in log.FORMATS:
        raise UsageError(f"unknown format {log_format!r}", where="--log-format", fix="choose text or json")
    log.use(log_format)
    if not geojson:
        refuse({"--min-area": min_area is not None, "--exact-outlines": exact_outlines}, "--geojson")
    if no_tissue_mask and tissue_threshold != TISSUE_THRESHOLD:
        raise UsageError("--tissue-threshold is of the tissue mask", fix="leave out it or --no-tissue-mask")
    outlines = OutlineOptions(MIN_AREA if min_area is None else min_area, exact_outlines) if geojson else None
    options = InferOptions(
        *(device, precision, tile, batch, threads, overlay, outlines, probabilities, postprocess, mpp, level),
        tissue_mask=not no_tissue_mask,
        tissue_threshold=tissue_threshold,
        watch=watch,
        watch_idle=watch_idle,
        shard=Shard.parse(shard) if shard else None,
        runner=runner,
    )
    return run(inputs, engine, out, options, metrics)


def run(inputs: Sequence[str], engine: str, out: str, options: InferOptions, metrics: Path | None = None) -> int:
    """Segment `inputs` with the plan `engine` into `out`, telling how it goes; the exit code.

    metrics : where to write figures for Prometheus, None for nowhere.
    """
    from histoseg_fast.pipeline.metrics import MetricsFile
    from histoseg_fast.pipeline.run import Progress, infer
    from histoseg_fast.plans import open_plan

    plan, display = open_plan(engine), Display()
    observers: list[Any] = [display]
    if metrics is not None:
        observers.append(MetricsFile(metrics, plan.name, display.report))

    def tell(event: str) -> Callable[..., None]:
        def each(*what: object) -> None:
            for observer in observers:
                getattr(observer, event)(*what)

        return each

    try:
        totals, record = infer(
            plan, inputs, out, options, Progress(tell("start"), tell("image"), tell("poll"), display.report)
        )
    finally:
        for observer in reversed(observers):
            observer.close()
    code = 128 + display.signal if display.signal else 3 if totals.failed else 0
    if display.signal:
        log.write("warning", "notice", "interrupted; run the same command again to go on")
    rates = display.rates(totals.pixels - totals.glass, record["wall_seconds"])
    text = (
        f"{totals.done} done, {totals.failed} failed, {totals.skipped} skipped; "
        f"{in_words(rates)}; {record['plan']} plan on {record['device']}, "
        f"{record['engine']}, {record['precision']}; results in {one_line(out)}"
    )
    if log.as_json():
        figures = {name: value for name, value in record.items() if name not in ("arguments", "versions")}
        log.write("info", "summary", text, **figures, **rates, out=out, exit_code=code)
    else:
        print(text)
    return code
