"""The bounded ring of batch slots between the readers, the engine and the stitcher."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from histoseg_fast.engines.base import CLASSES, Engine, Slot, Wants
from histoseg_fast.tiling import Core

if TYPE_CHECKING:
    from histoseg_fast.pipeline.job import Job


class Stopped(Exception):
    """The ring was stopped while a thread waited on it."""


@dataclass(frozen=True)
class Tile:
    """Tile (row, column) of the grid of `job`, and the part of it that is kept."""

    job: Job
    row: int
    column: int
    core: Core


@dataclass
class Batch:
    """A slot on its way: `tiles[i]` fills `slot.input[i]`; None is a place whose image failed."""

    slot: Slot
    shape: tuple[int, int]
    capacity: int
    tiles: list[Tile | None] = field(default_factory=list)
    filled: int = 0
    submitted: float = 0.0


class Ring:
    """Hands out places in batches, submits them in that order when they are filled, and gives them back in it.

    The order matters: a batch that was filled early but opened late must wait, or an image whose tiles lie in
    both would have its bands finished out of order. All tiles of a batch have one shape: a tile of another
    shape closes the open batch, full or not. A place that was taken must be filled before the same thread
    takes another, so a waiting thread never holds up a batch.
    """

    def __init__(self, engine: Engine, depth: int, batch: int, wants: Wants = CLASSES):
        self.engine, self.batch = engine, batch
        self._free: deque[Slot] = deque(engine.slots(depth))
        for slot in self._free:
            slot.wants = wants
        self._closed: deque[Batch] = deque()
        self._submitted: deque[Batch] = deque()
        self._open: Batch | None = None
        self._pending = 0
        self._finished = self._stopped = self._submitting = False
        self._changed = threading.Condition()

    def take(self, shape: tuple[int, int]) -> tuple[Batch, int, np.ndarray]:
        """A place for one tile of `shape`: its batch, its index there, and the memory to fill, uint8 (h, w, 3)."""
        with self._changed:
            while True:
                if self._stopped:
                    raise Stopped
                if self._open is not None and self._open.shape != shape:
                    self._close_open()
                    continue  # others had the lock meanwhile
                if self._open is None and self._free:
                    self._open = Batch(self._free.popleft(), shape, self.batch)
                    self._open.slot.reshape(self.batch, *shape)
                    self._pending += 1
                if self._open is not None:
                    batch = self._open
                    batch.tiles.append(None)
                    index = len(batch.tiles) - 1
                    if len(batch.tiles) == batch.capacity:
                        self._close_open()
                    return batch, index, batch.slot.input[index]
                self._changed.wait()

    def fill(self, batch: Batch, index: int, tile: Tile | None) -> None:
        """Say that place `index` holds `tile` now (None: nothing of use); full closed batches are submitted."""
        with self._changed:
            batch.tiles[index] = tile
            if tile is not None:
                batch.slot.cores[index] = tile.core
            batch.filled += 1
            self._submit_filled()

    def _close_open(self) -> None:
        batch, self._open = self._open, None
        assert batch is not None
        self._closed.append(batch)
        self._submit_filled()

    def _submit_filled(self) -> None:
        """One thread at a time, and without the lock, which readers and the stitcher want while a GPU gets its work."""
        if self._submitting:
            return  # that thread sees to what is filled by now, too
        self._submitting = True
        try:
            while self._closed and self._closed[0].filled == len(self._closed[0].tiles) and not self._stopped:
                batch = self._closed.popleft()
                batch.slot.shorten(len(batch.tiles))
                batch.submitted = time.perf_counter()
                self._changed.release()
                try:
                    self.engine.submit(batch.slot)
                finally:
                    self._changed.acquire()
                self._submitted.append(batch)
                self._changed.notify_all()
        finally:
            self._submitting = False

    def next(self) -> Batch | None:
        """The next batch in order (its engine run may not be over), or None after `finish` and the last."""
        with self._changed:
            while not self._submitted:
                if self._stopped:
                    raise Stopped
                if self._finished and self._pending == 0:
                    return None
                self._changed.wait()
            return self._submitted.popleft()

    def release(self, batch: Batch) -> None:
        """Give the slot of `batch` back."""
        with self._changed:
            self._pending -= 1
            self._free.append(batch.slot)
            self._changed.notify_all()

    def flush(self) -> None:
        """No more tiles are to be expected soon: submit what is open."""
        with self._changed:
            if self._open is not None:
                self._close_open()

    def finish(self) -> None:
        """No more tiles will come: submit what is open."""
        with self._changed:
            if self._open is not None:
                self._close_open()
            self._finished = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake every waiting thread with Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait for what the engine still runs, after a stop: its memory must outlive the run."""
        for batch in self._submitted:
            with contextlib.suppress(Exception):  # the error that stopped the ring is the one to tell
                self.engine.wait(batch.slot)
        self._submitted.clear()
