"""GPUs of NumPy behind the interfaces of pycuda and of the CUDA driver, for machines without one.

Nothing runs when it is queued. When a thread synchronises, the heads of the streams run in a random order that CUDA
would allow, so that an event which nobody waits for is found out. Memory is poisoned when it is allocated and when it
is freed; what touches memory that is not there, host memory that is not page-locked, or a GPU whose context is not
the calling thread's, fails the test.
"""

from __future__ import annotations

import builtins
import ctypes
import enum
import importlib.machinery
import itertools
import random
import threading
import types
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import numpy as np

from histoseg_fast import _core

POISON = 0xA5
ALIGNMENT = 256


class Error(Exception):
    pass


class MemoryError(Error, builtins.MemoryError):
    pass


class LogicError(Error):
    pass


class Region:
    """Memory of a GPU (or page-locked memory of its host), poisoned."""

    def __init__(self, size: int):
        self._whole = np.full(size + ALIGNMENT, POISON, np.uint8)
        self.bytes = self._whole[-self._whole.ctypes.data % ALIGNMENT :][:size]
        self.address, self.size = self.bytes.ctypes.data, size


class FakeGpu:
    """One GPU with `memory` bytes. `faults` counts down calls by name: the one that reaches 0 fails."""

    def __init__(self, index: int, memory: int, seed: int):
        self.index, self.memory, self.faults = index, memory, Counter[str]()
        self.device: dict[int, Region] = {}
        self.pinned: dict[int, Region] = {}
        self.graveyard: list[Region] = []  # so that no address comes again
        self.queues: dict[int, deque[tuple[str, Any]]] = {}
        self.captures: dict[int, list[Callable[[], None]]] = {}
        self.done: set[int] = set()
        self.calls, self.dead = Counter[str](), ""
        self.lock, self.random, self.bias = threading.RLock(), random.Random(seed), 0.0

    def call(self, name: str) -> None:
        """Count a call; raise what is set up for it."""
        self.calls[name] += 1
        if self.faults[name] > 0:
            self.faults[name] -= 1
            if self.faults[name] == 0:
                raise MemoryError(f"{name} failed: out of memory")
        if self.dead:
            raise LogicError(f"{name} failed: {self.dead}")

    def find(self, address: int, size: int, pinned: bool = False) -> np.ndarray:
        """The bytes at an address, which must lie in one live allocation."""
        for region in (self.pinned if pinned else self.device).values():
            if region.address <= address and address + size <= region.address + region.size:
                start = address - region.address
                return region.bytes[start : start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are not {'page-locked' if pinned else 'on the device'}")

    def allocate(self, size: int, pinned: bool) -> Region:
        with self.lock:
            self.call("pagelocked_empty" if pinned else "mem_alloc")
            assert not (self.captures and not pinned), "allocation while this thread captures"
            if not pinned and size + sum(region.size for region in self.device.values()) > self.memory:
                raise MemoryError("cuMemAlloc failed: out of memory")
            region = Region(size)
            (self.pinned if pinned else self.device)[region.address] = region
            return region

    def free(self, region: Region, pinned: bool) -> None:
        with self.lock:
            del (self.pinned if pinned else self.device)[region.address]
            region.bytes[...] = POISON
            self.graveyard.append(region)

    def queue(self, stream: int, work: Callable[[], None]) -> None:
        with self.lock:
            if stream in self.captures:
                self.captures[stream].append(work)
            else:
                self.queues[stream].append(("work", work))

    def synchronise(self, token: int | None = None) -> None:
        """Run until event `token` has happened (None: until nothing is left)."""
        with self.lock:
            while token not in self.done:
                ready = [q for q in self.queues.values() if q and (q[0][0] != "wait" or q[0][1] in self.done)]
                if not ready:
                    assert token is None and not any(self.queues.values()), "the streams wait for each other"
                    return
                if self.random.random() < 0.1:  # a stream that is behind stays behind for a while
                    self.bias = self.random.random()
                kind, what = ready[int(self.bias * len(ready))].popleft()
                if kind == "work" and not self.dead:
                    what()
                elif kind == "record":
                    self.done.add(what)
            self.call("synchronize")


class FakeCuda:
    """The GPUs of a machine; `driver` passes for pycuda.driver, `library` for the driver's own (by ctypes)."""

    def __init__(self, gpus: int = 1, memory: int = 1 << 30, seed: int = 0):
        self.gpus = [FakeGpu(i, memory, seed + i) for i in range(gpus)]
        self.numbers = itertools.count(1 << 20)
        self.threads = threading.local()
        self.driver = _pycuda(self)
        self.library = FakeLibrary(self)

    @property
    def gpu(self) -> FakeGpu:
        """The GPU of the calling thread's context."""
        stack = self.stack
        assert stack, "no context is current in this thread"
        return stack[-1].gpu

    @property
    def stack(self) -> list[Any]:
        if not hasattr(self.threads, "stack"):
            self.threads.stack = []
        return self.threads.stack

    def of_stream(self, handle: int) -> FakeGpu:
        """The current GPU, whose stream this must be."""
        assert handle in self.gpu.queues, "a stream of another GPU, or none at all"
        return self.gpu

    def stitch(self, stream: int, **arguments: Any) -> None:
        """In the place of `_core.cuda_stitch`."""
        gpu = self.of_stream(stream)
        n, classes, pixels = arguments["n"], arguments["classes"], arguments["h"] * arguments["w"]
        sizes = {"logits": 4 * n * classes * pixels, "cores": 16 * n, "ids": n * pixels, "broken": 8 * n}
        sizes |= {"counts": 8 * n * classes, "confidence": 8 * n * classes, "probabilities": n * classes * pixels}

        def work() -> None:
            for name, size in sizes.items():
                if address := arguments[f"{name}_ptr"]:
                    gpu.find(address, size)
            _core.emulate_stitch(**arguments, stream=0)

        gpu.call("stitch")
        gpu.queue(stream, work)

    def check_nothing_left(self) -> None:
        """After an engine is closed."""
        for gpu in self.gpus:
            assert not gpu.device and not gpu.pinned
            assert not any(gpu.queues.values())


class FakeLibrary:
    """What `engines.trt.graph` calls of libcuda."""

    def __init__(self, cuda: FakeCuda):
        self._cuda, self._objects = cuda, dict[int, list[Callable[[], None]]]()

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self._cuda.gpus)
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"out of memory" if code == 2 else b"operation not permitted when stream is capturing"
        return 0

    def _try(self, gpu: FakeGpu, name: str) -> int:
        gpu.calls[name] += 1
        if gpu.faults[name] > 0:
            gpu.faults[name] -= 1
            return {0: 900}.get(gpu.faults[name], 0)
        return 0

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:
        assert mode == 1
        gpu = self._cuda.of_stream(stream.value)
        if code := self._try(gpu, "begin_capture"):
            return code
        gpu.captures[stream.value] = []
        return 0

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:
        gpu = self._cuda.of_stream(stream.value)
        recorded = gpu.captures.pop(stream.value)
        if code := self._try(gpu, "end_capture"):
            return code
        graph._obj.value = next(self._cuda.numbers)
        self._objects[graph._obj.value] = recorded
        return 0

    def cuGraphInstantiateWithFlags(self, made: Any, graph: ctypes.c_void_p, flags: Any) -> int:
        made._obj.value = next(self._cuda.numbers)
        self._objects[made._obj.value] = self._objects[graph.value]
        return self._try(self._cuda.gpu, "instantiate")

    def cuGraphLaunch(self, graph: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:
        gpu = self._cuda.of_stream(stream.value)
        gpu.calls["launch"] += 1
        for work in self._objects[graph.value]:
            gpu.queue(stream.value, work)
        return 0

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:
        del self._objects[graph.value]
        return 0

    cuGraphExecDestroy = cuGraphDestroy

    @property
    def graphs(self) -> int:
        """How many are alive."""
        return len(self._objects)


def _pycuda(cuda: FakeCuda) -> Any:
    """A module that passes for pycuda.driver."""
    made: Any = types.ModuleType("pycuda.driver")
    made.__spec__ = importlib.machinery.ModuleSpec("pycuda.driver", None)
    made.Error, made.MemoryError, made.LogicError = Error, MemoryError, LogicError
    made.event_flags = enum.IntFlag("event_flags", {"BLOCKING_SYNC": 1, "DISABLE_TIMING": 2})
    made.init = lambda flags=0: None
    for name, value in (*_contexts(cuda).items(), *_queues(cuda).items(), *_memory(cuda).items()):
        setattr(made, name, value)
    return made


def _contexts(cuda: FakeCuda) -> dict[str, Any]:
    class Device:
        def __init__(self, index: int):
            if not 0 <= index < len(cuda.gpus):
                raise LogicError("cuDeviceGet failed: invalid device ordinal")
            self.index = index

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Device) and self.index == other.index

        @staticmethod
        def count() -> int:
            return len(cuda.gpus)

        def retain_primary_context(self) -> Context:
            return Context(cuda.gpus[self.index])

    class Context:
        def __init__(self, gpu: FakeGpu):
            self.gpu = gpu

        def push(self) -> None:
            self.gpu.call("push")
            cuda.stack.append(self)

        @staticmethod
        def pop() -> None:
            cuda.stack.pop()

        def detach(self) -> None:
            pass

        @staticmethod
        def get_device() -> Device:
            if not cuda.stack:
                raise LogicError("cuCtxGetDevice failed: invalid device context")
            return Device(cuda.gpu.index)

        @staticmethod
        def synchronize() -> None:
            cuda.gpu.synchronise()

    return {"Device": Device, "Context": Context}


def _queues(cuda: FakeCuda) -> dict[str, Any]:
    class Stream:
        def __init__(self, flags: int = 0):
            self.handle = next(cuda.numbers)
            cuda.gpu.queues[self.handle] = deque()

        def wait_for_event(self, evt: Event) -> None:
            gpu = cuda.of_stream(self.handle)
            with gpu.lock:
                if evt.token is not None:
                    gpu.queues[self.handle].append(("wait", evt.token))

    class Event:
        def __init__(self, flags: int = 0):
            self.gpu, self.token = cuda.gpu, None

        def record(self, stream: Stream) -> Event:
            gpu = cuda.of_stream(stream.handle)
            assert gpu is self.gpu
            with gpu.lock:
                self.token = next(cuda.numbers)
                gpu.queues[stream.handle].append(("record", self.token))
            return self

        def synchronize(self) -> Event:
            assert cuda.gpu is self.gpu
            cuda.gpu.synchronise(self.token)
            return self

    return {"Stream": Stream, "Event": Event}


def _memory(cuda: FakeCuda) -> dict[str, Any]:
    class DeviceAllocation:
        def __init__(self, size: int):
            self.gpu, self.region = cuda.gpu, cuda.gpu.allocate(size, False)

        def __int__(self) -> int:
            return self.region.address

        def free(self) -> None:
            assert cuda.gpu is self.gpu
            self.gpu.free(self.region, False)

    class PagelockedHostAllocation:
        def __init__(self, size: int):
            self.gpu, self.region = cuda.gpu, cuda.gpu.allocate(size, True)
            self.__array_interface__ = self.region.bytes.__array_interface__

        def free(self) -> None:
            assert cuda.gpu is self.gpu
            self.gpu.free(self.region, True)

    def pagelocked_empty(shape: int, dtype: Any, order: str = "C", mem_flags: int = 0) -> np.ndarray:
        assert dtype == np.uint8
        return np.asarray(PagelockedHostAllocation(shape))

    def host(gpu: FakeGpu, array: np.ndarray) -> np.ndarray:
        assert array.flags.c_contiguous
        return gpu.find(array.ctypes.data, array.nbytes, pinned=True)

    def copy(stream: Any, to: Callable[[FakeGpu], np.ndarray], source: Callable[[FakeGpu], np.ndarray]) -> None:
        gpu = cuda.of_stream(stream.handle)
        gpu.call("memcpy")
        gpu.queue(stream.handle, lambda: np.copyto(to(gpu), source(gpu)))

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Any = None) -> None:
        copy(stream, lambda gpu: gpu.find(dest, src.nbytes), lambda gpu: host(gpu, src))

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Any = None) -> None:
        copy(stream, lambda gpu: host(gpu, dest), lambda gpu: gpu.find(src, dest.nbytes))

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Any = None) -> None:
        copy(stream, lambda gpu: gpu.find(dest, size), lambda gpu: gpu.find(src, size))

    return {
        "mem_alloc": DeviceAllocation,
        "pagelocked_empty": pagelocked_empty,
        "memcpy_htod_async": memcpy_htod_async,
        "memcpy_dtoh_async": memcpy_dtoh_async,
        "memcpy_dtod_async": memcpy_dtod_async,
    }
