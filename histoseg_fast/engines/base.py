"""The engine interface: batch slots go in full of tiles and come out with classes, or with logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from histoseg_fast import _core
from histoseg_fast.tiling import Core


@dataclass(frozen=True)
class Wants:
    """What a batch is run for, besides classes and their sums: 8-bit `probabilities` and the `logits` themselves."""

    probabilities: bool = False
    logits: bool = False


CLASSES = Wants()
"""Nothing but classes and their sums."""


class Slot:
    """One batch of the ring: an input buffer that is reused, and what the last run gave.

    `input` is uint8 (n, h, w, 3), the shape given to the last `reshape`. `cores` is int32 (n, 4), the part of each
    tile that counts (top, left, bottom, right): nothing of it until it is set. Both, and `wants`, are read by
    `Engine.submit`. From `Engine.wait` until the slot is submitted or reshaped again `stitch` may be called, and
    `logits`, if they were wanted, are float32 (n, C, h, w).
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self.input: np.ndarray = self._buffer.reshape(0, 0, 0, 3)
        self.cores: np.ndarray = np.empty((0, 4), np.int32)
        self.wants = CLASSES
        self.logits: np.ndarray | None = None

    def reshape(self, n: int, h: int, w: int) -> np.ndarray:
        """Make `input` (n, h, w, 3), its content undefined, and return it; the memory grows when it must."""
        if self.input.shape != (n, h, w, 3):
            size = n * h * w * 3
            places = -(-size // self.cores.itemsize) * self.cores.itemsize
            if places + n * 4 * self.cores.itemsize > self._buffer.size:
                self._buffer = self.allocate(places + n * 4 * self.cores.itemsize)
            self.input = self._buffer[:size].reshape(n, h, w, 3)
            self.cores = self._buffer[places:][: n * 4 * self.cores.itemsize].view(np.int32).reshape(n, 4)
        self.cores[...] = 0
        self.logits = None
        return self.input

    def shorten(self, n: int) -> None:
        """Leave all but the first `n` tiles out, until the next `reshape`."""
        self.input, self.cores = self.input[:n], self.cores[:n]

    def allocate(self, size: int) -> np.ndarray:
        """`size` bytes of input memory, uint8 (size,); engines with page-locked memory override this."""
        return np.empty(size, np.uint8)

    def stitch(
        self,
        index: int,
        core: Core,
        classes: np.ndarray,
        counts: np.ndarray,
        confidence: np.ndarray,
        probabilities: np.ndarray | None = None,
    ) -> int:
        """Write the classes of tile `index`, cropped to `core`, and add to the sums, as `_core.stitch` does.

        `core` is the tile's own in `cores`. Returns how many of its pixels have a logit that is not finite.
        """
        return _core.stitch(self.logits_of(index), core, classes, counts, confidence, probabilities)

    def logits_of(self, index: int) -> np.ndarray:
        """The logits of tile `index` as `stitch` reads them, in either layout that `_core.stitch` takes."""
        assert self.logits is not None
        logits: np.ndarray = self.logits[index]
        return logits

    def close(self) -> None:
        """Free what the slot holds beyond ordinary memory; `Engine.close` does it, too."""


class Engine(ABC):
    """A compiled network on one device. It knows slots and nothing of files; threads may share it.

    device : what it runs on, for people ("cpu", "cuda:0"). precision : "fp32", "bf16", ... as it really runs.
    name : the library and its version. depth : batch slots that keep it busy; by default one that is filled, one that
    runs and one that is stitched. batch : tiles in a batch that suit it.
    """

    device: str
    precision: str
    name: str
    depth: int = 3
    batch: int = 1

    @abstractmethod
    def slots(self, count: int) -> list[Slot]:
        """A ring of `count` empty slots of this engine."""

    @abstractmethod
    def submit(self, slot: Slot) -> None:
        """Start on `slot.input` and return at once. Raises EngineError if the device refuses the batch."""

    @abstractmethod
    def wait(self, slot: Slot) -> None:
        """Wait until `slot` is done and what it wants is there. Raises EngineError if the run failed."""

    @abstractmethod
    def close(self) -> None:
        """Free the device; the engine and its slots must not be used afterwards."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
