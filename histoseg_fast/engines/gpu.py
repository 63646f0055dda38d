"""What the GPU engines share: batches on three streams, so that copying in, computing and copying out overlap.

    pinned input -> device input -> network -> logits -> stitch -> device classes and sums -> pinned results
         |          loading stream |      running stream          |        leaving stream              |

A slot has its own buffers and events, so the streams work on different batches. Its results are a byte a pixel and
a few sums; the logits stay on the device unless they are wanted.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from histoseg_fast.engines.base import Engine, Slot
from histoseg_fast.engines.memory import Block, Memory, OutOfMemory
from histoseg_fast.errors import EngineError
from histoseg_fast.tiling import Core

DEPTH = 6
"""Batch slots: one filled, one of each stream, one stitched, and one that waits ready for the network."""
BATCH = 4
"""Tiles in a batch by default: enough to fill a GPU with a small network, too."""
MAX_GRAPHS = 8
"""Shapes with a CUDA graph of their own; further ones run without."""
MAX_SEEN = 4096
"""Shapes remembered to find those that come again."""

Shape = tuple[int, int, int]
"""Tiles, height and width of a batch."""
Report = Callable[[str], None]


class Network(ABC):
    """A network on the GPU of `memory`, which is current: queues work on one stream, one batch after the other.

    Logits are float32 (n, classes, h, w), dense, and valid on that stream until the next `run`. `graphs` says whether
    shapes that come again are captured as CUDA graphs.
    """

    graphs = True

    def __init__(self, memory: Memory, classes: int, report: Report):
        self._memory, self.classes, self.report = memory, classes, report
        self._seen: set[Shape] = set()
        self._replays: dict[Shape, Callable[[Block], Block]] = {}

    def run(self, rgb: Block, shape: Shape, stream: Any) -> Block:
        """Queue the network on the uint8 (n, h, w, 3) in `rgb`; its logits. Raises OutOfMemory, EngineError."""
        replay = self._replays.get(shape)
        if replay is None and self.graphs and shape in self._seen and len(self._replays) < MAX_GRAPHS:
            replay = self._try_capture(shape, stream)
        if replay is not None:
            return replay(rgb)
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(shape)
        return self.compute(rgb, shape, stream)

    def _try_capture(self, shape: Shape, stream: Any) -> Callable[[Block], Block] | None:
        try:
            with self._memory.current():  # so that the library's own errors are known here, too
                self._replays[shape] = self.capture(shape, stream)
        except EngineError as error:
            self.graphs = False
            self.report(f"going on without CUDA graphs: {error}")
            if isinstance(error, OutOfMemory):
                raise  # so that what the capture took is freed
        return self._replays.get(shape)

    @abstractmethod
    def most_tiles(self, height: int, width: int) -> int:
        """The largest batch of tiles of this size. Raises EngineError if there is none."""

    @abstractmethod
    def compute(self, rgb: Block, shape: Shape, stream: Any) -> Block:
        """`run` without a graph."""

    @abstractmethod
    def capture(self, shape: Shape, stream: Any) -> Callable[[Block], Block]:
        """A function that does what `compute` does for `shape` on `stream` by launching one graph."""

    def drop(self) -> None:
        """Free what can be made anew; the device is idle. Subclasses free the rest."""
        self._replays.clear()

    def close(self) -> None:
        """Free everything; the device is idle."""
        self.drop()


class GpuSlot(Slot):
    """A slot with page-locked input and results, device buffers for `room` tiles, and events.

    `loaded`: the input is on the device; `ran`: and used up; `done`: and the results are back.
    """

    def __init__(self, memory: Memory, classes: int, host: bool):
        super().__init__()
        self._memory, self._classes, self._host = memory, classes, host
        self.loaded, self.ran, self.done = (memory.event() for _ in range(3))
        self.blocks: dict[str, Block] = {}
        self.room = 0
        self._pinned: list[np.ndarray] = []
        self._results = np.empty(0, np.uint8)
        self._ids: np.ndarray = self._results
        self._sums: np.ndarray = self._results
        self._probabilities: np.ndarray = self._results

    @property
    def on_host(self) -> bool:
        """Whether logits are what comes back: they are wanted, or there is no kernel to stitch them with."""
        return self._host or self.wants.logits

    def allocate(self, size: int) -> np.ndarray:
        with self._memory.current():
            self._release(self._buffer)
            self._let_go()
            self._pinned.append(self._memory.pinned(size))
        return self._pinned[-1]

    def _let_go(self) -> None:
        """Point at none of the input's memory any more: it is freed."""
        self._buffer = np.empty(0, np.uint8)
        self.input, self.cores = self._buffer.reshape(0, 0, 0, 3), self._buffer.view(np.int32).reshape(0, 4)

    def _release(self, array: np.ndarray) -> None:
        for i, mine in enumerate(self._pinned):
            if mine is array:
                self._memory.free_pinned(self._pinned.pop(i))
                return

    def prepare(self, room: int) -> None:
        """Make results for the whole batch, and device buffers for `room` tiles of it. Raises OutOfMemory."""
        n, h, w, _ = self.input.shape
        self.room = room
        per_tile = {"rgb": h * w * 3, "cores": self.cores.itemsize * 4}
        results = {"logits": h * w * self._classes * 4}
        if not self.on_host:
            results = {"sums": 8 * (2 * self._classes + 1), "ids": h * w}
            if self.wants.probabilities:
                results["probabilities"] = h * w * self._classes
            per_tile |= results
        for name, size in per_tile.items():
            self._fit(name, room * size)
        if n * sum(results.values()) > self._results.size:
            self._release(self._results)
            self._results = np.empty(0, np.uint8)
            self._pinned.append(self._memory.pinned(n * sum(results.values())))
            self._results = self._pinned[-1]
        self._slice(n, h, w)

    def _fit(self, name: str, size: int) -> None:
        block = self.blocks.get(name)
        if block is None or block.size < size:
            if block is not None:
                self._memory.free(self.blocks.pop(name))
            self.blocks[name] = self._memory.allocate(size)

    def _slice(self, n: int, h: int, w: int) -> None:
        """Views of the results: logits, or sums, ids and probabilities."""
        classes, rest = self._classes, self._results
        self.logits = None
        if self.on_host:
            self.logits = rest[: n * classes * h * w * 4].view(np.float32).reshape(n, classes, h, w)
            return
        size = 8 * n * (2 * classes + 1)
        self._sums, rest = rest[:size].view(np.uint64), rest[size:]
        self._ids, rest = rest[: n * h * w].reshape(n, h, w), rest[n * h * w :]
        if self.wants.probabilities:
            self._probabilities = rest[: n * classes * h * w].reshape(n, classes, h, w)

    def results(self, start: int, end: int) -> dict[str, np.ndarray]:
        """Where the results of the tiles from `start` to before `end` go, by the name of their device buffer."""
        width = 2 * self._classes + 1
        results = {"sums": self._sums[start * width : end * width], "ids": self._ids[start:end]}
        if self.wants.probabilities:
            results["probabilities"] = self._probabilities[start:end]
        return results

    def sums_at(self, first: int, tiles: int) -> tuple[int, int, int]:
        """Offsets in values of counts, confidence and broken in the sums of `tiles` tiles that begin at `first`."""
        return first, first + tiles * self._classes, first + 2 * tiles * self._classes

    def stitch(
        self,
        index: int,
        core: Core,
        classes: np.ndarray,
        counts: np.ndarray,
        confidence: np.ndarray,
        probabilities: np.ndarray | None = None,
    ) -> int:
        if self.on_host:
            return super().stitch(index, core, classes, counts, confidence, probabilities)
        top, left, bottom, right = core
        classes[...] = self._ids[index, top:bottom, left:right]
        if probabilities is not None:
            probabilities[...] = self._probabilities[index, :, top:bottom, left:right]
        place = index % self.room
        start = index - place
        tiles = min(self.room, len(self._ids) - start)
        at_counts, at_confidence, at_broken = self.sums_at(start * (2 * self._classes + 1), tiles)
        counts += self._sums[at_counts + place * self._classes :][: self._classes]
        confidence += self._sums[at_confidence + place * self._classes :][: self._classes]
        return int(self._sums[at_broken + place])

    def drop(self) -> None:
        """Free the device's buffers; the device is idle. What has come back stays."""
        for name in list(self.blocks):
            self._memory.free(self.blocks.pop(name))

    def close(self) -> None:
        with self._memory.current():
            self._memory.synchronise()
            self.drop()
            self._let_go()
            self.logits = None
            self._results = self._ids = self._sums = self._probabilities = self._buffer
            while self._pinned:
                self._memory.free_pinned(self._pinned.pop())
            self.loaded = self.ran = self.done = None


class GpuEngine(Engine):
    """Runs `network` on the GPU of `memory`; closes both. A batch that does not fit is run in halves."""

    depth, batch = DEPTH, BATCH

    def __init__(self, memory: Memory, network: Network, *, name: str, precision: str, report: Report):
        self._memory, self._network, self._report = memory, network, report
        self.device, self.precision = memory.device, precision
        self.name = name if memory.kernels else f"{name}, stitching on the CPU"
        self._most = 0
        self._slots: list[GpuSlot] = []
        self._lock = threading.Lock()
        with memory.current():
            self._loading, self._running, self._leaving = (memory.stream() for _ in range(3))

    def slots(self, count: int) -> list[Slot]:
        self._slots = [slot for slot in self._slots if slot.done is not None]
        with self._memory.current():
            made = [GpuSlot(self._memory, self._network.classes, not self._memory.kernels) for _ in range(count)]
        self._slots += made
        return list(made)

    def submit(self, slot: Slot) -> None:
        assert isinstance(slot, GpuSlot)
        with self._lock:
            bare = False
            while (lack := self._try(slot)) is not None:
                bare = self._make_way(slot, bare, lack)

    def _try(self, slot: GpuSlot) -> str | None:
        """Queue the batch. Where there is no memory for it: what was said."""
        try:
            with self._memory.current():
                self._queue(slot)
        except OutOfMemory as error:  # it ends here, and with it what its frames hold on the device
            return error.what
        return None

    def _queue(self, slot: GpuSlot) -> None:
        n, h, w, _ = slot.input.shape
        room = min(n, self._network.most_tiles(h, w), self._most or n)
        slot.prepare(room)
        for start in range(0, n, room):
            self._queue_part(slot, start, min(start + room, n))

    def _queue_part(self, slot: GpuSlot, start: int, end: int) -> None:
        """Queue the tiles from `start` to before `end`; the slot has room for so many."""
        memory, blocks = self._memory, slot.blocks
        _, h, w, _ = slot.input.shape
        memory.wait(self._loading, slot.ran)  # the part before has used its input up
        memory.upload(blocks["rgb"], slot.input[start:end], self._loading)
        if not slot.on_host:
            memory.upload(blocks["cores"], slot.cores[start:end], self._loading)
        memory.record(slot.loaded, self._loading)
        memory.wait(self._running, slot.loaded)
        memory.wait(self._running, slot.done)  # its results have left
        logits = self._network.run(blocks["rgb"], (end - start, h, w), self._running)
        if slot.on_host:
            # Here, not on the stream of results: the next batch writes to the same logits.
            assert slot.logits is not None
            memory.download(slot.logits[start:end], logits, self._running)
        else:
            self._stitch(slot, end - start, logits)
        memory.record(slot.ran, self._running)
        memory.wait(self._leaving, slot.ran)
        if not slot.on_host:
            for name, target in slot.results(start, end).items():
                memory.download(target, blocks[name], self._leaving)
        memory.record(slot.done, self._leaving)

    def _stitch(self, slot: GpuSlot, tiles: int, logits: Block) -> None:
        _, h, w, _ = slot.input.shape
        blocks = slot.blocks
        counts, confidence, broken = (blocks["sums"].address + 8 * offset for offset in slot.sums_at(0, tiles))
        self._memory.stitch(
            self._running,
            logits_ptr=logits.address,
            dtype="fp32",
            layout="nchw",
            n=tiles,
            classes=self._network.classes,
            h=h,
            w=w,
            cores_ptr=blocks["cores"].address,
            ids_ptr=blocks["ids"].address,
            counts_ptr=counts,
            confidence_ptr=confidence,
            broken_ptr=broken,
            probabilities_ptr=blocks["probabilities"].address if slot.wants.probabilities else 0,
        )

    def _make_way(self, slot: GpuSlot, bare: bool, lack: str) -> bool:
        """Free what is not needed and halve the batch; at one tile, try once more on the `bare` device."""
        n, h, w, _ = slot.input.shape
        with self._memory.current():
            self._memory.synchronise()
            for other in self._slots:
                other.drop()
            self._network.drop()
            gc.collect()  # the error and its frames may hold one another
            self._memory.trim()
        tried = min(slot.room or n, n)
        if tried > 1:
            self._most = tried // 2
            self._report(f"{self.device} is out of memory with {tried} tiles in a batch; going on with {self._most}")
        elif bare:
            raise EngineError(
                f"{self.device} has not the memory for one tile of {w}x{h} pixels ({lack})",
                fix="use a smaller --tile, or --device cpu",
            )
        return bool(tried == 1)

    def wait(self, slot: Slot) -> None:
        assert isinstance(slot, GpuSlot)
        with self._memory.current():
            self._memory.synchronise(slot.done)

    def close(self) -> None:
        with contextlib.suppress(EngineError):  # a device that has failed frees nothing, and has said so before
            with self._memory.current():
                self._memory.synchronise()
            for slot in self._slots:
                if slot.done is not None:
                    slot.close()
            with self._memory.current():
                self._network.close()
                self._loading = self._running = self._leaving = None
        self._memory.close()
