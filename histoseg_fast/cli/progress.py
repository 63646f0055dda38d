"""How `infer` tells what it does: a bar on a terminal, or lines now and then; and what signals do."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from histoseg_fast.cli import log
from histoseg_fast.errors import one_line

if TYPE_CHECKING:
    from histoseg_fast.engines import Engine
    from histoseg_fast.pipeline.stream import Stream

REPORT_SECONDS = 10.0
"""Off a terminal, a line of progress at most this often."""


class Display:
    """Progress for a person (a bar on a terminal) or a log (a line now and then), and what signals do.

    The first Ctrl-C or SIGTERM lets the stream finish what is in flight; a second Ctrl-C ends at once.
    """

    def __init__(self) -> None:
        self.signal, self._told = 0, False
        self._images: int | None = 0
        self._bar: Any = None
        self._stream: Any = None
        self._terminal = sys.stderr.isatty() and not log.as_json()
        self._last = self._started = time.perf_counter()
        self._handlers: dict[int, Any] = {}

    def start(self, engine: Engine, images: int | None, stream: Stream) -> None:
        """Begin; `images` are None where files are still to come."""
        self._stream, self._images = stream, images
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)
        steps = str(stream.outputs.postprocess)
        what = "watching for images" if images is None else f"{images} image(s)"
        text = f"{what} on {engine.device}: {engine.name}, {engine.precision}; post-processing {steps}"
        ran = {"device": engine.device, "engine": engine.name, "precision": engine.precision, "postprocess": steps}
        log.write("info", "start", text, images=images, **ran)
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=images, rate="")
            self._bar.start()

    def image(self, entry: dict[str, Any]) -> None:
        """Tell of an image that failed, or that there is something to know about."""
        name = entry["input"]
        if entry["status"] == "failed":
            self._say("error", "failed", f"failed: {entry['error']}", input=name, error=entry["error"])
        for warning in entry.get("warnings", ()):
            self._say("warning", "warning", f"{name}: {warning}", input=name, warning=warning)

    def report(self, line: str) -> None:
        """Tell `line`."""
        self._say("info", "notice", line)

    def poll(self) -> None:
        """Show how far it is; called several times a second."""
        if self.signal and not self._told:
            self._told = True
            name = signal.Signals(self.signal).name
            self._say("warning", "interrupted", f"{name}: finishing what is in flight", signal=name)
        totals, now = self._stream.totals, time.perf_counter()
        over = totals.done + totals.failed + totals.skipped
        rates = self.rates(totals.segmented, now - self._started)
        if self._bar is not None:
            self._bar.update(self._task, completed=over, rate=in_words(rates))
        elif now - self._last > REPORT_SECONDS:
            self._last = now
            far = f"{over} of {self._images}"
            if self._images is None:
                far = f"{totals.done} done, {totals.failed} failed, {totals.skipped} skipped"
            counts = {"done": totals.done, "failed": totals.failed, "skipped": totals.skipped, "images": self._images}
            self._say("info", "progress", f"{far}; {in_words(rates)}", **counts, **rates)

    def rates(self, pixels: int, seconds: float) -> dict[str, float]:
        """Throughput so far: images and megapixels a second."""
        images, megapixels = self._stream.totals.done / seconds, pixels / 1e6 / seconds
        return {"images_per_second": round(images, 4), "megapixels_per_second": round(megapixels, 4)}

    def close(self) -> None:
        """Take the bar away, and give the signals back."""
        if self._bar is not None:
            self._bar.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, _frame: object) -> None:
        if self.signal and number == signal.SIGINT:
            os._exit(128 + number)  # whatever is half written bears a temporary name, and the next run removes it
        self.signal = number
        self._stream.stop()  # `poll` says so: a handler that prints may meet the print it interrupted

    def _say(self, level: str, event: str, text: str, **fields: Any) -> None:
        if self._bar is not None:
            self._bar.console.print(one_line(text), markup=False, highlight=False, soft_wrap=True)
        else:
            log.write(level, event, text, **fields)


def in_words(rates: dict[str, float]) -> str:
    """What `Display.rates` gives, for people."""
    return f"{rates['images_per_second']:.2f} images/s, {rates['megapixels_per_second']:.2f} megapixels/s"
