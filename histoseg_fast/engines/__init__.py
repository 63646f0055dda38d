"""Engines behind one interface, and the choice among them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np

from histoseg_fast.engines.base import Engine, Slot, Wants
from histoseg_fast.engines.choice import fastest, speed
from histoseg_fast.engines.devices import DEVICES, choose_gpus
from histoseg_fast.engines.gpu_precision import GPU_PRECISIONS, choose_gpu_precision, gpu_precisions, refusal
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.plan import MAX_TILE, Plan
from histoseg_fast.tiling import TileGrid, pad_to_stride

__all__ = ["DEVICES", "PRECISIONS", "Engine", "Slot", "check_precision", "choose_gpu_precision", "choose_precision"]
__all__ += ["gpu_precisions", "open_engine", "over_tiles", "run_tiled"]

PRECISIONS = ("auto", "fp32", "bf16", "int8", "fp16", "fp8")


def check_precision(name: str) -> None:
    """Raise UsageError, naming the known ones, if `name` is no precision."""
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r}", fix="choose one of " + ", ".join(PRECISIONS))


def choose_precision(plan: Plan, wanted: str) -> str:
    """What `wanted` means for this plan on this CPU; EngineError if it cannot run here.

    "auto" is the precision that the plan was compiled for, or of those that passed the plan's gate the one that is the
    fastest here, which is measured when a plan is run for the first time; fp32 where this CPU lacks it.
    """
    check_precision(wanted)
    here = tuple(p for p in cpu_precisions() if p != "int8" or plan.ranges is not None)
    if wanted == "auto":
        fixed = plan.manifest["precision"]
        passed = [p for p in here if p == fixed or (fixed == "auto" and plan.passes(p))]
        return fastest(plan, passed or ["fp32"], _measure)
    if wanted not in here:
        lacking = f"this CPU has no native {wanted}"
        if wanted == "int8" and plan.ranges is None:
            lacking = "the plan was compiled without int8"
        raise EngineError(lacking, fix="use --precision " + " or ".join(("auto", *here)))
    return wanted


def _measure(plan: Plan, precision: str) -> float:
    with open_engine(plan, device="cpu", precision=precision) as engine:
        return speed(engine, plan, run_tiled)


def open_engine(
    plan: Plan,
    *,
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    streams: int = 1,
    tile: int = 0,
    batch: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Engine:
    """The best engine for `plan` on `device` (one of `DEVICES`; "auto": a GPU that runs `precision`, else the CPU).

    `threads` bounds the CPU's (0: all cores this process may use), which run `streams` batches side by side; `tile`
    (0: the plan's) and `batch` (0: a few) are the largest tile and batch that it must take; `report` gets a line for
    whatever takes long or goes otherwise than hoped. Raises UsageError for an unknown device or precision,
    EngineError for one that cannot run here.
    """
    check_precision(precision)
    if device == "auto" and precision not in ("auto", *GPU_PRECISIONS):
        device = "cpu"
    indices, library = choose_gpus(device, report)
    if device == "auto" and indices and precision != "auto" and (error := refusal(plan, precision, indices, library)):
        report(f"going on with the CPU: {error}")
        indices = ()
    if not indices:
        from histoseg_fast.engines.openvino import OpenVINOEngine

        return OpenVINOEngine(plan, choose_precision(plan, precision), threads, streams)
    from histoseg_fast.engines.several import SeveralEngines

    precision = choose_gpu_precision(plan, precision, indices, library)
    opened: list[Engine] = []
    with contextlib.ExitStack() as stack:
        for index in indices:
            if library == "tensorrt":
                from histoseg_fast.engines.tensorrt import open_tensorrt

                opened.append(open_tensorrt(plan, index, precision, tile=tile, batch=batch, report=report))
            else:
                from histoseg_fast.engines.torch_cuda import TorchEngine

                opened.append(TorchEngine(plan, f"cuda:{index}", precision, report))
            stack.callback(opened[-1].close)
        stack.pop_all()
    return opened[0] if len(opened) == 1 else SeveralEngines(opened)


def run_tiled(engine: Engine, plan: Plan, image: np.ndarray, tile: int = MAX_TILE) -> np.ndarray:
    """Logits float32 (C, H, W) of one image, RGB uint8 (H, W, 3), tile by tile: the slow plain twin of the stream.

    `tile` is the tile size in pixels, halo included; the default is one tile for the whole image.
    """
    (slot,) = engine.slots(1)
    slot.wants = Wants(logits=True)

    def run(outer: np.ndarray) -> np.ndarray:
        slot.reshape(1, *outer.shape[:2])[0] = outer
        engine.submit(slot)
        engine.wait(slot)
        assert slot.logits is not None
        logits: np.ndarray = slot.logits[0]
        return logits

    with contextlib.closing(slot):
        return over_tiles(run, image, len(plan.palette.names), tile, plan.halo, plan.stride)


def over_tiles(
    run: Callable[[np.ndarray], np.ndarray], image: np.ndarray, classes: int, tile: int, halo: int, stride: int
) -> np.ndarray:
    """Logits float32 (classes, H, W) of `image`, RGB uint8 (H, W, 3), put together from those of its tiles.

    `run` gives the logits (classes, h, w) of a tile, uint8 (h, w, 3); `tile`, `halo` and `stride` are in pixels.
    """
    grid = TileGrid.cover(image.shape[0], image.shape[1], tile, halo, stride)
    padded = pad_to_stride(image, stride)
    logits = np.empty((classes, grid.height, grid.width), np.float32)
    for i, row in enumerate(grid.rows):
        for j, column in enumerate(grid.columns[i]):
            top, left, bottom, right = grid.core(i, j)
            found = run(padded[row.outer : row.outer_end, column.outer : column.outer_end])
            logits[:, row.core : row.core_end, column.core : column.core_end] = found[:, top:bottom, left:right]
    return logits
