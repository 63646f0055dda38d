"""Does an engine compute what fp32 computes? Run on images, before it is kept or put into a plan."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from histoseg_fast.engines import Engine, open_engine, run_tiled
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.engines.trt.prepare import Check, Prepared
from histoseg_fast.errors import EngineError
from histoseg_fast.plan import Plan
from histoseg_fast.synthetic import make_field

SYNTHETIC_SIDE = 512
"""Pixels a side of the made-up field that a rebuilt engine is tried on: a second or two on the CPU."""


def open_prepared(plan: Plan, prepared: Prepared) -> Engine:
    """The engine that runs `prepared`."""
    from histoseg_fast.engines.tensorrt import TensorRTEngine

    return TensorRTEngine(plan, prepared)


def checked_logits(engine: Engine, plan: Plan, image: np.ndarray, tile: int) -> np.ndarray:
    """Logits of `image` in tiles of at most `tile` pixels. Raises EngineError if one is not finite.

    fp16 ends at 65504: a network that goes beyond must run in fp32.
    """
    logits = run_tiled(engine, plan, image, tile)
    if not np.isfinite(logits).all():
        raise EngineError(
            f"the {engine.precision} engine gives logits that are not finite; it is refused",
            where=plan.path,
            fix="use --precision fp32",
        )
    return logits


def agreement_with_fp32(engine: Engine, plan: Plan, images: Iterable[np.ndarray], tile: int) -> float:
    """Share of pixels of `images` (RGB uint8) whose class equals fp32's on the CPU. EngineError as `checked_logits`."""
    same = total = 0
    with open_engine(plan, device="cpu", precision="fp32") as exact:
        for image in images:
            classes = checked_logits(engine, plan, image, tile).argmax(0)
            same += int((classes == run_tiled(exact, plan, image).argmax(0)).sum())
            total += classes.size
    return same / total


def synthetic_check(plan: Plan, options: BuildOptions) -> Check:
    """The check for `prepare` where no calibration images are at hand: one made-up field."""

    def check(prepared: Prepared) -> float:
        field = make_field(0)[0][:SYNTHETIC_SIDE, :SYNTHETIC_SIDE]
        with open_prepared(plan, prepared) as engine:
            return agreement_with_fp32(engine, plan, [field], options.tile)

    return check
