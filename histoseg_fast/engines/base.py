"""The engine interface: batch slots go in full of tiles and come out with logits."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np


class Slot:
    """One batch of the ring: an input buffer that is reused, and the logits of the last run.

    `input` is uint8 (n, h, w, 3), the shape given to the last `reshape`; `logits` is float32 (n, C, h, w),
    valid from `Engine.wait` until the slot is submitted or reshaped again.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)
        self.input = self._buffer.reshape(0, 0, 0, 3)
        self.logits: np.ndarray | None = None

    def reshape(self, n: int, h: int, w: int) -> np.ndarray:
        """Make `input` (n, h, w, 3), its content undefined, and return it; the memory grows when it must."""
        if self.input.shape != (n, h, w, 3):
            size = n * h * w * 3
            if size > self._buffer.size:
                self._buffer = self.allocate(size)
            self.input = self._buffer[:size].reshape(n, h, w, 3)
        self.logits = None
        return self.input

    def allocate(self, size: int) -> np.ndarray:
        """`size` bytes of input memory, uint8 (size,); engines with page-locked memory override this."""
        return np.empty(size, np.uint8)


class Engine(ABC):
    """A compiled network on one device. It knows slots and nothing of files; threads may share it.

    device : what it runs on, for people ("cpu", "cuda:0"). precision : "fp32", "bf16", ... as it really runs.
    name : the library and its version.
    """

    device: str
    precision: str
    name: str

    @abstractmethod
    def slots(self, count: int) -> list[Slot]:
        """A ring of `count` empty slots of this engine."""

    @abstractmethod
    def submit(self, slot: Slot) -> None:
        """Start on `slot.input` and return at once. Raises EngineError if the device refuses the batch."""

    @abstractmethod
    def wait(self, slot: Slot) -> np.ndarray:
        """Wait until `slot` is done; set and return its logits. Raises EngineError if the run failed."""

    @abstractmethod
    def close(self) -> None:
        """Free the device; the engine and its slots must not be used afterwards."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
