"""What the GPU engines need of CUDA: memory, streams and events of one device; pycuda or PyTorch stands behind it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from histoseg_fast import _core
from histoseg_fast.errors import EngineError

_NO_MEMORY = re.compile(r"out ?of ?memory|alloc_?failed|MemoryAllocation", re.IGNORECASE)
_MAX_REASON = 300


class OutOfMemory(EngineError):
    """The device has no room for a batch; a smaller one may fit."""


def failure(what: str, reason: object) -> EngineError:
    """The error for a failed call, from the library's own words: OutOfMemory where they say so."""
    text = " ".join(str(reason).split())[:_MAX_REASON]
    kind = OutOfMemory if _NO_MEMORY.search(text) else EngineError
    return kind(f"{what} ({text})")


@dataclass(frozen=True)
class Block:
    """`size` bytes of the device's memory at `address`; `holder` is what keeps them."""

    address: int
    size: int
    holder: Any


class Memory(ABC):
    """One GPU. Every call but `current` is made inside `current`; streams and events are the library's own objects.

    device : "cuda:0". kernels : whether `stitch` can be called here.
    """

    device: str
    kernels: bool

    @abstractmethod
    def current(self) -> AbstractContextManager[None]:
        """Make this GPU the calling thread's. The library's errors leave as EngineError or OutOfMemory."""

    @abstractmethod
    def pinned(self, size: int) -> np.ndarray:
        """`size` bytes of page-locked host memory, uint8 (size,)."""

    @abstractmethod
    def free_pinned(self, array: np.ndarray) -> None:
        """Give what `pinned` gave back; nothing may be using it."""

    @abstractmethod
    def allocate(self, size: int) -> Block:
        """`size` bytes of device memory, aligned to 256. Raises OutOfMemory."""

    @abstractmethod
    def free(self, block: Block) -> None:
        """Give a block back; nothing may be using it."""

    @abstractmethod
    def trim(self) -> None:
        """Give memory that the library keeps for later back to the device."""

    @abstractmethod
    def stream(self) -> Any:
        """A new stream."""

    @abstractmethod
    def handle(self, stream: Any) -> int:
        """The cudaStream_t of a stream."""

    @abstractmethod
    def event(self) -> Any:
        """A new event; waiting for it before it was recorded is no wait at all."""

    @abstractmethod
    def record(self, event: Any, stream: Any) -> None:
        """Let `event` happen once all that is queued on `stream` now is done."""

    @abstractmethod
    def wait(self, stream: Any, event: Any) -> None:
        """Let what is queued on `stream` from now on wait for `event` as it was last recorded."""

    @abstractmethod
    def synchronise(self, event: Any = None) -> None:
        """Block this thread, not its processor, until `event` has happened (None: until the device is idle)."""

    @abstractmethod
    def upload(self, target: Block, source: np.ndarray, stream: Any) -> None:
        """Queue a copy of page-locked, contiguous `source` to the start of `target`."""

    @abstractmethod
    def download(self, target: np.ndarray, source: Block, stream: Any) -> None:
        """Queue a copy of the start of `source` to page-locked, contiguous `target`."""

    def stitch(self, stream: Any, **arguments: Any) -> None:
        """Queue `_core.cuda_stitch`."""
        try:
            _core.cuda_stitch(**arguments, stream=self.handle(stream))
        except RuntimeError as error:
            raise failure(f"{self.device}: stitching failed", error) from error

    @abstractmethod
    def close(self) -> None:
        """Let go of the device, outside `current`; everything else was freed."""
