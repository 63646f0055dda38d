"""Figures of a run for Prometheus, in a text file that node exporter's textfile collector reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from histoseg_fast.engines import Engine
from histoseg_fast.errors import UsageError
from histoseg_fast.files import atomic_write
from histoseg_fast.pipeline.stream import Stream
from histoseg_fast.pipeline.totals import Totals

SUFFIX = ".prom"
"""Of the files that the collector reads; it takes no notice of others, so ours are never read half-written."""
WRITE_SECONDS = 5.0
"""How often the file is written while a run goes on."""

Samples = list[tuple[Mapping[str, str], float]]
"""Labels and value of each sample of a metric."""


class MetricsFile:
    """The figures of one run in the file `path`, written when it starts, every `WRITE_SECONDS`, and when it ends.

    plan : the plan's name. report : gets a line, once, where the file cannot be written any more; the run goes on.
    """

    def __init__(self, path: Path, plan: str, report: Callable[[str], None]):
        if path.suffix != SUFFIX:
            raise UsageError(f"the name does not end in {SUFFIX}", where=path, fix="node exporter reads no other file")
        self._path, self._plan, self._report = path, plan, report
        self._stream: Stream | None = None
        self._last_success, self._written, self._failing = 0.0, 0.0, False

    def start(self, engine: Engine, images: int | None, stream: Stream) -> None:
        """Write the first file. Raises UsageError where that cannot be done."""
        self._stream, self._precision = stream, engine.precision
        try:
            self._write()
        except OSError as error:
            self._stream = None  # nothing is written at the end either
            raise UsageError(
                f"cannot be written: {error.strerror or error}", where=self._path, fix="choose another --metrics"
            ) from error

    def image(self, entry: Mapping[str, Any]) -> None:
        """Take note of an image that is over, from any thread."""
        if entry["status"] != "failed":
            self._last_success = time.time()

    def poll(self) -> None:
        """Write the file where it is time to."""
        if time.monotonic() - self._written > WRITE_SECONDS:
            self.close()

    def close(self) -> None:
        """Write the last figures, if the run had started."""
        try:
            self._write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._report(f"{self._path}: cannot be written: {error.strerror or error}; the run goes on without")
            self._failing = True

    def _write(self) -> None:
        if self._stream is None:
            return
        self._written = time.monotonic()
        labels = {"plan": self._plan, "precision": self._precision}
        with atomic_write(self._path) as stream:
            stream.write(render(self._stream.totals, labels, self._last_success).encode())


def render(totals: Totals, labels: Mapping[str, str], last_success: float) -> str:
    """The file: metrics of `totals`, all with `labels`. last_success : seconds since 1970, 0 for never."""
    statuses: Samples = [({"status": name}, getattr(totals, name)) for name in ("done", "failed", "skipped")]
    stages: Samples = [({"stage": stage}, seconds) for stage, seconds in totals.stage_seconds.items()]
    parts = [
        _metric("histoseg_images", "gauge", "Images of this run by what became of them.", statuses, labels),
        _metric("histoseg_pixels_total", "counter", "Pixels of the images done.", [({}, totals.pixels)], labels),
        _metric(
            "histoseg_stage_seconds_total",
            "counter",
            "Seconds that each stage worked on images that are over; stages work side by side.",
            stages,
            labels,
        ),
        _metric(
            "histoseg_last_success_timestamp_seconds",
            "gauge",
            "When an image was last done, or found done; 0 before the first.",
            [({}, last_success)],
            labels,
        ),
    ]
    return "".join(parts)


def _metric(name: str, kind: str, text: str, samples: Samples, labels: Mapping[str, str]) -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    for own, value in samples:
        pairs = ",".join(f'{key}="{escape(label)}"' for key, label in {**own, **labels}.items())
        lines.append(f"{name}{{{pairs}}} {value!r}")
    return "".join(f"{line}\n" for line in lines)


def escape(label: str) -> str:
    """A label's value as it stands between quotes."""
    text = os.fsencode(label).decode("utf-8", "replace")
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
