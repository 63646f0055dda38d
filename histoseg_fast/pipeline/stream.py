"""The stream: readers, engine, stitcher and writers side by side over a bounded ring of batch slots.

    read + decode -> tiles in batch slots -> engine -> stitch (argmax, crop, paste) -> encode + write

Every arrow is bounded, so a slow stage holds the ones before it up and memory depends on the ring alone.
An image that fails at any stage costs that image; an engine that fails, or a full disk, ends the run.
"""

from __future__ import annotations

import contextlib
import errno
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from histoseg_fast.engines.base import Engine
from histoseg_fast.errors import EngineError, HistosegError, ImageError
from histoseg_fast.images import NATIVE, Resolution
from histoseg_fast.images.content import OUT_OF_MEMORY
from histoseg_fast.pipeline.job import Band, Job
from histoseg_fast.pipeline.outputs import Ledger, Outputs
from histoseg_fast.pipeline.ring import Ring, Stopped, Tile
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.tiling import Tiling, padded_length

QUEUED_BANDS = 2
"""Bands that may wait for a writer."""
BIG_IMAGE_PIXELS = 1 << 24
"""Images above this are read one at a time, whatever the number of readers."""
FATAL_ERRNO = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
"""A write that fails so would fail for every other image too."""


class Stream:
    """One run of an engine over images.

    sources : what to do, in this order; taken one by one, from any thread. One that waits for images gives None several
    times a second meanwhile, so that what was begun is finished, and a stop noticed. An image may come again.
    tiling : how images are cut. batch : tiles a batch.
    resolution : the grid that images are read on. key : digest of plan and options, as `Manifest.complete` wants it.
    on_image : called with each image's manifest entry ("done", "failed" or "skipped") from the thread that finished it.
    on_failure : called before that with an image that failed, and why.
    workers : threads by stage.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Iterable[Source | None],
        outputs: Outputs,
        manifest: Ledger,
        *,
        tiling: Tiling,
        batch: int = 1,
        readers: int = 1,
        writers: int = 1,
        resolution: Resolution = NATIVE,
        key: str = "",
        on_image: Callable[[dict[str, Any]], None] = lambda entry: None,
        on_failure: Callable[[Source, HistosegError], None] = lambda source, error: None,
    ):
        self.engine, self.outputs, self.manifest = engine, outputs, manifest
        self.tiling, self.batch = tiling, batch
        self.resolution, self.key, self.on_image, self.on_failure = resolution, key, on_image, on_failure
        self.totals = Totals()
        self.workers = {"read": readers, "stitch": 1, "write": writers}
        self.fatal: BaseException | None = None
        self._ring = Ring(engine, engine.depth, batch, outputs.wants)
        self._sources: Iterator[tuple[int, Source | None]] = iter(enumerate(sources))
        self._queues: list[queue.Queue[tuple[Job, Band | None] | None]] = [
            queue.Queue(QUEUED_BANDS) for _ in range(writers)
        ]
        self._open: list[set[int]] = [set() for _ in range(writers)]
        self._order = list(range(writers))
        self._stop, self._dead = threading.Event(), threading.Event()
        self._lock, self._big, self._taking = threading.Lock(), threading.Lock(), threading.Lock()
        self._room = threading.Condition(self._lock)
        self._readers = [self._thread(self._read_images, f"reader-{i}") for i in range(readers)]
        self._stitcher = self._thread(self._stitch_batches, "stitcher")
        self._writers = [self._thread(self._write_bands, f"writer-{i}", i) for i in range(writers)]

    def run(self, poll: Callable[[], None] = lambda: None) -> Totals:
        """Work until all is done or stopped; `poll` is called about ten times a second. Raises what ended the run."""
        for thread in (*self._readers, self._stitcher, *self._writers):
            thread.start()
        try:
            for thread in self._readers:
                self._join(thread, poll)
            if self.fatal is None:
                self._ring.finish()
            self._join(self._stitcher, poll)
            with contextlib.suppress(Stopped):
                for waiting in self._queues:
                    self._put(waiting, None)
            for thread in self._writers:
                self._join(thread, poll)
        except BaseException as error:  # the engine's, or `poll`'s: no thread may outlive the run
            self._die(error)
        for thread in (*self._readers, self._stitcher, *self._writers):
            thread.join()
        self._ring.drain()
        if self.fatal is not None:
            raise self.fatal
        return self.totals

    def stop(self) -> None:
        """Take no new image, give up those of more than one band, finish what is in flight. For signal handlers too."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    # -- threads ---------------------------------------------------------------------------------------

    def _thread(self, work: Callable[..., None], name: str, *arguments: Any) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except Stopped:
                return
            except BaseException as error:  # a thread must not end unseen: it ends the run
                self._die(error)

        return threading.Thread(target=guarded, name=name, daemon=True)

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self.fatal = self.fatal or error
        self._dead.set()
        self._ring.stop()

    def _join(self, thread: threading.Thread, poll: Callable[[], None]) -> None:
        while thread.is_alive():
            thread.join(0.1)
            poll()

    def _put(self, target: queue.Queue[Any], item: Any) -> None:
        while True:
            try:
                return target.put(item, timeout=0.2)
            except queue.Full:
                if self._dead.is_set():
                    raise Stopped from None

    # -- readers ---------------------------------------------------------------------------------------

    def _read_images(self) -> None:
        while not self._stop.is_set() and not self._dead.is_set():
            with self._taking:
                number, source = next(self._sources, (-1, None))
            if source is not None:
                self._read_image(number, source)
            elif number < 0:
                return
            else:  # nothing to do just now
                self._ring.flush()

    def _read_image(self, number: int, source: Source) -> None:
        started = time.perf_counter()
        try:
            with _enough_memory(source):
                image = source.open(self.resolution, lambda: self._stop.is_set() or self._dead.is_set())
        except ImageError as error:
            return self._report_failure(source, error)
        if image is None:
            return
        paths = self.outputs.paths(source.stem, slide=image.slide)
        if self.manifest.complete(source.name, image.sha256, self.key, paths, self.outputs.digest):
            with contextlib.suppress(ImageError):  # it changes just now: the next run will see
                image.close()
            return self._report({"input": source.name, "status": "skipped"})
        grid = self.tiling.grid(image.height, image.width)
        job = Job(source, image, grid, self.outputs, number, started=started)
        job.seconds["read"] += time.perf_counter() - started
        try:
            if image.width * image.height > BIG_IMAGE_PIXELS:
                with self._big:
                    self._read_bands(job)
            else:
                self._read_bands(job)
        except ImageError as error:
            self._fail(job, error)
        finally:
            with contextlib.suppress(ImageError):
                image.close()

    def _read_bands(self, job: Job) -> None:
        """Fill the job's tiles in raster order, glass left out; a single tile is decoded straight into its slot."""
        if job.image.slide:
            with _Timer(job, "read"), _enough_memory(job.source):
                job.look_for_glass(self.tiling)
        grid = job.grid
        if not job.rows:
            job.image.close()
            return self._hand_over(job, job.glass_band())
        if grid.whole_rows:
            for row in job.rows:
                if self._given_up(job):
                    return
                batch, index, place = self._ring.take(grid.tile_shape(row, 0))
                tile = None
                try:
                    self._read_band(job, row, place)
                    tile = Tile(job, row, 0, grid.core(row, 0))
                finally:
                    self._ring.fill(batch, index, tile)
            return
        height = max(down.outer_end - down.outer for down in grid.rows)
        with _enough_memory(job.source):
            rows = np.empty((height, padded_length(grid.width, self.tiling.stride), 3), np.uint8)
        for row in job.rows:
            band = rows[: grid.rows[row].outer_end - grid.rows[row].outer]
            self._read_band(job, row, band)
            for column, span in enumerate(grid.columns[row]):
                if self._given_up(job):
                    return
                batch, index, place = self._ring.take(grid.tile_shape(row, column))
                place[...] = band[:, span.outer : span.outer_end]
                self._ring.fill(batch, index, Tile(job, row, column, grid.core(row, column)))

    def _read_band(self, job: Job, row: int, out: np.ndarray) -> None:
        with _Timer(job, "read"), _enough_memory(job.source):
            job.fill_band(row, out)

    def _given_up(self, job: Job) -> bool:
        """Whether to read no further: the image has failed, or the run is stopping and this image has far to go."""
        if self._stop.is_set() and len(job.grid.rows) > 1 and job.error is None:
            self._fail(job, Interrupted())
        return job.error is not None

    # -- stitcher --------------------------------------------------------------------------------------

    def _stitch_batches(self) -> None:
        free_since = 0.0
        while (batch := self._ring.next()) is not None:
            self.engine.wait(batch.slot)
            now = time.perf_counter()
            share = (now - max(batch.submitted, free_since)) / len(batch.tiles)
            free_since = now
            bands = []
            for i, tile in enumerate(batch.tiles):
                if tile is None or tile.job.error is not None:
                    continue
                tile.job.seconds["engine"] += share
                try:
                    with _Timer(tile.job, "stitch"), _enough_memory(tile.job.source):
                        band = tile.job.stitch(tile, batch.slot, i)
                except (EngineError, ImageError) as error:
                    self._fail(tile.job, error)
                    continue
                top, left, bottom, right = tile.core
                self.totals.segmented += (bottom - top) * (right - left)
                if band is not None:
                    bands.append((tile.job, band))
            self._ring.release(batch)
            for job, band in bands:
                self._hand_over(job, band)

    def _hand_over(self, job: Job, band: Band | None) -> None:
        """Put a band, or None for an image that failed, into a writer's queue: all of an image into the same, in order.

        At the first it is that of the writers with room that has the fewest images, of several the one that last
        finished one: while one writer is busy with a slow image, the others go on.
        """
        with self._room:
            while job.writer is None:
                place = min(self._order, key=lambda i: (self._queues[i].full(), len(self._open[i])))
                if self._dead.is_set():
                    raise Stopped
                if self._queues[place].full():
                    self._room.wait(0.2)
                    continue
                job.writer = place
                self._open[place].add(job.number)
        self._put(self._queues[job.writer], (job, band))

    def _fail(self, job: Job, error: HistosegError) -> None:
        if job.fail(error):
            self._hand_over(job, None)

    # -- writers ---------------------------------------------------------------------------------------

    def _write_bands(self, place: int) -> None:
        waiting, jobs = self._queues[place], dict[int, Job]()
        try:
            while not self._dead.is_set():
                try:
                    item = waiting.get(timeout=0.2)
                except queue.Empty:
                    continue
                with self._room:
                    self._room.notify_all()
                if item is None:
                    return
                job, band = item
                if band is not None and job.error is not None:
                    continue  # settled already, or about to be: (job, None) follows
                jobs[job.number] = job
                if self._write_band(job, band):
                    del jobs[job.number]
                    with self._lock:
                        self._open[place].discard(job.number)
                        self._order.remove(place)
                        self._order.insert(0, place)
        finally:
            for job in jobs.values():
                job.abandon()

    def _write_band(self, job: Job, band: Band | None) -> bool:
        """Write a band, or settle an image that failed (None); whether the image is over."""
        entry = self._entry(job.source, job)
        try:
            if band is None:
                assert job.error is not None
                raise job.error
            with _Timer(job, "write"), _enough_memory(job.source):
                if not job.write(band):
                    return False
                entry |= job.finish()
        except Interrupted:
            job.abandon()
            return True
        except HistosegError as error:
            job.abandon()
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in FATAL_ERRNO:
                raise
            if band is None or job.fail(error):  # else an earlier stage failed first, and its (job, None) follows
                self._report_failure(job.source, error, job)
            return True
        self._report(entry | {"status": "done", "error": None}, job)
        return True

    def _entry(self, source: Source, job: Job | None = None) -> dict[str, Any]:
        """What every manifest line says; `job` where the image could be opened."""
        engine = {"engine": self.engine.name, "device": self.engine.device, "precision": self.engine.precision}
        known = {} if job is None else {"sha256": job.image.sha256, "key": self.key, "warnings": job.warnings}
        return {"input": source.name, "path": source.shown, **known, **engine}

    def _report_failure(self, source: Source, error: HistosegError, job: Job | None = None) -> None:
        error = source.renamed(error)
        self.on_failure(source, error)
        self._report(self._entry(source, job) | {"status": "failed", "error": str(error)}, job)

    def _report(self, entry: dict[str, Any], job: Job | None = None) -> None:
        if job is not None:
            seconds = {stage: round(s, 6) for stage, s in job.seconds.items()}
            entry = entry | {"seconds": seconds, "latency": round(time.perf_counter() - job.started, 6)}
        if entry["status"] != "skipped":
            self.manifest.add(entry)
        with self._lock:
            self.totals.count(entry)
        self.on_image(entry)


@contextlib.contextmanager
def _enough_memory(source: Source) -> Iterator[None]:
    """What does not fit costs its image. Not around the engine, whose state is unknown when it had no memory."""
    try:
        yield
    except MemoryError as error:
        fix = "free memory; --postprocess none holds less of it"
        raise ImageError(OUT_OF_MEMORY, where=source.name, fix=fix) from error


class Interrupted(HistosegError):
    """The run was stopped before this image was done; it is left for the next run."""

    def __init__(self) -> None:
        super().__init__("interrupted")


class _Timer:
    """Adds the time of a block to one stage of a job."""

    def __init__(self, job: Job, stage: str):
        self.job, self.stage = job, stage

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.job.seconds[self.stage] += time.perf_counter() - self.started
