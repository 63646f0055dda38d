"""The TensorRT engine: a plan's engine for this GPU on pycuda's context, streams, events and page-locked memory."""

from __future__ import annotations

from histoseg_fast.engines.gpu import GpuEngine, Report
from histoseg_fast.engines.trt.check import synthetic_check
from histoseg_fast.engines.trt.library import version
from histoseg_fast.engines.trt.memory import PycudaMemory, current_index
from histoseg_fast.engines.trt.options import DEFAULT_BATCH, BuildOptions
from histoseg_fast.engines.trt.prepare import Prepared, prepare
from histoseg_fast.engines.trt.runtime import TensorRTNetwork
from histoseg_fast.plan import Plan


class TensorRTEngine(GpuEngine):
    """Runs `prepared` on the GPU of `memory` (None: the one of the calling thread's context, or the first)."""

    def __init__(
        self,
        plan: Plan,
        prepared: Prepared,
        memory: PycudaMemory | None = None,
        report: Report = lambda line: None,
    ):
        memory = memory or PycudaMemory(current_index())
        network = TensorRTNetwork(prepared, memory, len(plan.palette.names), report)
        name = f"TensorRT {version()} on {prepared.info.gpu.name}"
        super().__init__(memory, network, name=name, precision=prepared.info.precision, report=report)


def open_tensorrt(plan: Plan, index: int, precision: str, *, tile: int, batch: int, report: Report) -> TensorRTEngine:
    """The engine of `plan` on GPU `index` for tiles of at most `tile` pixels, `batch` of them (0: a few) at once.

    It comes from the plan or the cache, or is built: minutes, once, and `report` says so. Raises EngineError.
    """
    memory = PycudaMemory(index)
    with memory.current():
        more = batch if batch > DEFAULT_BATCH else 0  # one engine for all small batches
        options = BuildOptions.of(plan, tile=tile, batch=more, precision=precision)
        prepared = prepare(plan, options, check=synthetic_check(plan, options), report=report)
    return TensorRTEngine(plan, prepared, memory, report)
