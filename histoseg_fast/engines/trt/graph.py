"""CUDA graphs over the driver itself: pycuda has none."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

from histoseg_fast.engines.memory import failure
from histoseg_fast.engines.trt.gpu import driver

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile


class Graph:
    """What was queued on a stream inside `capture`, to be launched as one."""

    def __init__(self) -> None:
        self._exec = ctypes.c_void_p()

    @contextlib.contextmanager
    def capture(self, stream: int) -> Iterator[None]:
        """Record what this thread queues on the stream of this handle instead of running it. Raises EngineError."""
        graph = ctypes.c_void_p()
        _call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)
        try:
            yield
        except BaseException:
            with contextlib.suppress(Exception):  # leave capture mode; the first error is the one to tell
                _call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
                _call("cuGraphDestroy", graph)
            raise
        _call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            _call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, ctypes.c_ulonglong(0))
        finally:
            _call("cuGraphDestroy", graph)

    def launch(self, stream: int) -> None:
        """Queue the graph on a stream. Raises EngineError."""
        _call("cuGraphLaunch", self._exec, ctypes.c_void_p(stream))

    def close(self) -> None:
        """Free it; it must not be running."""
        if self._exec:
            _call("cuGraphExecDestroy", self._exec)
            self._exec = ctypes.c_void_p()


def _call(name: str, *arguments: Any) -> None:
    if code := getattr(driver(), name)(*arguments):
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise failure(f"{name} failed", (text.value or b"").decode(errors="replace") or f"CUDA error {code}")
