"""A TensorRT engine at work: contexts, addresses, graphs.

No GPU was at hand when this was written: the calls are checked against the real bindings of both versions, their
order and their failures against a fake.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from histoseg_fast.engines.gpu import Network, Report, Shape
from histoseg_fast.engines.memory import Block, failure
from histoseg_fast.engines.trt.build import INPUT
from histoseg_fast.engines.trt.graph import Graph
from histoseg_fast.engines.trt.library import log, tensorrt
from histoseg_fast.engines.trt.memory import PycudaMemory
from histoseg_fast.engines.trt.options import Profile, choose_profile
from histoseg_fast.errors import EngineError

if TYPE_CHECKING:
    import tensorrt as trt

    from histoseg_fast.engines.trt.prepare import Prepared

OUTPUT = "logits"


@dataclass(frozen=True)
class _Captured:
    """One shape's graph, and what it runs on."""

    context: Any
    graph: Graph
    rgb: Block


class TensorRTNetwork(Network):
    """`prepared` on the GPU of `memory`, whose context is current.

    One execution context serves all shapes; a captured shape has its own, because a graph holds on to its context's
    state. They never run at the same time, so they share their scratch memory, which is as large as the largest shape
    so far needs, and the logits.
    """

    _memory: PycudaMemory

    def __init__(self, prepared: Prepared, memory: PycudaMemory, classes: int, report: Report):
        super().__init__(memory, classes, report)
        self._prepared: Prepared | None = prepared
        self._profiles: tuple[Profile, ...] = prepared.info.profiles
        self._blocks: dict[str, Block] = {}
        self._captured: list[_Captured] = []
        self._context: Any = None
        self._bound: Shape | None = None

    def most_tiles(self, height: int, width: int) -> int:
        fitting = [p.maximum[0] for p in self._profiles if p.holds((p.minimum[0], height, width, 3))]
        if not fitting:
            low, high = self._profiles[-1].minimum[1], self._profiles[-1].maximum[1]
            raise EngineError(
                f"the TensorRT engine takes tiles of {low} to {high} pixels a side, not {width}x{height}",
                fix=f"use --tile {high} or less",
            )
        return max(fitting)

    def compute(self, rgb: Block, shape: Shape, stream: Any) -> Block:
        self._context = self._context or self._make_context()
        if self._bound != shape:
            self._bind(self._context, shape, stream)
            self._bound = shape
        self._enqueue(self._context, rgb, stream)
        return self._blocks["logits"]

    def capture(self, shape: Shape, stream: Any) -> Callable[[Block], Block]:
        n, h, w = shape
        context, graph, handle = self._make_context(), Graph(), self._memory.handle(stream)
        captured = _Captured(context, graph, self._memory.allocate(n * h * w * 3))
        try:
            self._bind(context, shape, stream)
            self._enqueue(context, captured.rgb, stream)  # the first run after a change of shape does more than run
            with graph.capture(handle):
                self._enqueue(context, captured.rgb, stream)
        except BaseException:
            with contextlib.suppress(EngineError), self._memory.current():
                self._memory.synchronise()
                self._free(captured)
            raise
        self._captured.append(captured)

        def replay(rgb: Block) -> Block:
            self._memory.copy(captured.rgb, rgb, n * h * w * 3, stream)
            graph.launch(handle)
            return self._blocks["logits"]

        return replay

    def _make_context(self) -> trt.IExecutionContext:
        assert self._prepared is not None
        engine = self._prepared.engine
        log.clear()
        context = engine.create_execution_context(tensorrt().ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise failure(f"TensorRT gives no context on {self._memory.device}", log.reason())
        return context

    def _bind(self, context: trt.IExecutionContext, shape: Shape, stream: Any) -> None:
        """Set shape, scratch memory and logits."""
        n, h, w = shape
        chosen = choose_profile(self._profiles, (n, h, w, 3))
        assert chosen is not None
        log.clear()
        if not context.set_optimization_profile_async(chosen, self._memory.handle(stream)):
            raise failure(f"TensorRT refuses its profile {chosen}", log.reason())
        if not context.set_input_shape(INPUT, (n, h, w, 3)):
            raise failure(f"TensorRT refuses a batch {(n, h, w, 3)}", log.reason())
        self._fit("scratch", max(1, context.update_device_memory_size_for_shapes()))
        self._fit("logits", 4 * n * self.classes * h * w)
        scratch = self._blocks["scratch"]
        context.set_device_memory(scratch.address, scratch.size)
        if not context.set_tensor_address(OUTPUT, self._blocks["logits"].address):
            raise failure("TensorRT refuses the logits' address", log.reason())

    def _enqueue(self, context: trt.IExecutionContext, rgb: Block, stream: Any) -> None:
        log.clear()
        if not context.set_tensor_address(INPUT, rgb.address):
            raise failure("TensorRT refuses the input's address", log.reason())
        if not context.execute_async_v3(self._memory.handle(stream)):
            raise failure(f"TensorRT could not run the network on {self._memory.device}", log.reason())

    def _fit(self, name: str, size: int) -> None:
        """Let block `name` have `size` bytes; what was bound to a smaller one is given up."""
        block = self._blocks.get(name)
        if block is not None and block.size >= size:
            return
        if block is not None:
            self._memory.synchronise()
            self._forget()
            self._memory.free(self._blocks.pop(name))
        self._blocks[name] = self._memory.allocate(size)

    def _forget(self) -> None:
        self._bound = None
        self._replays.clear()
        while self._captured:
            self._free(self._captured.pop())

    def _free(self, captured: _Captured) -> None:
        captured.graph.close()
        self._memory.free(captured.rgb)

    def drop(self) -> None:
        self._forget()
        self._context = None
        for name in list(self._blocks):
            self._memory.free(self._blocks.pop(name))

    def close(self) -> None:
        self.drop()
        self._prepared = None
