"""A benchmark of one plan: a row for each precision and, if wanted, a grid of tile sizes and batches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.benchmarking.files import forget_pages, make_fields
from histoseg_fast.benchmarking.gpus import GpuWatch
from histoseg_fast.benchmarking.runs import EngineAlone, Shape, Stopwatch, StreamRun, Work, batches, run_stream
from histoseg_fast.benchmarking.sweep import sweep
from histoseg_fast.benchmarking.verdict import judge, warn
from histoseg_fast.engines import check_precision, choose_gpu_precision, choose_precision, gpu_precisions
from histoseg_fast.engines.devices import choose_gpus
from histoseg_fast.errors import HistosegError, ImageError
from histoseg_fast.images import read_image
from histoseg_fast.machine import available_cores, cpu_name, cpu_precisions, peak_rss_bytes, reset_peak_rss
from histoseg_fast.pipeline.run import InferOptions, open_stream_engine, versions
from histoseg_fast.pipeline.sources import find_sources
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import check_tile

ALL = "all"
"""In place of a precision: every one that plan and device have."""
MADE_UP_IMAGES = 24
COMPARED_IMAGES = 4
"""How many images' classes are compared with fp32's: the first that are not too large."""
MAX_COMPARED_PIXELS = 1 << 26
PERCENTILES = (50, 95, 99)

Report = Callable[[str], None]


@dataclass(frozen=True)
class BenchOptions:
    """What `bench` can be told. precisions : those of `infer`, or `ALL`. images : how many at most (0: all of the
    inputs, or `MADE_UP_IMAGES`). repeats : measured runs of each kind. sweep : run the grid too. infer : options of
    every run; its precision is not looked at.
    """

    precisions: tuple[str, ...] = ("auto",)
    images: int = 0
    repeats: int = 3
    sweep: bool = False
    infer: InferOptions = field(default_factory=lambda: InferOptions(postprocess="none"))


def bench(
    plan: Plan,
    inputs: Sequence[str],
    options: BenchOptions,
    scratch: Path,
    report: Report = lambda line: None,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure `plan` on the images that `inputs` name (none: made-up fields); every figure, as JSON values.

    `scratch` is an empty folder, which the caller removes. `report` gets a line for a person now and then; what `poll`,
    called several times a second, raises ends the benchmark. The figures of the first precision stand at the top level,
    those of all in "rows". Raises UsageError (no image, bad options), EngineError, HistosegError (an image that cannot
    be read), and ImageError (`scratch` full).
    """
    check_tile(options.infer.tile or plan.tile, plan.halo, plan.stride)
    plan.choose_postprocess(options.infer.postprocess)
    precisions = wanted_precisions(plan, options)
    try:
        if not inputs:
            report(f"making {options.images or MADE_UP_IMAGES} fields of 1128x720")
            make_fields(scratch / "images", options.images or MADE_UP_IMAGES, poll)
        sources = find_sources(inputs or [str(scratch / "images")], scratch / "out")[: options.images or None]
        work = Work(plan, sources, options.infer, scratch, poll)
        rows, masks = [], [scratch / f"masks{i}" for i in range(len(precisions))]
        for precision, folder in zip(precisions, masks, strict=True):
            row, shapes = _measure(_in(work, precision), options.repeats, folder, report)
            rows.append(row)
        _compare(work, shapes, rows, masks, report)
        grid = sweep(_in(work, precisions[0]), shapes, rows[0], options.repeats, report) if options.sweep else []
    except OSError as error:
        if isinstance(error, HistosegError):
            raise
        fix = "free space, or set TMPDIR to a folder with room"
        raise ImageError(f"cannot be written: {error.strerror or error}", where=scratch, fix=fix) from error
    for row in rows:
        row |= judge(row, rows, grid, plan, options.infer)
    return {
        **rows[0],
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        "cpu": cpu_name(),
        "cores": available_cores(),
        "made_up": not inputs,
        "inputs": list(inputs),
        "repeats": options.repeats,
        "postprocess": work.steps.as_json(),
        "warnings": warn(rows),
        "rows": rows,
        "sweep": grid,
    }


def wanted_precisions(plan: Plan, options: BenchOptions) -> list[str]:
    """`options.precisions` with `ALL` spelt out, what "auto" means first. Raises UsageError, EngineError."""
    found: dict[str, None] = {}
    for name in options.precisions:
        if name != ALL:
            check_precision(name)
            found[name] = None
            continue
        indices, library = choose_gpus(options.infer.device, lambda line: None)
        if indices:
            first, here = choose_gpu_precision(plan, "auto", indices, library), gpu_precisions(plan, indices, library)
        else:
            first = choose_precision(plan, "auto")
            here = tuple(p for p in cpu_precisions()[::-1] if p != "int8" or plan.ranges is not None)
        found |= dict.fromkeys([first, *here])
    return list(found)


def _in(work: Work, precision: str) -> Work:
    return replace(work, options=replace(work.options, precision=precision))


def _measure(work: Work, repeats: int, masks: Path, report: Report) -> tuple[dict[str, Any], list[Shape]]:
    """A row, and the sizes of the images.

    Each repeat runs the engine alone, then files to files warm and cold, so that a slow drift meets all of them.
    """
    reset_peak_rss()
    with Stopwatch() as opening:
        engine = open_stream_engine(work.plan, len(work.sources), work.options, report)
    with engine, closing(GpuWatch(engine.device)) as gpus:
        report(f"{engine.precision} on {engine.device}: warming up")
        paths = [source.path for source in work.sources]
        can_forget = forget_pages(paths)
        _, shapes = run_stream(work, engine, keep=masks)
        batch = work.options.batch or engine.batch
        alone_seconds, warm, cold = [], [], []
        with EngineAlone(engine, batches(work, engine.device, shapes, batch), work.outputs.wants, work.poll) as alone:
            for repeat in range(repeats):
                report(f"{engine.precision} on {engine.device}: repeat {repeat + 1} of {repeats}")
                alone_seconds.append(alone.run())
                warm.append(run_stream(work, engine)[0])
                if can_forget:
                    dropped = forget_pages(paths)
                    run, _ = run_stream(work, engine)  # in any case: it leaves the files warm
                    cold += [run] if dropped else []
        middle = sorted(warm, key=lambda run: run.watch.wall)[repeats // 2]
        ended = middle.watch.started + middle.watch.wall
        row = {
            "precision": engine.precision,
            "device": engine.device,
            "engine": engine.name,
            "versions": versions(engine),
            "tile": work.tile(engine.device, shapes),
            "batch": batch,
            "start_seconds": opening.wall,
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_vram_bytes": gpus.peak_bytes(opening.started),
            "gpu_busy_share": gpus.busy_share(middle.watch.started, ended),
        }
    return row | _figures(shapes, alone_seconds, warm, cold, middle), shapes


def _figures(
    shapes: Sequence[Shape],
    alone_seconds: Sequence[float],
    warm: Sequence[StreamRun],
    cold: Sequence[StreamRun],
    middle: StreamRun,
) -> dict[str, Any]:
    """What follows from the runs alone; whatever is of one run is of the one in the `middle`."""
    images, megapixels = len(shapes), middle.pixels / 1e6
    watch, latencies = middle.watch, np.concatenate([run.latencies for run in warm])
    walls = [run.watch.wall for run in warm]
    shares = [alone / wall for alone, wall in zip(alone_seconds, walls, strict=True)]
    alone = sorted(alone_seconds)[len(alone_seconds) // 2]
    return {
        "images": images,
        "megapixels": megapixels,
        "wall_seconds": watch.wall,
        "images_per_second": images / watch.wall,
        "images_per_second_range": [images / max(walls), images / min(walls)],
        "megapixels_per_second": megapixels / watch.wall,
        "engine_images_per_second": images / alone,
        "engine_images_per_second_range": [images / max(alone_seconds), images / min(alone_seconds)],
        "engine_megapixels_per_second": megapixels / alone,
        "share_of_engine": statistics.median(shares),
        "cold_images_per_second": images / statistics.median(r.watch.wall for r in cold) if cold else None,
        "spread": (max(walls) - min(walls)) / watch.wall,
        "engine_spread": (max(alone_seconds) - min(alone_seconds)) / alone,
        "latency_seconds": {f"p{p}": float(np.percentile(latencies, p)) for p in PERCENTILES},
        "stage_seconds": dict(middle.stage_seconds),
        "workers": middle.workers,
        "cpu_busy_share": watch.cpu / watch.wall / available_cores(),
        "other_processors": watch.others,
    }


def _compare(
    work: Work, shapes: Sequence[Shape], rows: Sequence[dict[str, Any]], masks: Sequence[Path], report: Report
) -> None:
    """Add to each row the share of pixels whose class in its `masks` is that of fp32 on the CPU."""
    sized = zip(work.sources, shapes, strict=True)
    small = [source for source, (h, w) in sized if h * w <= MAX_COMPARED_PIXELS][:COMPARED_IMAGES]
    ran = [(row["device"], row["precision"]) for row in rows]
    exact = masks[ran.index(("cpu", "fp32"))] if ("cpu", "fp32") in ran else work.scratch / "exact"
    if small and not exact.exists():
        report(f"fp32 on {len(small)} image(s), to compare with")
        plain = replace(_in(work, "fp32"), sources=small)
        plain = replace(plain, options=replace(plain.options, device="cpu"))
        with open_stream_engine(plain.plan, len(small), plain.options, report) as engine:
            run_stream(plain, engine, keep=exact)
    paths = [work.outputs.paths(source.stem, slide=False)["mask"] for source in small]
    for row, folder in zip(rows, masks, strict=True):
        same = [(read_image(folder / path) == read_image(exact / path)).all(-1) for path in paths]
        pixels = sum(each.size for each in same)
        row["agreement_with_fp32"] = sum(np.count_nonzero(each) for each in same) / pixels if pixels else None
        row["compared_images"] = len(same)
