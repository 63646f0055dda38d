"""A machine with a fake TensorRT and a fake GPU, and an empty cache: what the tests of TensorRT engines start from."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import fake_tensorrt

from histoseg_fast.cache import FOLDER_VARIABLE
from histoseg_fast.engines.base import Engine, Slot
from histoseg_fast.engines.trt import check, library, prepare
from histoseg_fast.engines.trt import gpu as gpu_module
from histoseg_fast.engines.trt.gpu import Gpu

H200, H100, A100 = Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA H100", (9, 0)), Gpu("NVIDIA A100", (8, 0))


class Machine:
    """Its TensorRT (`trt`) and GPU may be changed; `lines` is what was reported."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path):
        self._patch, self.folder, self.lines = monkeypatch, folder, []
        monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
        self.gpu = H200
        self.install("11.4.0.106")

    def install(self, version: str, gpu: Gpu | None = None) -> Any:
        """Change TensorRT, and the GPU if one is given."""
        self.gpu = gpu or self.gpu
        self.trt = fake_tensorrt(version, self.gpu.name)
        self._patch.setitem(sys.modules, "tensorrt", self.trt)
        for cached in (library.tensorrt, library.logger):
            cached.cache_clear()
        library.log.clear()
        for module in (prepare, gpu_module):
            self._patch.setattr(module, "current_gpu", lambda: self.gpu)
        self._patch.setattr(gpu_module, "gpu_at", lambda index: self.gpu)
        return self.trt

    def prepare(self, plan: Any, options: Any = None, **more: Any) -> prepare.Prepared:
        """`prepare`, its lines kept."""
        self.lines.clear()
        return prepare.prepare(plan, options, report=self.lines.append, **more)

    def run_engines(self, spoil: Callable[[np.ndarray], np.ndarray] = lambda logits: logits) -> None:
        """Engines run from now on: on the CPU, what they give goes through `spoil`."""
        self._patch.setattr(check, "open_prepared", lambda plan, prepared: FakeEngine(plan, spoil))
        self._patch.setattr(check, "SYNTHETIC_SIDE", 64)

    def entries(self) -> list[Path]:
        """Engines in the cache."""
        return sorted(self.folder.rglob("*.engine"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    yield Machine(monkeypatch, tmp_path / "cache")
    for cached in (library.tensorrt, library.logger):
        cached.cache_clear()


class FakeEngine(Engine):
    """Runs the plan on the CPU and spoils what it gives."""

    device, name = "cuda:0", "fake"

    def __init__(self, plan: Any, spoil: Callable[[np.ndarray], np.ndarray]):
        from histoseg_fast.engines import open_engine

        self._engine, self._spoil, self.precision = open_engine(plan, device="cpu", precision="fp32"), spoil, "fp16"

    def slots(self, count: int) -> list[Slot]:
        return self._engine.slots(count)

    def submit(self, slot: Slot) -> None:
        self._engine.submit(slot)

    def wait(self, slot: Slot) -> None:
        self._engine.wait(slot)
        slot.logits = self._spoil(slot.logits.copy())

    def close(self) -> None:
        self._engine.close()


def spoiled(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Sets one logit of class 1."""

    def spoil(logits: np.ndarray) -> np.ndarray:
        logits[0, 1, 5, 7] = value
        return logits

    return spoil
