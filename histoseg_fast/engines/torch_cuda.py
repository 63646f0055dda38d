"""The PyTorch engine: for NVIDIA machines without TensorRT, and for benchmarks beside it.

The network is rebuilt from the manifest's architecture and the tensors in the plan's ONNX. In "fp16" the
normalisation and the last convolution are fp32, as in the TensorRT engine. On device "cpu", for tests, the same
classes run at once and one after the other.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from histoseg_fast import _core
from histoseg_fast.engines.gpu import GpuEngine, Network, Report, Shape
from histoseg_fast.engines.half_network import HalfNetwork
from histoseg_fast.engines.memory import Block, Memory, OutOfMemory, failure
from histoseg_fast.errors import EngineError, HistosegError
from histoseg_fast.models.network import rebuild
from histoseg_fast.plan import Plan

COMPILE_VARIABLE = "HISTOSEG_TORCH_COMPILE"
"""Set to 1: torch.compile in place of our kernels (`half_network`); minutes for every new shape, and not measured."""


class TorchMemory(Memory):
    """PyTorch's allocator, streams and events on "cuda:0", or on "cpu"."""

    def __init__(self, device: str):
        self.device = device
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        self._library: Any = torch.get_device_module(self._device)
        self.kernels = _core.cuda_built if self._cuda else True
        self._queues = self._cuda and _core.cuda_built
        """Whether the core queues copies and events: PyTorch lets go of the interpreter's lock for each of them, and to
        get it back beside many readers takes longer than all of them."""

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        chosen = torch.cuda.device(self._device) if self._cuda else contextlib.nullcontext()
        try:
            with chosen:
                yield
        except HistosegError:
            raise
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(" ".join(str(error).split())[:200]) from error
        except RuntimeError as error:
            raise failure(f"PyTorch failed on {self.device}", error) from error

    def pinned(self, size: int) -> np.ndarray:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda).numpy()
        except RuntimeError as error:
            reason = f"no {size >> 20} MiB of page-locked memory are to be had"
            raise EngineError(reason, fix="use a smaller --batch or --tile") from error

    def free_pinned(self, array: np.ndarray) -> None:
        """It is freed with the last reference to it."""

    def allocate(self, size: int) -> Block:
        tensor = torch.empty(size, dtype=torch.uint8, device=self._device)
        return Block(tensor.data_ptr(), size, tensor)

    def free(self, block: Block) -> None:
        """It is freed with the last reference to it."""

    def trim(self) -> None:
        if self._cuda:
            torch.cuda.empty_cache()

    def stream(self) -> Any:
        return self._library.Stream()

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream if self._cuda else 0

    def event(self) -> Any:
        if not self._cuda:
            return self._library.Event()
        event = self._library.Event(blocking=True)
        event.record()  # it is made now, and has its handle
        return event

    def record(self, event: Any, stream: Any) -> None:
        if self._queues:
            _core.cuda_record(event.cuda_event, stream.cuda_stream)
        else:
            event.record(stream)

    def wait(self, stream: Any, event: Any) -> None:
        if self._queues:
            _core.cuda_wait(stream.cuda_stream, event.cuda_event)
        else:
            stream.wait_event(event)

    def synchronise(self, event: Any = None) -> None:
        if event is None:
            self._library.synchronize()
        else:
            event.synchronize()

    def upload(self, target: Block, source: np.ndarray, stream: Any) -> None:
        if self._queues:
            return _core.cuda_copy(target.address, _address(source), source.nbytes, stream.cuda_stream)
        bytes_ = torch.from_numpy(source.reshape(-1).view(np.uint8))
        with self._library.stream(stream):
            target.holder[: len(bytes_)].copy_(bytes_, non_blocking=True)

    def download(self, target: np.ndarray, source: Block, stream: Any) -> None:
        if self._queues:
            return _core.cuda_copy(_address(target), source.address, target.nbytes, stream.cuda_stream)
        bytes_ = torch.from_numpy(target.reshape(-1).view(np.uint8))
        with self._library.stream(stream):
            bytes_.copy_(source.holder[: len(bytes_)], non_blocking=True)

    def copy(self, target: torch.Tensor, source: Block, stream: Any) -> None:
        """Queue a copy of the start of `source` to all of `target`, uint8; `stream` is current."""
        if self._queues:
            return _core.cuda_copy(target.data_ptr(), source.address, target.numel(), stream.cuda_stream)
        target.view(-1).copy_(source.holder[: target.numel()], non_blocking=True)

    def stitch(self, stream: Any, **arguments: Any) -> None:
        if self._cuda:
            super().stitch(stream, **arguments)
        else:
            _core.emulate_stitch(**arguments, stream=0)

    def close(self) -> None:
        """PyTorch keeps the device."""


class TorchNetwork(Network):
    """The network of `plan` in "fp16" or "fp32" on the device of `memory`, with its channels last."""

    _memory: TorchMemory

    def __init__(self, plan: Plan, memory: TorchMemory, precision: str, report: Report):
        super().__init__(memory, len(plan.palette.names), report)
        self._device, self._precision = torch.device(memory.device), precision
        self.graphs = self._device.type == "cuda"
        self._library: Any = torch.get_device_module(self._device)
        module: Any = rebuild(plan)
        compiled = os.environ.get(COMPILE_VARIABLE) == "1"
        if precision == "fp16":
            module = HalfNetwork(module, self._device, memory.kernels and not compiled)
        else:
            module = module.to(self._device).to(memory_format=torch.channels_last)
        self._module: Any = torch.compile(module, dynamic=False) if compiled else module
        self._logits: torch.Tensor | None = None
        self._pool: Any = None
        self._library.synchronize()  # the weights are there before another stream reads them

    def most_tiles(self, height: int, width: int) -> int:
        return 1 << 30

    def compute(self, rgb: Block, shape: Shape, stream: Any) -> Block:
        with self._library.stream(stream), self._settings():
            self._logits = self._forward(_images(rgb, shape))
        return _block(self._logits)

    def capture(self, shape: Shape, stream: Any) -> Callable[[Block], Block]:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        static = torch.zeros((*shape, 3), dtype=torch.uint8, device=self._device)
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())  # which has made `static`
        with self._settings():
            with torch.cuda.stream(stream):
                self._forward(static)  # what is made once for a shape is not captured
            # Other threads allocate meanwhile; this one does not wait for them.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(static)

        def replay(rgb: Block) -> Block:
            with torch.cuda.stream(stream):
                self._memory.copy(static, rgb, stream)
                graph.replay()
            return _block(logits)

        return replay

    def _forward(self, rgb: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self._module(rgb)
            return logits.contiguous()

    def _settings(self) -> Any:
        """cuDNN's settings for a run: "fp32" means it, and a shape gives the same bits every time."""
        exact = self._precision == "fp32"
        return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=not exact)

    def drop(self) -> None:
        super().drop()
        self._logits = self._pool = None

    def close(self) -> None:
        self.drop()
        self._module = None


def _address(array: np.ndarray) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _images(rgb: Block, shape: Shape) -> torch.Tensor:
    n, h, w = shape
    images: torch.Tensor = rgb.holder[: n * h * w * 3].view(n, h, w, 3)
    return images


def _block(logits: torch.Tensor) -> Block:
    held = logits.view(-1).view(torch.uint8)
    return Block(held.data_ptr(), len(held), held)


class TorchEngine(GpuEngine):
    """Runs a plan with PyTorch on `device` in "fp16" or "fp32"."""

    def __init__(self, plan: Plan, device: str, precision: str, report: Report = lambda line: None):
        memory = TorchMemory(device)
        with memory.current():
            network = TorchNetwork(plan, memory, precision, report)
        where = f" on {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
        super().__init__(
            memory, network, name=f"PyTorch {torch.__version__}{where}", precision=precision, report=report
        )
