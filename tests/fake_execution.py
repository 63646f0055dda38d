"""TensorRT's execution contexts on the fake GPUs: `install` lets the engines of `fake_tensorrt` run there.

A context keeps TensorRT's rules: profile before shape, shape before memory, addresses before a run, no shape beyond
its profile, scratch memory as large as it asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from fake_cuda import POISON, FakeCuda

from histoseg_fast.engines.trt import library

CLASSES = 3


def rgb_as_logits(rgb: np.ndarray) -> np.ndarray:
    """float32 (n, 3, h, w) of uint8 (n, h, w, 3)."""
    return np.ascontiguousarray(rgb.transpose(0, 3, 1, 2)).astype(np.float32)


def install(trt: Any, cuda: FakeCuda, network: Callable[[np.ndarray], np.ndarray] = rgb_as_logits) -> None:
    """Let `trt` run engines that compute `network`. Names in its `faults`: "no context", "no enqueue"."""
    trt.scratch = 64

    def create_context(engine: Any, strategy: Any) -> Context | None:
        if "no context" in trt.faults:
            trt.say("Error Code 2: OutOfMemory (no further information)")
            return None
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(trt, cuda, engine.content["profiles"], network, cuda.gpu)

    trt.create_context = create_context
    trt.say = lambda text: library.logger().log(trt.ILogger.Severity.ERROR, text)


class Context:
    """An IExecutionContext. It asks for `trt.scratch` bytes a pixel."""

    def __init__(self, trt: Any, cuda: FakeCuda, profiles: Any, network: Callable[[np.ndarray], np.ndarray], gpu: Any):
        self._trt, self._cuda, self._gpu, self._profiles, self._network = trt, cuda, gpu, profiles, network
        self._profile, self._shape, self._wanted, self._scratch = -1, (0, 0, 0, 0), 0, (0, 0)
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._cuda.of_stream(stream_handle)
        self._profile, self._wanted = profile_index, 0
        return 0 <= profile_index < len(self._profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "rgb" and self._profile >= 0
        low, _, high = self._profiles[self._profile]
        self._shape, self._wanted = shape, 0
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def update_device_memory_size_for_shapes(self) -> int:
        n, h, w, _ = self._shape
        self._wanted = self._trt.scratch * n * h * w
        return self._wanted

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._wanted and size >= self._wanted and memory % 256 == 0
        self._scratch = memory, self._wanted

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in ("rgb", "logits") and memory % 256 == 0
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._wanted and self._cuda.of_stream(stream_handle) is self._gpu
        self._gpu.calls["enqueue"] += 1
        if "no enqueue" in self._trt.faults:
            self._trt.say("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (an illegal memory access)")
            return False
        gpu, network, shape, scratch = self._gpu, self._network, self._shape, self._scratch
        source, target = self._addresses["rgb"], self._addresses["logits"]

        def work() -> None:
            gpu.find(*scratch)[...] = POISON
            n, h, w, _ = shape
            rgb = gpu.find(source, n * h * w * 3).reshape(shape)
            logits = network(rgb)
            assert logits.dtype == np.float32 and logits.shape == (n, CLASSES, h, w)
            gpu.find(target, logits.nbytes)[...] = logits.reshape(-1).view(np.uint8)

        gpu.queue(stream_handle, work)
        return True
