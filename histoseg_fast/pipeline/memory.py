"""Results in memory: the stream of `infer`, whose masks become arrays that an iterator gives away."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from histoseg_fast.errors import HistosegError
from histoseg_fast.images import ImageSource
from histoseg_fast.pipeline.outputs import Outputs, Writer
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.pipeline.stream import Stream
from histoseg_fast.pipeline.tissue import Overview

Array = npt.NDArray[np.uint8]
Image = str | os.PathLike[str] | Array
"""What can be segmented: a file, or RGB uint8 (H, W, 3)."""
GivenT = TypeVar("GivenT", bound=Image)

WAITING_RESULTS = 2
"""Results that wait for the one who iterates; then the stream does."""
LOOK_SECONDS = 0.1
"""A thread that waits to hand over a result looks this often whether it is still wanted."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The classes of one image.

    Attributes
    ----------
    classes : uint8 (H, W), class ids; H and W are the image's, or at another resolution those of the grid read.
    pixels : how many pixels each class has, by its name, in the order of the ids.
    mean_confidence : 0 to 1, the network's probability of the winning class, averaged over the segmented pixels (before
        post-processing); None for a slide of nothing but glass.
    probabilities : uint8 (classes, H, W), 255 = certain, of the network itself; None unless asked for.
    mpp : micrometres a pixel of `classes`; None where the image does not say.
    warnings : what a reader of the results should know, one clause each; mostly empty.
    device, engine, precision : what ran: "cpu" or "cuda:0", the library and its version, "int8" and the like.
    """

    classes: Array
    pixels: Mapping[str, int]
    mean_confidence: float | None
    probabilities: Array | None
    mpp: float | None
    warnings: tuple[str, ...]
    device: str
    engine: str
    precision: str


class ArrayWriter:
    """Rows of one result into an array, which `finish` gives to `deliver`. rows : the axis of rows in `shape`."""

    def __init__(self, shape: tuple[int, ...], rows: int, deliver: Callable[[Array], None]):
        self._array = np.empty(shape, np.uint8)
        self._by_rows = np.moveaxis(self._array, rows, 0)
        self._axis, self._deliver, self._row = rows, deliver, 0

    def write_rows(self, rows: Array, /) -> None:
        """Take the next rows, uint8, of any strides; their shape is the array's, but for the axis of rows."""
        rows = np.moveaxis(rows, self._axis, 0)
        self._by_rows[self._row : self._row + len(rows)] = rows
        self._row += len(rows)

    def finish(self) -> str:
        """Deliver the array. There is no file, so its digest is ""."""
        self._deliver(self._array)
        return ""

    def abort(self) -> None:
        """Nothing: an array that nobody holds is gone."""


@dataclass(frozen=True)
class MemoryOutputs(Outputs):
    """Class maps and, where wanted, probabilities as `arrays`, by kind and stem; `folder` is of no use."""

    arrays: dict[tuple[str, str], Array] = field(default_factory=dict)

    def paths(self, stem: str, *, slide: bool) -> dict[str, str]:
        """What is made of an image, by kind; the stem stands for the array."""
        return dict.fromkeys(("mask", "probabilities") if self.probabilities else ("mask",), stem)

    def open_writer(self, kind: str, name: str, image: ImageSource, overview: Overview | None) -> Writer:
        """The writer of one of `paths`, of `image`. Raises MemoryError."""

        def deliver(array: Array) -> None:
            self.arrays[kind, name] = array

        if kind == "mask":
            return ArrayWriter((image.height, image.width), 0, deliver)
        return ArrayWriter((len(self.palette.names), image.height, image.width), 1, deliver)


class Results(Generic[GivenT]):
    """What a stream over `images` gives, in the order in which it is done; the stream's sources and its ledger.

    A thread that has a result waits until there is room for it, so that memory does not depend on how many `images`
    there are. The stream takes them one by one, from threads of its own.
    """

    def __init__(self, images: Iterable[GivenT], outputs: MemoryOutputs):
        self._images, self._outputs = images, outputs
        self._given: dict[int, GivenT] = {}
        self._queue: queue.Queue[tuple[int, Segmentation | HistosegError] | None] = queue.Queue(WAITING_RESULTS)
        self._closed = threading.Event()
        self._fatal: BaseException | None = None

    def sources(self) -> Iterator[Source]:
        """The images for the stream, numbered by their stems."""
        for number, image in enumerate(self._images):
            self._given[number] = image
            yield _source(number, image)

    def complete(
        self, name: str, sha256: str, key: str, paths: Mapping[str, str], digest: Callable[[str], str | None], /
    ) -> bool:
        """Never: nothing is left of an earlier run."""
        return False

    def add(self, entry: dict[str, Any], /) -> None:
        """Take the result of an image that is done; `fail` takes the others."""
        if entry["status"] == "done":
            stem = entry["mask"]
            self._hand_over((int(stem), self._segmentation(stem, entry)))

    def fail(self, source: Source, error: HistosegError) -> None:
        """Take an image that failed."""
        for kind in self._outputs.paths(source.stem, slide=False):  # the first of two may be there
            self._outputs.arrays.pop((kind, source.stem), None)
        self._hand_over((int(source.stem), error))

    def _segmentation(self, stem: str, entry: dict[str, Any]) -> Segmentation:
        arrays = self._outputs.arrays
        return Segmentation(
            arrays.pop(("mask", stem)),
            entry["pixels"],
            entry["mean_confidence"],
            arrays.pop(("probabilities", stem), None),
            entry["mpp"],
            tuple(entry["warnings"]),
            entry["device"],
            entry["engine"],
            entry["precision"],
        )

    def _hand_over(self, item: tuple[int, Segmentation | HistosegError] | None) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=LOOK_SECONDS)
            except queue.Full:
                continue

    def of(self, stream: Stream) -> Generator[tuple[GivenT, Segmentation | HistosegError], None, None]:
        """Run `stream` and give each image as it was given, with its result or what is wrong with it.

        Raises what ends the stream, after the results that were there before. No thread outlives the iterator, also
        where it is closed early; then what is in flight is dropped.
        """
        runner = threading.Thread(target=self._run, args=(stream,), name="stream", daemon=True)

        def close() -> None:
            self._closed.set()
            runner.join()

        runner.start()
        # An iterator that a script leaves behind is closed when threads can no longer run: too late to wait for them.
        atexit.register(close)
        try:
            while (item := self._queue.get()) is not None:
                number, result = item
                yield self._given.pop(number), result
        finally:
            close()
            atexit.unregister(close)
        if self._fatal is not None:
            raise self._fatal

    def _run(self, stream: Stream) -> None:
        try:
            stream.run(self._poll)
        except BaseException as error:  # for the thread that iterates
            self._fatal = error
        self._hand_over(None)

    def _poll(self) -> None:
        if self._closed.is_set():
            raise _Closed


def _source(number: int, image: Image) -> Source:
    if isinstance(image, np.ndarray):
        return Source(Path("array"), "array", str(number), image)
    return Source(Path(image), os.fspath(image), str(number))


class _Closed(Exception):
    """The results are no longer wanted; never seen outside."""
