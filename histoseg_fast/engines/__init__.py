"""Engines behind one interface, and the choice among them."""

from __future__ import annotations

import numpy as np

from histoseg_fast.engines.base import Engine, Slot
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.machine import cpu_flags
from histoseg_fast.plan import MAX_TILE, Plan
from histoseg_fast.tiling import TileGrid, pad_to_stride

__all__ = ["AGREEMENT_GATE", "DEVICES", "PRECISIONS", "Engine", "Slot", "check_precision"]
__all__ += ["choose_precision", "cpu_precisions", "open_engine", "run_tiled"]

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "fp32", "bf16")
AGREEMENT_GATE = 0.995
"""`auto` takes a faster precision only if at least this share of pixels agreed with fp32 when it was compiled."""


def cpu_precisions() -> tuple[str, ...]:
    """Precisions this CPU runs natively, fastest last."""
    return ("fp32", "bf16") if cpu_flags() & {"avx512_bf16", "amx_bf16"} else ("fp32",)


def check_precision(name: str) -> None:
    """Raise UsageError, naming the known ones, if `name` is no precision."""
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r}", fix="choose one of " + ", ".join(PRECISIONS))


def choose_precision(plan: Plan, wanted: str) -> str:
    """What `wanted` means for this plan on this CPU; EngineError if it cannot run here.

    "auto" is the precision that the plan was compiled for, or the fastest that agreed well enough with fp32;
    fp32 where this CPU lacks it.
    """
    check_precision(wanted)
    here = cpu_precisions()
    if wanted == "auto":
        fixed = plan.manifest["precision"]
        passed = [p for p in here if p == fixed or (fixed == "auto" and (plan.agreement(p) or 0.0) >= AGREEMENT_GATE)]
        return passed[-1] if passed else "fp32"
    if wanted not in here:
        raise EngineError(f"this CPU has no native {wanted}", fix="use --precision " + " or ".join(("auto", *here)))
    return wanted


def open_engine(plan: Plan, *, device: str = "auto", precision: str = "auto", threads: int = 0) -> Engine:
    """The best engine for `plan` here. `threads` bounds the CPU's (0: all cores this process may use).

    Raises UsageError for an unknown device or precision, EngineError for one that cannot run here.
    """
    if device not in DEVICES:
        raise UsageError(f"unknown device {device!r}", fix="choose one of " + ", ".join(DEVICES))
    if device == "cuda":
        raise EngineError("this version has no CUDA engine", fix="use --device cpu")
    from histoseg_fast.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(plan, choose_precision(plan, precision), threads)


def run_tiled(engine: Engine, plan: Plan, image: np.ndarray, tile: int = MAX_TILE) -> np.ndarray:
    """Logits float32 (C, H, W) of one image, RGB uint8 (H, W, 3), tile by tile: the slow plain twin of the stream.

    `tile` is the tile size in pixels, halo included; the default is one tile for the whole image.
    """
    grid = TileGrid.cover(*image.shape[:2], tile, plan.halo, plan.stride)
    padded = pad_to_stride(image, plan.stride)
    logits = np.empty((len(plan.palette.names), grid.height, grid.width), np.float32)
    (slot,) = engine.slots(1)
    for row in grid.rows:
        for column in grid.columns:
            slot.reshape(1, *grid.tile_shape)[0] = padded[row.outer : row.outer_end, column.outer : column.outer_end]
            engine.submit(slot)
            core = engine.wait(slot)[0, :, row.core - row.outer : row.core_end - row.outer]
            core = core[:, :, column.core - column.outer : column.core_end - column.outer]
            logits[:, row.core : row.core_end, column.core : column.core_end] = core
    return logits
