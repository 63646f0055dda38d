"""Which precision a plan runs in on GPUs. Nothing here starts a library; the driver is asked for the card alone."""

from __future__ import annotations

from collections.abc import Sequence

from histoseg_fast.engines.trt import gpu
from histoseg_fast.engines.trt.options import EIGHT_BITS, PRECISIONS, check_card, figures_key
from histoseg_fast.errors import EngineError
from histoseg_fast.plan import Plan

GPU_PRECISIONS = PRECISIONS
"""What GPUs run under TensorRT; PyTorch runs those that are not in `EIGHT_BITS`."""


def refusal(plan: Plan, precision: str, indices: Sequence[int], library: str) -> EngineError | None:
    """Why `library` ("tensorrt" or "torch") does not run `plan` in `precision` on these GPUs; None if it does."""
    if precision not in GPU_PRECISIONS:
        known = f"{', '.join(GPU_PRECISIONS[:-1])} and {GPU_PRECISIONS[-1]}"
        return EngineError(f"GPUs run {known}, not {precision}", fix="use --device cpu")
    if precision not in EIGHT_BITS:
        return None
    if library != "tensorrt":
        more = "pip install 'histoseg-fast[tensorrt]', or use --precision fp16"
        return EngineError(f"PyTorch does not run {precision} on GPUs, TensorRT does", fix=more)
    if plan.ranges is None:
        more = "compile it with --calibrate DIR, or use --precision fp16"
        return EngineError(f"the plan was compiled without ranges, which {precision} needs", fix=more)
    try:
        for index in indices:
            check_card(precision, gpu.gpu_at(index))
    except EngineError as error:
        return error
    return None


def gpu_precisions(plan: Plan, indices: Sequence[int], library: str) -> tuple[str, ...]:
    """All that `library` runs `plan` in on these GPUs."""
    return tuple(p for p in GPU_PRECISIONS if refusal(plan, p, indices, library) is None)


def choose_gpu_precision(plan: Plan, wanted: str, indices: Sequence[int], library: str) -> str:
    """What `wanted` means for this plan on these GPUs under `library`; EngineError if they do not run it.

    "auto" is the 8-bit precision that the plan was compiled for, where they run it and the plan's figures of TensorRT
    pass its gate; else fp16, unless the plan was compiled for fp32 or its own figures say that fp16 fails the gate.
    """
    if wanted == "auto":
        fixed = plan.manifest["precision"]
        passed = fixed in EIGHT_BITS and plan.passes(figures_key(fixed))
        if passed and refusal(plan, fixed, indices, library) is None:
            return str(fixed)
        failed = fixed != "fp16" and plan.agreement("fp16") is not None and not plan.passes("fp16")
        return "fp32" if fixed == "fp32" or failed else "fp16"
    if error := refusal(plan, wanted, indices, library):
        raise error
    return wanted
