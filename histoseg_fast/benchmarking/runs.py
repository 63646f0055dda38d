"""Single runs: the stream from files to files, and the engine alone on the batches that the stream would give it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from histoseg_fast.engines.base import Engine, Slot, Wants
from histoseg_fast.errors import HistosegError
from histoseg_fast.machine import busy_seconds
from histoseg_fast.pipeline.outputs import Outputs
from histoseg_fast.pipeline.records import Manifest, write_summary
from histoseg_fast.pipeline.run import InferOptions, Progress, make_stream, make_tiling
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.plan import Plan
from histoseg_fast.postprocess import PostProcessing
from histoseg_fast.synthetic import make_field

Shape = tuple[int, int]
"""Height and width, pixels."""


class Stopwatch:
    """Time of a block, on the wall and on the processors. A context manager.

    started, wall : when it began (perf_counter) and how long it took, seconds. cpu : seconds that this process's
    threads worked. others : processors that the rest of the machine kept busy, on average (None where the system does
    not tell).
    """

    started = wall = cpu = 0.0
    others: float | None = None

    def __enter__(self) -> Stopwatch:
        self.started, self._cpu, self._busy = time.perf_counter(), time.process_time(), busy_seconds()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.wall, self.cpu = time.perf_counter() - self.started, time.process_time() - self._cpu
        busy = busy_seconds()
        if self._busy is not None and busy is not None:
            self.others = max(0.0, busy - self._busy - self.cpu) / self.wall


@dataclass(frozen=True)
class StreamRun:
    """One run from files to files: its time, seconds by stage summed over images, seconds of each image from the moment
    a reader took it until its files were in place, pixels of all images, and threads by stage.
    """

    watch: Stopwatch
    stage_seconds: dict[str, float]
    latencies: list[float]
    pixels: int
    workers: dict[str, int]


@dataclass(frozen=True)
class Work:
    """What is run, again and again: `sources` with `options` of `infer`, results under `scratch`.

    `poll` is called several times a second meanwhile; what it raises ends the run.
    """

    plan: Plan
    sources: Sequence[Source]
    options: InferOptions
    scratch: Path
    poll: Callable[[], None] = lambda: None

    @property
    def outputs(self) -> Outputs:
        """Of `infer` with these options, in `scratch`/out."""
        return Outputs(self.scratch / "out", self.plan.palette, postprocess=self.steps)

    @property
    def steps(self) -> PostProcessing:
        """The steps after the network."""
        return self.plan.choose_postprocess(self.options.postprocess)

    def tile(self, device: str, shapes: Iterable[Shape]) -> int:
        """Tile size in pixels, halo included, that the largest of images of these shapes get."""
        tiling = make_tiling(self.plan, self.options, device)
        return max(tiling.side(*shape) for shape in shapes)

    def with_tile(self, tile: int, batch: int) -> Work:
        """The same with another tile size and batch."""
        return replace(self, options=replace(self.options, tile=tile, batch=batch))


def run_stream(work: Work, engine: Engine, keep: Path | None = None) -> tuple[StreamRun, list[Shape]]:
    """Run `work` from files to files on an open engine; also the size of each image, in the order of names.

    The results go, or are moved to the folder `keep`. Raises the error of the first image that failed.
    """
    outputs = work.outputs
    entries: list[dict[str, Any]] = []
    try:
        with Stopwatch() as watch, contextlib.closing(Manifest(outputs.folder)) as manifest:
            progress = Progress(image=entries.append)
            stream = make_stream(engine, work.plan, work.sources, outputs, manifest, work.options, progress)
            totals = stream.run(work.poll)
            write_summary(outputs.folder, entries, work.plan.palette.names)
        if failed := [entry for entry in entries if entry["status"] != "done"]:
            raise HistosegError(failed[0]["error"], fix="a benchmark wants images that can all be read")
        if keep is not None:
            os.rename(outputs.folder, keep)
    finally:
        shutil.rmtree(outputs.folder, ignore_errors=True)
    run = StreamRun(watch, totals.stage_seconds, [e["latency"] for e in entries], totals.pixels, stream.workers)
    return run, [(e["height"], e["width"]) for e in sorted(entries, key=_name)]


def _name(entry: dict[str, Any]) -> str:
    return str(entry["input"])


def batches(work: Work, device: str, shapes: Iterable[Shape], batch: int) -> list[tuple[int, int, int]]:
    """The batches, (tiles, height, width), that one reader makes of images of these shapes: see `Ring`."""
    tiling = make_tiling(work.plan, work.options, device)
    made: list[tuple[int, int, int]] = []
    for height, width in shapes:
        grid = tiling.grid(height, width)
        shape = grid.tile_shape(0, 0)
        for _ in range(grid.tiles):
            if made and made[-1][1:] == shape and made[-1][0] < batch:
                made[-1] = (made[-1][0] + 1, *shape)
            else:
                made.append((1, *shape))
    return made


class EngineAlone:
    """The engine on batches that lie in memory, as many in flight as the stream has; what comes out is dropped.

    Its tiles are filled with a made-up field: a network takes as long for any other. A context manager.
    """

    def __init__(self, engine: Engine, wanted: Sequence[tuple[int, int, int]], wants: Wants, poll: Callable[[], None]):
        self._engine, self._batches, self._poll = engine, wanted, poll
        self._pixels = np.resize(make_field(0)[0], max(h * w for _, h, w in wanted) * 3)
        self._slots = engine.slots(engine.depth)
        for slot in self._slots:
            slot.wants = wants
        largest = max(wanted, key=lambda shape: shape[0] * shape[1] * shape[2])
        self._run([largest] * len(self._slots))  # the first run of a slot allocates

    def run(self) -> float:
        """Seconds for all batches."""
        return self._run(self._batches)

    def _run(self, wanted: Sequence[tuple[int, int, int]]) -> float:
        free, running = list(self._slots), deque[Slot]()
        started = time.perf_counter()
        try:
            for shape in wanted:
                self._poll()
                if not free:
                    free.append(running.popleft())
                    self._engine.wait(free[-1])
                slot = free.pop()
                self._fill(slot, shape)
                self._engine.submit(slot)
                running.append(slot)
        finally:
            while running:  # their memory must outlive the run
                self._engine.wait(running.popleft())
        return time.perf_counter() - started

    def _fill(self, slot: Slot, shape: tuple[int, int, int]) -> None:
        n, height, width = shape
        if slot.input.shape == (n, height, width, 3):
            return
        slot.reshape(n, height, width).reshape(n, -1)[...] = self._pixels[: height * width * 3]
        slot.cores[...] = (0, 0, height, width)

    def __enter__(self) -> EngineAlone:
        return self

    def __exit__(self, *_: object) -> None:
        for slot in self._slots:
            slot.close()
