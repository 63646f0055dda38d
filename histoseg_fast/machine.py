"""What this machine is: CPU flags and cores, without importing anything heavy."""

from __future__ import annotations

import functools
import os
from pathlib import Path

FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""The CPU abilities that decide which precision is fast here."""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Those of `FLAGS` that the CPU has; empty where the system does not tell (then only fp32 is offered)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    found = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return frozenset(FLAGS) & frozenset(found)


def cpu_precisions() -> tuple[str, ...]:
    """Precisions this CPU runs natively, fastest last."""
    flags = cpu_flags()
    bf16 = ("bf16",) if flags & {"avx512_bf16", "amx_bf16"} else ()
    int8 = ("int8",) if flags & {"avx_vnni", "avx512_vnni", "amx_int8"} else ()
    return ("fp32", *bf16, *int8)


def cpu_name() -> str:
    """The CPU's model name, or "unknown"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def available_cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The most memory this process has held so far, in bytes (0 where the system does not tell)."""
    try:
        import resource
    except ImportError:
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` start again from what is held now; whether this system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def busy_seconds() -> float | None:
    """Seconds that this machine's processors have worked since it started, for anyone, summed over all of them.

    Time that a hypervisor gave to others counts. None where the system does not tell.
    """
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
        user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, fields)
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
