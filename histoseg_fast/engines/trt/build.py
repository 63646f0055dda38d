"""ONNX to engine: one code path for TensorRT 10.13 to 11.x, in which the precision lies in the graph.

No GPU was at hand when this was written: the calls are checked against the real bindings of both versions, their
order and their failures against a fake.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from histoseg_fast.engines.trt.layers import TypedModel, check_precision
from histoseg_fast.engines.trt.library import log, logger, tensorrt
from histoseg_fast.engines.trt.options import HARDWARE, BuildOptions
from histoseg_fast.errors import EngineError, PlanError

if TYPE_CHECKING:
    import tensorrt as trt

INPUT = "rgb"
GIB = 1 << 30

Progress = Callable[[str, float], None]
"""Called with the phase and its share done, 0 to 1, from TensorRT's threads."""


def build_engine(
    model: TypedModel, options: BuildOptions, *, timing: bytes = b"", progress: Progress = lambda phase, share: None
) -> tuple[bytes, bytes]:
    """Build an engine; return it and the timing cache, which makes the next build on this GPU much shorter.

    Raises EngineError if TensorRT refuses or fails, PlanError if it cannot read the graph, KeyboardInterrupt if
    the user pressed Ctrl-C while it built.
    """
    trt = tensorrt()
    log.clear()
    try:
        builder = trt.Builder(logger())
    except TypeError as error:  # what pybind11 raises where the library gave it nothing
        raise EngineError(f"TensorRT cannot build here ({log.reason()})", fix="run nvidia-smi; --device cpu") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger())
    if not parser.parse(model.data):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise PlanError(f"TensorRT cannot read the network ({' '.join((reasons or [log.reason()])[0].split())[:300]})")
    config = _configure(trt, builder, options)
    _use_timing_cache(config, timing)
    monitor = _monitor_class()(progress)
    config.progress_monitor = monitor
    memory = builder.build_serialized_network(network, config)
    if monitor.error is not None:
        raise monitor.error
    if memory is None:
        raise EngineError(
            f"TensorRT {trt.__version__} could not build the engine ({log.reason()})",
            fix="try a smaller --workspace, or free memory of the GPU",
        )
    cache = config.get_timing_cache()
    return bytes(memory), b"" if cache is None else bytes(cache.serialize())


def _configure(trt: Any, builder: trt.Builder, options: BuildOptions) -> trt.IBuilderConfig:
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * GIB))
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the engine inspector
    config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, HARDWARE[options.hardware])
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # in fp16, TF32 serves the last layer: it loses nothing of fp16 inputs
    for wanted in options.profiles:
        profile = builder.create_optimization_profile()
        profile.set_shape(INPUT, wanted.minimum, wanted.optimum, wanted.maximum)
        if config.add_optimization_profile(profile) < 0:
            raise EngineError(f"TensorRT refuses the sizes {wanted.minimum} to {wanted.maximum} ({log.reason()})")
    return config


def _use_timing_cache(config: trt.IBuilderConfig, timing: bytes) -> None:
    """Let the build read and fill what was kept, or an empty cache where that does not fit."""
    for kept in (timing, b"") if timing else (b"",):
        cache = config.create_timing_cache(kept)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return


def inspect_engine(engine: trt.ICudaEngine, model: TypedModel) -> dict[str, int]:
    """How many convolutions run in which precision. Raises EngineError if it is not what `model` asks for."""
    trt = tensorrt()
    inspector = engine.create_engine_inspector()
    return check_precision(inspector.get_engine_information(trt.LayerInformationFormat.JSON), model.convolutions)


def load_engine(data: bytes, *, host_code: bool = False) -> tuple[Any, Any]:
    """(Runtime, ICudaEngine) of an engine's bytes; the runtime must outlive the engine.

    `host_code` lets a version-compatible engine run the library it carries: only for engines built here.
    Raises EngineError, with TensorRT's reason, if it rejects the engine.
    """
    trt = tensorrt()
    log.clear()
    try:
        runtime = trt.Runtime(logger())
    except TypeError as error:
        raise EngineError(f"TensorRT cannot run here ({log.reason()})", fix="run nvidia-smi; --device cpu") from error
    runtime.engine_host_code_allowed = host_code
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError(f"TensorRT {trt.__version__} rejects the engine ({log.reason()})")
    return runtime, engine


def _monitor_class() -> Any:
    trt = tensorrt()

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
        """Passes progress on; never lets an exception, Ctrl-C among them, into TensorRT, but stops the build."""

        def __init__(self, progress: Progress):
            trt.IProgressMonitor.__init__(self)
            self.error: BaseException | None = None
            self._progress, self._lock = progress, threading.Lock()
            self._steps: dict[str, int] = {}
            self._roots: set[str] = set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._tell(phase_name, parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, None, 0, step + 1)
            return self.error is None

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, None, 0, None)

        def _tell(self, phase: str, parent: str | None, steps: int, done: int | None) -> None:
            try:
                with self._lock:
                    if steps and not parent:
                        self._roots.add(phase)
                    if steps and (not parent or parent in self._roots):  # those further down come by the hundred
                        self._steps[phase] = steps
                    total = self._steps.get(phase)
                    if total:
                        self._progress(phase, 1.0 if done is None else min(1.0, done / total))
            except BaseException as error:
                self.error = self.error or error

    return Monitor
