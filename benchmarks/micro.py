"""What the micro benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def measure_into(seconds: dict[str, float]) -> Callable[..., Any]:
    """A function that runs another under pytest-benchmark, returns its result and keeps its seconds by name."""

    def measure(benchmark, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        result = benchmark(function, *arguments)
        if benchmark.stats is not None:  # --benchmark-disable
            seconds[name] = benchmark.stats.stats.min  # the quietest round: others may share the machine
        return result

    return measure


def one_thread_of_opencv() -> Any:
    """OpenCV on one thread, as what it is compared with; skips the test where it is not installed."""
    cv2 = pytest.importorskip("cv2", reason="pip install 'histoseg-fast[bench]' compares with OpenCV")
    cv2.setNumThreads(1)
    return cv2
