"""Which of several precisions is the fastest on this CPU: measured once for each plan, then remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.cache import cache_folder
from histoseg_fast.files import atomic_write
from histoseg_fast.machine import available_cores, cpu_flags, cpu_name
from histoseg_fast.plan import Plan

FILE = "precisions.json"
MAX_FILE_BYTES = 1 << 20
MAX_CHOICES = 256
"""Plans and machines that are remembered (a home folder may be shared by many); the oldest go first."""
SIDE = 256
"""Pixels a side of the field that is timed, rounded up to the network's stride: well under a second a run."""
RUNS = 3
NEAR = 0.95
"""A precision that reaches this share of the fastest one's speed and is more exact is taken instead."""


def fastest(plan: Plan, candidates: Sequence[str], measure: Callable[[Plan, str], float]) -> str:
    """The one of `candidates` (the most exact first) that runs `plan` fastest on this CPU.

    `measure` gives the megapixels per second of one of them. What it found is kept in the user's cache folder; where
    that cannot be written, it is measured each time.
    """
    if len(candidates) == 1:
        return candidates[0]
    path, key = cache_folder() / FILE, _key(plan, candidates)
    choices = _read(path)
    speeds = choices.get(key, {})
    if not _sound(speeds, candidates):
        speeds = {precision: round(measure(plan, precision), 3) for precision in candidates}
        choices = {**{name: value for name, value in choices.items() if name != key}, key: speeds}
        kept = dict(list(choices.items())[-MAX_CHOICES:])
        with contextlib.suppress(OSError), atomic_write(path) as stream:
            stream.write(json.dumps(kept, indent=1).encode())
    return next(p for p in candidates if speeds[p] >= NEAR * max(speeds.values()))


def speed(engine: Any, plan: Plan, run: Callable[..., np.ndarray]) -> float:
    """Megapixels per second of `engine` on a small field: the best of a few runs after a first."""
    side = -(-SIDE // plan.stride) * plan.stride
    field = np.zeros((side, side, 3), np.uint8)
    seconds = []
    for _ in range(1 + RUNS):
        started = time.perf_counter()
        run(engine, plan, field)
        seconds.append(time.perf_counter() - started)
    return side * side / 1e6 / min(seconds[1:])


def _key(plan: Plan, candidates: Sequence[str]) -> str:
    """Of all that a choice depends on: the plan, the CPU, the cores this process may use and OpenVINO's version."""
    what = [plan.sha256, list(candidates), cpu_name(), sorted(cpu_flags()), available_cores(), version("openvino")]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """What the file holds, or nothing where it is not there or damaged."""
    try:
        with open(path, "rb") as stream:
            found = json.loads(stream.read(MAX_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _sound(speeds: Any, candidates: Sequence[str]) -> bool:
    return isinstance(speeds, dict) and all(
        isinstance(value := speeds.get(p), int | float) and 0 < value < float("inf") for p in candidates
    )
