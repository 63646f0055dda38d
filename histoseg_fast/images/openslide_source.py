"""Slides that OpenSlide reads, one source a resolution level.

OpenSlide runs in processes of its own, one for each thread that decodes: it aborts on some damaged files.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.errors import ImageError
from histoseg_fast.extras import has
from histoseg_fast.images import openslide_worker
from histoseg_fast.images.companions import companions
from histoseg_fast.images.content import Content, FileSet
from histoseg_fast.images.openslide_worker import ANSWER, REQUEST
from histoseg_fast.images.segments import SegmentedSource
from histoseg_fast.images.source import to_rgb
from histoseg_fast.images.tiff import MAX_PIXELS
from histoseg_fast.images.tiff_slide import plausible_mpp

SEGMENT_WIDTH, SEGMENT_HEIGHT = 1024, 256
"""Regions of about this size are asked for, in whole tiles of the file, so that each tile is decoded once."""

MAX_TILE_SIDE = 4096
"""Larger tiles are cut up: a region has to be held several times over."""

MAX_HEAD_BYTES = 2**16
"""Longest line in which a process says what its slide is, and longest error."""

ANSWER_SECONDS = 120.0
"""A process that takes longer to open its slide, or over a region, is ended; what is slow on a share takes seconds."""


def open_levels(
    path: str | os.PathLike[str], known: Content | None = None
) -> tuple[list[OpenSlideSource], tuple[float, float] | None]:
    """The levels of a slide, finest first, and micrometres a pixel (down, across) of the finest, if it says.

    known : the file, where it has been digested before.
    Raises ImageError where OpenSlide is not installed, or does not read this.
    """
    path = Path(path)
    if not has("openslide"):
        raise _missing(path)
    files = FileSet(path, companions(path), known)
    first = Worker(path)
    try:
        if "missing" in first.head:
            raise _missing(path)
        if "error" in first.head:
            reason = str(first.head["error"])[:200]
            raise ImageError(f"OpenSlide cannot read it ({reason})", where=path, fix="copy or export it again")
        workers = Workers(path, first)
        levels = [OpenSlideSource(files, workers, i, said) for i, said in enumerate(first.head["levels"])]
    except BaseException:
        first.close()
        raise
    down, across = map(_number, first.head["mpp"])
    return levels, plausible_mpp(down, across)


def _missing(path: Path) -> ImageError:
    return ImageError("this slide format needs OpenSlide", where=path, fix="pip install 'histoseg-fast[slides]'")


class Worker:
    """A process that has one slide open. `head` is what it said of it; see `openslide_worker`."""

    def __init__(self, path: Path):
        self._path, self._late = path, False
        try:
            self._process = subprocess.Popen(
                [sys.executable, openslide_worker.__file__, path.absolute()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the run, which finishes what is in flight
            )
        except OSError as error:
            raise ImageError(f"OpenSlide cannot be started ({error.strerror})", where=path) from error
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            with self._in_time():
                self.head: dict[str, Any] = json.loads(self._answers.readline(MAX_HEAD_BYTES))
        except ValueError:
            self.head = {"error": self._ended()}
        except BaseException:
            self.close()
            raise

    def region(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        """RGBA uint8 (height, width, 4). ValueError where OpenSlide cannot read it, or ends over it; ImageError where
        it gives no answer in `ANSWER_SECONDS`, and is ended.
        """
        pixels = np.empty((height, width, 4), np.uint8)
        try:
            with self._in_time():
                self._requests.write(REQUEST.pack(x, y, level, width, height))
                self._requests.flush()
                (size,) = ANSWER.unpack(self._answers.read(ANSWER.size))
                told = self._answers.read(min(-size, MAX_HEAD_BYTES)) if size < 0 else b""
                whole = size == pixels.nbytes == self._answers.readinto(pixels.data.cast("B"))  # type: ignore[attr-defined]
        except (OSError, ValueError, struct.error) as error:  # ValueError: it has been closed before
            raise ValueError(self._ended()) from error
        if told:
            raise ValueError(told.decode("utf-8", "replace"))
        if not whole:
            raise ValueError(self._ended())
        return pixels

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        """What waits for an answer in here meets its end after `ANSWER_SECONDS`."""
        timer = threading.Timer(ANSWER_SECONDS, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _give_up(self) -> None:
        self._late = True
        self._process.kill()

    def _ended(self) -> str:
        """Why there is no answer. ImageError where that is because it took too long."""
        self.close()
        if self._late:
            raise ImageError(
                f"OpenSlide gave no answer in {ANSWER_SECONDS:g} s",
                where=self._path,
                fix="check the disk it lies on, or copy or export it again",
            )
        return f"OpenSlide ended over it, with code {self._process.returncode}"

    def close(self) -> None:
        """End the process."""
        for stream in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                stream.close()
        self._process.kill()
        self._process.wait()


class Workers:
    """As many processes on one slide as threads ask at a time."""

    def __init__(self, path: Path, first: Worker):
        self._path, self._all = path, [first]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        self._idle.put(first)
        self._lock = threading.Lock()

    def region(self, *request: int) -> np.ndarray:
        """`Worker.region` of one that is idle, or new."""
        try:
            worker = self._idle.get_nowait()
        except queue.Empty:
            worker = Worker(self._path)
            with self._lock:
                self._all.append(worker)
        try:
            return worker.region(*request)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End them all."""
        for worker in self._all:
            worker.close()


class OpenSlideSource(SegmentedSource):
    """One level. What lies outside of the scanned areas is glass."""

    format = "openslide"
    slide = True

    def __init__(self, files: FileSet, workers: Workers, level: int, said: dict[str, Any]):
        """said : what `openslide_worker.describe` gives for this level."""
        super().__init__(files)
        self.level = level
        self._workers = workers
        width, height = said["size"]
        self._check_size(width, height, MAX_PIXELS, "export a part of it")
        self._downsample = said["downsample"]
        if not 1 <= self._downsample < math.inf:
            self._refuse(f"level {level} claims a downsample of {self._downsample}", "copy or export it again")
        tile_width, tile_height = map(_number, said["tile"])
        self._seg_width = _whole_tiles(tile_width, SEGMENT_WIDTH)
        self._seg_height = _whole_tiles(tile_height, SEGMENT_HEIGHT)

    def _segment(self, row: int, column: int) -> np.ndarray:
        top, left = row * self._seg_height, column * self._seg_width
        width, height = min(self._seg_width, self.width - left), min(self._seg_height, self.height - top)
        x, y = round(left * self._downsample), round(top * self._downsample)
        samples = self._workers.region(x, y, self.level, width, height)
        pixels = np.empty((height, width, 3), np.uint8)
        to_rgb(samples, pixels, alpha=True)
        return pixels

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._workers.close()


def _number(text: str | None) -> float:
    """A number that a slide states; NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _whole_tiles(tile: float, least: int) -> int:
    """A side of at least `least` pixels, a multiple of the tile's where that is not too large."""
    return math.ceil(least / int(tile)) * int(tile) if 1 <= tile <= MAX_TILE_SIDE else least
