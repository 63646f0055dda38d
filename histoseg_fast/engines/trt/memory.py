"""CUDA's memory, streams and events by pycuda, in the device's primary context, which PyTorch and the kernels share."""

from __future__ import annotations

import atexit
import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from histoseg_fast import _core
from histoseg_fast.engines.memory import Block, Memory, failure
from histoseg_fast.errors import EngineError

NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: other libraries' default stream does not hold ours up."""


@functools.cache
def _driver() -> Any:
    try:
        import pycuda.driver as driver

        driver.init()
    except Exception as error:  # ImportError, or a class of its own
        raise EngineError(f"pycuda cannot be used ({error})", fix="pip install 'histoseg-fast[tensorrt]'") from error
    return driver


def check_pycuda() -> None:
    """Raise EngineError where pycuda is missing or does not start."""
    _driver()


@functools.cache
def _primary_context(index: int) -> Any:
    """The primary context of GPU `index`. It is kept until the process ends: making it anew takes long."""
    context = _driver().Device(index).retain_primary_context()
    atexit.register(context.detach)  # its destructor would take it for an ordinary context
    return context


def current_index() -> int:
    """The GPU of the calling thread's context, or the first one."""
    driver = _driver()
    try:
        mine = driver.Context.get_device()
    except driver.Error:
        return 0
    return next(i for i in range(driver.Device.count()) if driver.Device(i) == mine)


class PycudaMemory(Memory):
    """GPU `index`. pycuda frees nothing outside a context, so that everything is freed by hand in `current`."""

    kernels = _core.cuda_built

    def __init__(self, index: int):
        self.device = f"cuda:{index}"
        try:
            self._cuda = _driver()
            self._context = _primary_context(index)
        except EngineError:
            raise
        except Exception as error:  # pycuda's own classes, which cannot be named where it is not to be had
            raise failure(f"{self.device} does not start", error) from error

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        try:
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()
        except self._cuda.Error as error:
            raise failure(f"CUDA failed on {self.device}", error) from error

    def pinned(self, size: int) -> np.ndarray:
        try:
            array: np.ndarray = self._cuda.pagelocked_empty(size, np.uint8)
            return array
        except self._cuda.MemoryError as error:
            reason = f"no {size >> 20} MiB of page-locked memory are to be had"
            raise EngineError(reason, fix="use a smaller --batch or --tile") from error

    def free_pinned(self, array: np.ndarray) -> None:
        array.base.free()  # type: ignore[union-attr]

    def allocate(self, size: int) -> Block:
        held = self._cuda.mem_alloc(size)
        return Block(int(held), size, held)

    def free(self, block: Block) -> None:
        block.holder.free()

    def trim(self) -> None:
        """pycuda keeps nothing for later."""

    def stream(self) -> Any:
        return self._cuda.Stream(NON_BLOCKING)

    def handle(self, stream: Any) -> int:
        return int(stream.handle)

    def event(self) -> Any:
        flags = self._cuda.event_flags
        return self._cuda.Event(flags.BLOCKING_SYNC | flags.DISABLE_TIMING)

    def record(self, event: Any, stream: Any) -> None:
        event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        stream.wait_for_event(event)

    def synchronise(self, event: Any = None) -> None:
        if event is None:
            self._cuda.Context.synchronize()
        else:
            event.synchronize()

    def upload(self, target: Block, source: np.ndarray, stream: Any) -> None:
        self._cuda.memcpy_htod_async(target.address, source, stream)

    def download(self, target: np.ndarray, source: Block, stream: Any) -> None:
        self._cuda.memcpy_dtoh_async(target, source.address, stream)

    def copy(self, target: Block, source: Block, size: int, stream: Any) -> None:
        """Queue a copy of the first `size` bytes within the device."""
        self._cuda.memcpy_dtod_async(target.address, source.address, size, stream)

    def close(self) -> None:
        """The context stays for the next engine of this process."""
