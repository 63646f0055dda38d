"""One whole `infer`: plan and inputs in; masks, summary, manifest and run.json out."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast import __version__
from histoseg_fast.engines import Engine, open_engine
from histoseg_fast.errors import ImageError, UsageError
from histoseg_fast.machine import available_cores, peak_rss_bytes
from histoseg_fast.pipeline.job import Outputs
from histoseg_fast.pipeline.records import MANIFEST, Manifest, clear_partials, run_key, write_run, write_summary
from histoseg_fast.pipeline.sources import OUTPUT_FOLDERS, find_sources
from histoseg_fast.pipeline.stream import Stream, Totals
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import check_tile

MAX_READERS = 4


@dataclass(frozen=True)
class InferOptions:
    """What `infer` can be told. tile: pixels a side, halo included (0: the plan's). threads: CPU threads (0: all)."""

    device: str = "auto"
    precision: str = "auto"
    tile: int = 0
    batch: int = 1
    threads: int = 0
    overlay: bool = False
    probabilities: bool = False


@dataclass(frozen=True)
class Progress:
    """What `infer` calls while it runs: `start` once, `image` as each is over, `poll` ten times a second."""

    start: Callable[[Engine, int, Stream], None] = lambda engine, images, stream: None
    image: Callable[[dict[str, Any]], None] = lambda entry: None
    poll: Callable[[], None] = lambda: None


def infer(
    plan: Plan, inputs: Sequence[str], out: Path, options: InferOptions, progress: Progress | None = None
) -> tuple[Totals, dict[str, Any]]:
    """Segment every image that `inputs` name into the folder `out`; the totals, and run.json's content.

    What an earlier run of the same plan and options completed is skipped. Raises UsageError (nothing to do,
    bad options, folder in use), EngineError, and ImageError when the outputs cannot be written at all.
    """
    progress = progress or Progress()
    started = time.perf_counter()
    tile = options.tile or plan.tile
    check_tile(tile, plan.halo, plan.stride)
    sources = find_sources(inputs, out)
    foreign = [name for name in OUTPUT_FOLDERS if (out / name).exists()]
    if foreign and not (out / MANIFEST).exists():
        raise UsageError(f"holds {', '.join(foreign)} that no run wrote", where=out, fix="choose another --out")
    readers = max(1, min(MAX_READERS, (options.threads or available_cores()) // 2))
    try:
        manifest = Manifest(out)
        clear_partials(out)
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        with open_engine(plan, device=options.device, precision=options.precision, threads=options.threads) as engine:
            wanted = {"overlay": options.overlay, "probabilities": options.probabilities}
            key = run_key(plan.sha256, wanted | {"device": engine.device, "precision": engine.precision})
            stream = Stream(
                engine,
                sources,
                Outputs(out, plan.palette, **wanted),
                manifest,
                stride=plan.stride,
                halo=plan.halo,
                tile=tile,
                batch=options.batch,
                readers=readers,
                writers=readers,
                key=key,
                on_image=progress.image,
            )
            progress.start(engine, len(sources), stream)
            try:
                totals = stream.run(progress.poll)
            finally:
                mine = [entry for entry in manifest.entries.values() if entry.get("key") == key]
                record = {
                    "arguments": {"inputs": list(inputs), "out": str(out), **asdict(options)},
                    "versions": _versions(engine),
                    "plan": plan.name,
                    "plan_sha256": plan.sha256,
                    "device": engine.device,
                    "engine": engine.name,
                    "precision": engine.precision,
                    "tile": tile,
                    "images_found": len(sources),
                    **_totals(stream, time.perf_counter() - started),
                }
                write_summary(out, mine, plan.palette.names)
                write_run(out, record)
    except OSError as error:
        if isinstance(error, ImageError):
            raise
        raise _unwritable(out, error) from error
    finally:
        manifest.close()
    return totals, record


def _totals(stream: Stream, wall: float) -> dict[str, Any]:
    totals = stream.totals
    return {
        "images_done": totals.done,
        "images_failed": totals.failed,
        "images_skipped": totals.skipped,
        "interrupted": stream.stopped,
        "megapixels": round(totals.pixels / 1e6, 3),
        "wall_seconds": round(wall, 3),
        "stage_seconds": {stage: round(seconds, 3) for stage, seconds in totals.stage_seconds.items()},
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _versions(engine: Engine) -> dict[str, str]:
    return {
        "histoseg-fast": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "engine": engine.name,
        "platform": platform.platform(),
    }


def _unwritable(out: Path, error: OSError) -> ImageError:
    reason = error.strerror or str(error)
    return ImageError(f"cannot be written: {reason}", where=out, fix="choose another --out, or free space")
