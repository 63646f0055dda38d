"""How busy GPUs are and what memory is taken on them, as nvidia-smi tells it while a benchmark runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time

INTERVAL_MS = 100
MIB = 1 << 20


class GpuWatch:
    """Watches the GPUs of `device` ("cuda:0,1"; nothing for "cpu", or without nvidia-smi) until it is closed.

    Memory is what all programs hold on these cards.
    """

    def __init__(self, device: str):
        self._samples: list[tuple[float, float, int]] = []
        self._process: subprocess.Popen[str] | None = None
        tool = shutil.which("nvidia-smi")
        kind, _, indices = device.partition(":")
        if kind != "cuda" or tool is None:
            return
        numbers = indices.split(",")
        if visible := [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]:
            numbers = [visible[int(number)] for number in numbers]
        self._cards = len(numbers)
        query = ["--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
        command = [tool, *query, "-i", ",".join(numbers), "-lms", str(INTERVAL_MS)]
        with contextlib.suppress(OSError):
            # A session of its own: Ctrl-C is for this program, which then ends that one.
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
            )
            self._reader = threading.Thread(target=self._read, name="gpu-watch", daemon=True)
            self._reader.start()

    def _read(self) -> None:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]"
                busy, memory = line.split(",")
                self._samples.append((time.perf_counter(), float(busy) / 100, int(memory) * MIB))

    def busy_share(self, since: float, until: float) -> float | None:
        """Mean share of the time, on the clock of perf_counter, that a kernel ran; None without a sample of it."""
        found = [busy for at, busy, _ in self._samples if since <= at <= until]
        return sum(found) / len(found) if found else None

    def peak_bytes(self, since: float) -> int | None:
        """The most memory in use since then, summed over the cards; None without a sample."""
        found = [memory for at, _, memory in self._samples if at >= since]
        turns = [sum(found[i : i + self._cards]) for i in range(0, len(found), self._cards)] if found else []
        return max(turns, default=None)

    def close(self) -> None:
        """Stop watching."""
        if self._process is not None:
            self._process.kill()
            self._reader.join()
            self._process.communicate()
