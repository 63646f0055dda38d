"""One whole `infer`: plan and inputs in; masks, summary, manifest and run.json out."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from histoseg_fast import __version__
from histoseg_fast.engines import Engine, open_engine
from histoseg_fast.errors import HistosegError, UsageError
from histoseg_fast.images import OutlineOptions, Resolution
from histoseg_fast.machine import available_cores, peak_rss_bytes
from histoseg_fast.pipeline.outputs import Ledger, Outputs
from histoseg_fast.pipeline.records import (
    MANIFEST,
    Manifest,
    lock_folder,
    run_key,
    write_run,
    write_summary,
    writing,
)
from histoseg_fast.pipeline.remote import Remote, Staging
from histoseg_fast.pipeline.shards import Shard, Share, take_share
from histoseg_fast.pipeline.sources import Source, find_sources, is_url, presentable
from histoseg_fast.pipeline.stream import Stream
from histoseg_fast.pipeline.tissue import DEFAULT_THRESHOLD, MAX_THRESHOLD, MIN_THRESHOLD
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.pipeline.watch import Watcher
from histoseg_fast.plan import Plan
from histoseg_fast.postprocess import check_integer, check_number
from histoseg_fast.tiling import Tiling, check_tile, large_tile

if TYPE_CHECKING:
    from histoseg_fast.pipeline.cluster import Cluster
    from histoseg_fast.pipeline.fleet import FleetStream

OutputsT = TypeVar("OutputsT", bound=Outputs)

CPU_STREAMS = 2
"""Batches that the CPU's cores work on side by side where there are several images: less waiting for one another."""
MOST = 1024
"""Largest batch and number of threads."""
RUNNERS = ("local", "ray")
MAX_READERS = 4
MAX_GPU_READERS = 16
"""A GPU takes images faster than a few threads decode them, and leaves the CPU to them."""


@dataclass(frozen=True)
class InferOptions:
    """What `infer` can be told. tile: pixels a side, halo included (0: what suits). batch: tiles in a batch (0: what
    suits the device). threads: CPU threads (0: all). geojson: how to outline the classes, None for no outlines.
    postprocess: as `Plan.choose_postprocess` reads it. mpp, level: the resolution to read at (see `Resolution`;
    neither: slides at the plan's). tissue_mask: whether glass on slides is skipped; tissue_threshold: as `find_tissue`
    reads it. shard: the part of the images to do (None: all); it decides nothing about an image's outputs.
    watch: whether to wait for images in the one input, a folder, until stopped, or until none came or changed for
    `watch_idle` seconds. runner: one of `RUNNERS`, where the stream runs; on Ray, threads are those of an actor.
    """

    device: str = "auto"
    precision: str = "auto"
    tile: int = 0
    batch: int = 0
    threads: int = 0
    overlay: bool = False
    geojson: OutlineOptions | None = None
    probabilities: bool = False
    postprocess: str = "plan"
    mpp: float | None = None
    level: int | None = None
    tissue_mask: bool = True
    tissue_threshold: float = DEFAULT_THRESHOLD
    shard: Shard | None = None
    watch: bool = False
    watch_idle: float | None = None
    runner: str = "local"

    def __post_init__(self) -> None:
        """Raises UsageError for numbers out of range; `tile` is checked with the plan."""
        for name in ("batch", "threads"):
            check_integer(name, getattr(self, name), MOST)
        check_number("tissue_threshold", self.tissue_threshold, MIN_THRESHOLD, MAX_THRESHOLD)
        if self.watch_idle is not None and not self.watch:
            raise UsageError("is of no use without --watch", where="--watch-idle", fix="give both")
        if self.shard is not None and self.watch:
            raise UsageError("the images to come cannot be dealt out", where="--shard", fix="leave --watch out")
        if self.runner not in RUNNERS:
            raise UsageError(f"unknown runner {self.runner!r}", where="--runner", fix="choose local or ray")
        if self.runner == "ray" and self.watch:
            raise UsageError("the images to come cannot be dealt out", where="--runner ray", fix="leave --watch out")
        if self.runner == "ray" and self.shard is not None:
            raise UsageError("Ray deals the images out itself", where="--shard", fix="leave it out")
        if self.runner == "ray" and ":" in self.device:
            raise UsageError("Ray gives each actor its GPU", where=f"--device {self.device}", fix="use --device cuda")

    def resolution(self, plan: Plan) -> Resolution:
        """The grid that images are read on. Raises UsageError where `mpp` and `level` do not go."""
        return Resolution(self.level, self.mpp, plan.mpp)


@dataclass(frozen=True)
class Progress:
    """What `infer` calls while it runs: `start` once (images: None where they are still to come), `image` as each is
    over, `poll` ten times a second, `report` with a line for a person, from any thread, before `start` too; `failure`
    before `image`, with one that failed, and why.
    """

    start: Callable[[Engine, int | None, Stream], None] = lambda engine, images, stream: None
    image: Callable[[dict[str, Any]], None] = lambda entry: None
    poll: Callable[[], None] = lambda: None
    report: Callable[[str], None] = lambda line: None
    failure: Callable[[Source, HistosegError], None] = lambda source, error: None


def infer(
    plan: Plan, inputs: Sequence[str], out: Path | str, options: InferOptions, progress: Progress | None = None
) -> tuple[Totals, dict[str, Any]]:
    """Segment every image that `inputs` name into the folder `out`; the totals, and run.json's content.

    Inputs and `out` may be URLs that fsspec knows. What an earlier run of the same plan and options completed is
    skipped. Raises UsageError (nothing to do, bad options, folder in use), EngineError, and ImageError when the outputs
    cannot be written at all.
    """
    place = Remote.open(str(out)) if is_url(str(out)) else Path(out)
    with Staging.open(place, any(map(is_url, inputs))) as staging:
        return _infer(plan, inputs, staging, options, progress or Progress(), presentable(str(out)))


def _infer(
    plan: Plan, inputs: Sequence[str], staging: Staging, options: InferOptions, progress: Progress, shown: str
) -> tuple[Totals, dict[str, Any]]:
    """As `infer`; `shown` is what the folder is called."""
    started, out = time.perf_counter(), staging.folder
    outputs = make_outputs(plan, options, out, Outputs, staging.remote)
    watcher = Watcher(inputs, out, options.watch_idle, progress.report) if options.watch else None
    found = find_sources(inputs, out, staging.list) if watcher is None else []
    share = None if options.shard is None else take_share(found, options.shard)
    sources = found if share is None else share.sources
    if share is not None:
        progress.report(str(share))
    staging.fetch_records(progress.report)
    if (out / MANIFEST).exists():  # that another run is here is told before an engine is built, which may take long
        with writing(out):
            lock_folder(out)[0].close()
    with _open_runner(plan, options, staging, None if watcher else sources, progress.report) as engine:
        with writing(out):
            manifest = Manifest(out, progress.report)
        with contextlib.closing(manifest):
            with writing(out):
                staging.begin()
            stream: Any  # a Stream, or what stands for one
            if options.runner == "ray":
                stream = make_fleet_stream(engine, plan, sources, outputs, manifest, options, progress)
            else:
                given = staging.copies.ahead(sources) if watcher is None else watcher.sources(manifest.entries)
                over = staging.copies.over if watcher is None else watcher.over
                stream = make_stream(engine, plan, given, outputs, manifest, options, _telling(over, progress))

            progress.start(engine, len(sources) if watcher is None else None, stream)
            arguments = {"inputs": [presentable(text) for text in inputs], "out": shown, **asdict(options)}

            def poll() -> None:
                progress.poll()
                staging.sync(progress.report)

            try:
                totals = stream.run(poll)
            except BaseException:
                with contextlib.suppress(HistosegError):  # what ended the run is what is told
                    _write_records(staging, plan, stream, manifest, arguments, len(found), share, started)
                raise
            return totals, _write_records(staging, plan, stream, manifest, arguments, len(found), share, started)


def _write_records(
    staging: Staging,
    plan: Plan,
    stream: Any,
    manifest: Manifest,
    arguments: dict[str, Any],
    found: int,
    share: Share | None,
    started: float,
) -> dict[str, Any]:
    """Write summary.csv and run.json, of what is done so far; the latter's content."""
    mine = (entry for entry in manifest.entries.values() if entry.get("key") == stream.key)
    out = staging.folder
    try:
        with writing(out):
            write_summary(out, mine, plan.palette.names)
            record = {"arguments": arguments, **_record(plan, stream, found, share, time.perf_counter() - started)}
            write_run(out, record)
    finally:
        staging.end()
    return record


def _telling(over: Callable[[dict[str, Any]], None], progress: Progress) -> Progress:
    """`progress`, with `over` called first for each image that is over."""

    def image(entry: dict[str, Any]) -> None:
        over(entry)
        progress.image(entry)

    return replace(progress, image=image)


def _open_runner(
    plan: Plan, options: InferOptions, staging: Staging, sources: Sequence[Source] | None, report: Callable[[str], None]
) -> contextlib.AbstractContextManager[Any]:
    """The engine, or the cluster that stands for it. sources : None where they are still to come."""
    if options.runner == "ray":
        from histoseg_fast.pipeline.cluster import open_cluster

        return open_cluster(plan, options, staging, sources or (), report)
    return open_stream_engine(plan, CPU_STREAMS if sources is None else len(sources), options, report)


def make_outputs(
    plan: Plan, options: InferOptions, folder: Path, kind: type[OutputsT], remote: Remote | None = None
) -> OutputsT:
    """The results that `options` ask for, in `folder`, and from there to `remote`.

    Raises UsageError for options that do not go with the plan.
    """
    check_tile(options.tile or plan.tile, plan.halo, plan.stride)
    steps = plan.choose_postprocess(options.postprocess)
    options.resolution(plan)  # what is wrong with it is told before any work
    threshold = options.tissue_threshold if options.tissue_mask else None
    wanted = options.overlay, options.geojson, options.probabilities
    return kind(folder, plan.palette, *wanted, steps, tissue_threshold=threshold, remote=remote)


def open_stream_engine(plan: Plan, images: int, options: InferOptions, report: Callable[[str], None]) -> Engine:
    """The engine that `infer` takes for so many `images`; raises as `open_engine` does."""
    return open_engine(
        plan,
        device=options.device,
        precision=options.precision,
        threads=options.threads,
        streams=max(1, min(CPU_STREAMS, images, options.threads or available_cores())),
        tile=options.tile,
        batch=options.batch,
        report=report,
    )


def make_tiling(plan: Plan, options: InferOptions, device: str) -> Tiling:
    """How `infer` cuts images on a device. A GPU wants batches of one shape, in the size its engine was built for."""
    tile, halo, stride = options.tile or plan.tile, plan.halo, plan.stride
    large = large_tile(tile, halo, stride) if options.tile == 0 and device == "cpu" else tile
    return Tiling(tile, large, halo, stride, fitted=device == "cpu")


def worker_counts(device: str, cores: int) -> tuple[int, int]:
    """Readers and writers of a run. Beside a GPU every core has one; to decode takes longer than to write."""
    if device == "cpu":
        return (max(1, min(MAX_READERS, cores // 2)),) * 2
    readers = max(1, min(MAX_GPU_READERS, cores * 5 // 8))
    return readers, max(1, min(MAX_GPU_READERS, cores - readers))


def make_stream(
    engine: Engine,
    plan: Plan,
    sources: Iterable[Source | None],
    outputs: Outputs,
    manifest: Ledger,
    options: InferOptions,
    progress: Progress,
) -> Stream:
    """The stream of `infer`, ready to run."""
    decisive = {
        "overlay": outputs.overlay,
        "geojson": None if outputs.geojson is None else asdict(outputs.geojson),
        "probabilities": outputs.probabilities,
        "postprocess": outputs.postprocess.as_json(),
        "tissue_threshold": outputs.tissue_threshold,
        "device": engine.device.partition(":")[0],
        "precision": engine.precision,
        "resolution": asdict(options.resolution(plan)),
    }
    readers, writers = worker_counts(engine.device, options.threads or available_cores())
    return Stream(
        engine,
        sources,
        outputs,
        manifest,
        tiling=make_tiling(plan, options, engine.device),
        batch=options.batch or engine.batch,
        readers=readers,
        writers=writers,
        resolution=options.resolution(plan),
        key=run_key(plan.sha256, decisive),
        on_image=progress.image,
        on_failure=progress.failure,
    )


def make_fleet_stream(
    cluster: Cluster,
    plan: Plan,
    sources: Sequence[Source],
    outputs: Outputs,
    manifest: Manifest,
    options: InferOptions,
    progress: Progress,
) -> FleetStream:
    """The run of `infer` over the actors of a cluster."""
    from histoseg_fast.pipeline.fleet import FleetStream

    tiling, batch = make_tiling(plan, options, cluster.device), options.batch or cluster.batch
    return FleetStream(cluster, sources, outputs, manifest, progress, tiling=tiling, batch=batch)


def _record(plan: Plan, stream: Stream, found: int, share: Share | None, wall: float) -> dict[str, Any]:
    totals, engine = stream.totals, stream.engine
    return {
        "versions": versions(engine),
        "plan": plan.name,
        "plan_sha256": plan.sha256,
        "classes": plan.palette.names,
        "key": stream.key,
        "device": engine.device,
        "engine": engine.name,
        "precision": engine.precision,
        "tile": stream.tiling.tile,
        "large_tile": stream.tiling.large,
        "batch": stream.batch,
        "postprocess": stream.outputs.postprocess.as_json(),
        "shard": None if share is None else share.as_json(),
        "images_found": found or totals.done + totals.failed + totals.skipped,
        "images_done": totals.done,
        "images_failed": totals.failed,
        "images_skipped": totals.skipped,
        "interrupted": stream.stopped,
        "megapixels": round(totals.pixels / 1e6, 3),
        "glass_megapixels": round(totals.glass / 1e6, 3),
        "wall_seconds": round(wall, 3),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in totals.stage_seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def versions(engine: Engine) -> dict[str, str]:
    """What ran, by name."""
    return {
        "histoseg-fast": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "engine": engine.name,
        "platform": platform.platform(),
    }
