"""What an engine is built for: precision, sizes, which other GPUs and TensorRT versions it must run on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import padded_length

EIGHT_BITS = {"int8": (7, 5), "fp8": (8, 9)}
"""Precisions that round by the plan's ranges, and the least compute capability of the GPUs that have them."""
PRECISIONS = ("fp16", "fp32", *EIGHT_BITS)
HARDWARE = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
"""`--hardware-compatible` and what TensorRT calls it."""
WHOLE_IMAGE = (720, 1128)
"""Height and width of the images that the first profile is tuned for."""
DEFAULT_BATCH = 4
MAX_BATCH_PIXELS = 1 << 23
"""Tiles in a batch by default, fewer where tiles are large: activations are allocated for the most, and a tensor of
128 channels stays below TensorRT's 2^31 values."""
DEFAULT_WORKSPACE_GIB = 4.0
"""Scratch memory that one layer may use."""
MAX_WORKSPACE_GIB = 1024.0
MAX_BATCH = 1024


def check_card(precision: str, gpu: Gpu) -> None:
    """Raise EngineError if `gpu` has no units for `precision`."""
    least = EIGHT_BITS.get(precision, (0, 0))
    if gpu.capability < least:
        needed = ".".join(map(str, least))
        raise EngineError(
            f"{precision} needs a GPU of compute capability {needed} or newer, not {gpu}", fix="use --precision fp16"
        )


def figures_key(precision: str) -> str:
    """Under which name a manifest's "precisions" hold what an engine in `precision` was measured to give.

    The CPU's int8 rounds otherwise, and has its own figures under its own name.
    """
    return f"tensorrt-{precision}" if precision in EIGHT_BITS else precision


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: shapes (n, h, w, 3) of the input."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def holds(self, shape: tuple[int, ...]) -> bool:
        """Whether the engine takes `shape` under this profile."""
        return all(low <= n <= high for low, n, high in zip(self.minimum, shape, self.maximum, strict=True))


@dataclass(frozen=True)
class BuildOptions:
    """How to build. `tile` is the largest side of an image or tile in pixels, a multiple of `stride`."""

    stride: int
    tile: int
    batch: int
    precision: str = "fp16"
    hardware: str = "none"
    version_compatible: bool = False
    workspace_gib: float = DEFAULT_WORKSPACE_GIB

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("hardware", self.hardware, HARDWARE)):
            if value not in known:
                raise UsageError(f"unknown {name} {value!r} for TensorRT", fix="choose one of " + ", ".join(known))
        if self.precision == "fp8" and self.hardware == "ampere+":
            raise UsageError("no fp8 engine runs on Ampere GPUs", fix="--hardware-compatible none or same-cc")
        if not 0 < self.workspace_gib <= MAX_WORKSPACE_GIB:
            raise UsageError(
                f"a workspace of {self.workspace_gib} GiB", fix=f"give more than 0, {MAX_WORKSPACE_GIB:.0f} at most"
            )
        if not 1 <= self.batch <= MAX_BATCH:
            raise UsageError(f"a batch of {self.batch} tiles", fix=f"1 to {MAX_BATCH} are allowed")

    @classmethod
    def of(cls, plan: Plan, *, tile: int = 0, batch: int = 0, **more: Any) -> BuildOptions:
        """The options for `plan`: `batch` tiles (0: a few) of `tile` pixels (0: the plan's), halo included.

        Whole images of `WHOLE_IMAGE` always fit.
        """
        whole = padded_length(max(WHOLE_IMAGE), plan.stride)
        side = max(whole, (tile or plan.tile) // plan.stride * plan.stride)
        few = max(1, min(DEFAULT_BATCH, MAX_BATCH_PIXELS // side**2))
        return cls(plan.stride, side, batch or few, **more)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """One profile for single images, tuned for `WHOLE_IMAGE`, and one for batches of full tiles.

        `choose_profile` picks the first that holds a shape, so a single image or tile runs under the first.
        """
        least, most = (1, self.stride, self.stride, 3), (self.batch, self.tile, self.tile, 3)
        height, width = (padded_length(side, self.stride) for side in WHOLE_IMAGE)
        single = Profile(least, (1, height, width, 3), (1, *most[1:]))
        return (single,) if self.batch == 1 else (single, Profile(least, most, most))

    def key(self) -> str:
        """All of it as one line of JSON: part of the digest that engines are cached by."""
        return json.dumps(asdict(self), sort_keys=True)


def choose_profile(profiles: tuple[Profile, ...], shape: tuple[int, ...]) -> int | None:
    """The first of `profiles` that holds `shape` (n, h, w, 3), or None."""
    return next((i for i, profile in enumerate(profiles) if profile.holds(shape)), None)
