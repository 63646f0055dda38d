"""A machine with fake GPUs, a fake pycuda and a fake TensorRT whose engines run on them."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_execution import install, rgb_as_logits
from trt_fixtures import Machine

from histoseg_fast import _core
from histoseg_fast.engines import Engine, devices, open_engine
from histoseg_fast.engines.trt import check, graph
from histoseg_fast.engines.trt import gpu as gpu_module
from histoseg_fast.engines.trt import memory as trt_memory
from histoseg_fast.errors import EngineError


def gpu_here() -> bool:
    """Whether this machine has a GPU of its own."""
    try:
        return gpu_module.gpu_count() > 0
    except EngineError:
        return False


def check_memory_is_given_back(run: Callable[[int], None], slack: int) -> None:
    """A real GPU has as much free memory after the fourth run as after the second, but for `slack` bytes."""
    import torch

    free = []
    for i in range(4):
        run(i)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert free[-1] >= free[1] - slack


class Gpus:
    """`start` makes the GPUs, `open` an engine on them; `lines` is what was reported."""

    def __init__(self, machine: Machine, monkeypatch: pytest.MonkeyPatch):
        self.machine, self._patch, self.lines = machine, monkeypatch, list[str]()

    def start(
        self,
        count: int = 1,
        memory: int = 1 << 30,
        seed: int = 0,
        network: Callable[[np.ndarray], np.ndarray] = rgb_as_logits,
    ) -> FakeCuda:
        """A machine with `count` GPUs of `memory` bytes, on which every engine computes `network`."""
        self.cuda, patch = FakeCuda(count, memory, seed), self._patch
        package: Any = types.ModuleType("pycuda")
        package.__spec__, package.driver = self.cuda.driver.__spec__, self.cuda.driver
        patch.setitem(sys.modules, "pycuda", package)
        patch.setitem(sys.modules, "pycuda.driver", self.cuda.driver)
        patch.setattr(trt_memory, "atexit", types.SimpleNamespace(register=lambda function: None))
        for module in (gpu_module, graph):
            patch.setattr(module, "driver", lambda: self.cuda.library)
        patch.setattr(_core, "cuda_stitch", self.cuda.stitch)
        patch.setattr(trt_memory.PycudaMemory, "kernels", True)
        patch.setattr(check, "SYNTHETIC_SIDE", 32)
        patch.delenv(devices.LIBRARY_VARIABLE, raising=False)
        self._forget()
        install(self.machine.trt, self.cuda, network)
        return self.cuda

    @property
    def trt(self) -> Any:
        """The fake tensorrt module."""
        return self.machine.trt

    def open(self, plan: Any, device: str = "cuda", **more: Any) -> Engine:
        """`open_engine`, its lines kept; what opening it did is forgotten."""
        engine = open_engine(plan, device=device, report=self.lines.append, **more)
        self.lines.clear()
        for gpu in self.cuda.gpus:
            gpu.calls.clear()
        return engine

    @staticmethod
    def _forget() -> None:
        for cached in (trt_memory._driver, trt_memory._primary_context):
            cached.cache_clear()


@pytest.fixture
def gpus(machine, monkeypatch):
    """Fake GPUs, to be started."""
    yield Gpus(machine, monkeypatch)
    Gpus._forget()
