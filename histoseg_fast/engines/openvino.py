"""The CPU engine: OpenVINO on the plan's ONNX, one compiled model for every image size."""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.properties as properties
import openvino.properties.hint as hint

from histoseg_fast.engines.base import Engine, Slot
from histoseg_fast.engines.int8 import quantise
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.machine import available_cores, cpu_precisions
from histoseg_fast.plan import MODEL, Plan

PRECISIONS = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16}
"""Of what is computed in floating point; under int8, the first layer and whatever has no range."""

CACHED_PRIMITIVES = 64
"""Layers made ready for a size of input that OpenVINO keeps; with its own thousands, each new size costs memory."""


class OpenVINOSlot(Slot):
    """A slot with an infer request of its own, which reads `input` where it lies.

    `result` is what the network gave: logits float32 (n, C, h, w) or, before a pixel shuffle,
    (n, C, 2, 2, h / 2, w / 2).
    """

    def __init__(self, request: ov.InferRequest):
        super().__init__()
        self.request = request
        self.result: np.ndarray | None = None

    def reshape(self, n: int, h: int, w: int) -> np.ndarray:
        self.result = None
        return super().reshape(n, h, w)

    def logits_of(self, index: int) -> np.ndarray:
        assert self.result is not None
        logits: np.ndarray = self.result[index]
        return logits


class OpenVINOEngine(Engine):
    """Runs a plan on the CPU in "fp32", "bf16" or "int8" with `threads` threads (0: every core the process may use).

    They work on `streams` batches side by side: with two, a core that decodes an image holds up only its own batch.
    """

    device = "cpu"

    def __init__(self, plan: Plan, precision: str, threads: int = 0, streams: int = 1):
        self.precision = precision
        self.name = f"OpenVINO {ov.__version__.split('-')[0]}"
        self.depth = 2 + streams
        self._classes = len(plan.palette.names)
        core = ov.Core()
        try:
            model = core.read_model(plan.members[MODEL])
        except RuntimeError as error:
            reason = _last_line(error)
            raise PlanError(f"{MODEL} is not a network OpenVINO can read ({reason})", where=plan.path) from error
        self._check(model, plan)
        model, self._shuffled = without_shuffle(model)
        floating = precision
        if precision == "int8":
            assert plan.ranges is not None
            try:
                quantise(model, plan.ranges)
            except PlanError as error:
                raise PlanError(error.what, where=plan.path, fix=error.fix) from None
            floating = "bf16" if "bf16" in cpu_precisions() else "fp32"
        settings = {
            hint.inference_precision: PRECISIONS[floating],
            hint.execution_mode: hint.ExecutionMode.ACCURACY if precision == "fp32" else hint.ExecutionMode.PERFORMANCE,
            properties.num_streams: streams,
            # A pinned thread waits for whatever else the kernel put on its core: decoding, or another job.
            hint.enable_cpu_pinning: False,
            properties.inference_num_threads: threads or available_cores(),
            "CPU_RUNTIME_CACHE_CAPACITY": CACHED_PRIMITIVES,
        }
        try:
            self._compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            reason = _last_line(error)
            raise EngineError(f"OpenVINO could not compile the network ({reason})", where=plan.path) from error

    def _check(self, model: ov.Model, plan: Plan) -> None:
        """The graph must be what the manifest says: uint8 (n, h, w, 3) in, float logits (n, C, h, w) out."""
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise PlanError(f"{MODEL} must have one input and one output", where=plan.path)
        source, logits = model.input(0), model.output(0)
        shape, out = source.partial_shape, logits.partial_shape
        fits = shape.rank == 4 and shape[3] == 3 and not any(d.is_static for d in shape[:3])
        if source.element_type != ov.Type.u8 or not fits:
            raise PlanError(f"{MODEL} must take uint8 (n, h, w, 3) of any size, not {shape}", where=plan.path)
        if logits.element_type != ov.Type.f32 or out.rank != 4 or out[1] != self._classes:
            raise PlanError(f"{MODEL} must give float32 (n, {self._classes}, h, w), not {out}", where=plan.path)

    def slots(self, count: int) -> list[Slot]:
        return [OpenVINOSlot(self._compiled.create_infer_request()) for _ in range(count)]

    def submit(self, slot: Slot) -> None:
        assert isinstance(slot, OpenVINOSlot)
        try:
            slot.request.set_input_tensor(ov.Tensor(slot.input, shared_memory=True))
            slot.request.start_async()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO refused a batch {slot.input.shape} ({_last_line(error)})") from error

    def wait(self, slot: Slot) -> None:
        assert isinstance(slot, OpenVINOSlot)
        try:
            slot.request.wait()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on a batch {slot.input.shape} ({_last_line(error)})") from error
        result = slot.request.get_output_tensor().data
        n, h, w, _ = slot.input.shape
        factor = 2 if self._shuffled else 1
        images, planes, tall, wide = result.shape
        if (images, planes, tall * factor, wide * factor) != (n, self._classes * factor**2, h, w):
            raise EngineError(f"the network gave logits {result.shape} for a batch {slot.input.shape}")
        if self._shuffled:
            result = result.reshape(n, self._classes, 2, 2, tall, wide)
        slot.result = result
        if slot.wants.logits:
            slot.logits = _in_order(result) if self._shuffled else result

    def close(self) -> None:
        del self._compiled


def without_shuffle(model: ov.Model) -> tuple[ov.Model, bool]:
    """`model` without a pixel shuffle by 2 at its end, and whether there was one: `stitch` does without."""
    last = model.output(0).get_node().input_value(0).get_node()
    if last.get_type_name() != "DepthToSpace":
        return model, False
    attributes = last.get_attributes()
    if attributes["block_size"] != 2 or attributes["mode"] != "depth_first":
        return model, False
    return ov.Model([last.input_value(0)], model.get_parameters()), True


def _in_order(planes: np.ndarray) -> np.ndarray:
    """Logits (n, C, h, w) of those before a pixel shuffle, (n, C, 2, 2, h / 2, w / 2)."""
    n, classes, _, _, tall, wide = planes.shape
    logits = np.empty((n, classes, 2 * tall, 2 * wide), planes.dtype)
    for y in range(2):
        for x in range(2):
            logits[:, :, y::2, x::2] = planes[:, :, y, x]
    return logits


def _last_line(error: Exception) -> str:
    """The last line of OpenVINO's message says what is wrong; those before it say where in its sources."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
