"""What runs on the nodes of a Ray cluster: one engine under one stream, fed image by image. It knows nothing of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from histoseg_fast import __version__
from histoseg_fast.errors import UsageError
from histoseg_fast.pipeline.outputs import Outputs
from histoseg_fast.pipeline.records import is_complete
from histoseg_fast.pipeline.remote import Remote, Staging
from histoseg_fast.pipeline.run import (
    CPU_STREAMS,
    InferOptions,
    Progress,
    make_outputs,
    make_stream,
    open_stream_engine,
)
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.plan import Plan

REST_SECONDS = 0.05
"""While there is nothing to do, the stream is told so this often."""
SHARE = "give --runner ray folders that all nodes share"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What actors have to know. cwd : the driver's, which relative paths start from. shared : an input that must be in
    sight, if any is a file. urls : whether any is behind a URL. version : the driver's.
    """

    plan: Plan
    options: InferOptions
    out: Path | Remote
    cwd: str
    shared: list[Path]
    urls: bool
    version: str = __version__


@dataclass(frozen=True)
class Started:
    """An actor that is ready, and what its engine is; named as in `Engine`. host : its machine. key : as of `Stream`.
    room : images that keep it busy. lines : for a person.
    """

    host: str
    device: str
    name: str
    precision: str
    batch: int
    key: str
    room: int
    lines: list[str]


@dataclass(frozen=True)
class Order:
    """An image to do. before : its line in the manifest, if it has one."""

    source: Source
    before: Mapping[str, Any] | None


@dataclass(frozen=True)
class Answer:
    """An image that is over. entry : its line for the manifest, or that it was skipped; None where a stop came first.
    lines : for a person.
    """

    entry: Entry | None
    lines: list[str]


class Actor:
    """A stream's sources and its ledger. An order is answered when the stream is done with it; many wait at a time, on
    the event loop that Ray gives an actor with such methods.
    """

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Source] = queue.SimpleQueue()
        self._before: dict[str, Mapping[str, Any] | None] = {}
        self._waiting: dict[str, asyncio.Future[Entry | None]] = {}
        self._lines: list[str] = []
        self._fatal: BaseException | None = None
        self._over = False
        self._held = contextlib.ExitStack()

    async def start(self, setup: Setup, mark: str) -> Started:
        """Open the engine and start the stream; `mark` is a file to leave in `out`, by which the driver sees that they
        share it. Raises UsageError where an input or `out` is not to be had here, and as `open_engine` does.
        """
        self._loop = asyncio.get_running_loop()
        return await asyncio.to_thread(self._start, setup, mark)

    async def segment(self, order: Order) -> Answer:
        """Do one image. Raises what ends the stream (the engine failed, the disk is full)."""
        if self._fatal is not None:
            raise self._fatal
        if self._over:
            return Answer(None, [])
        name = order.source.name
        self._before[name] = order.before
        waiting = self._waiting[name] = self._loop.create_future()
        self._orders.put(order.source)
        return Answer(await waiting, self._take_lines())

    async def stop(self) -> None:
        """Take no new image, give up those of more than one band, finish what is in flight."""
        self._stream.stop()

    async def close(self) -> None:
        """Leave nothing behind on this machine; the process is killed next."""
        await asyncio.to_thread(self._held.close)

    def _take_lines(self) -> list[str]:
        lines, self._lines[:] = self._lines[:], []
        return lines

    # -- in threads ------------------------------------------------------------------------------------

    def _start(self, setup: Setup, mark: str) -> Started:
        host = platform.node()
        if setup.version != __version__:
            told = f"{host} has histoseg-fast {__version__}, the run was started by {setup.version}"
            raise UsageError(told, fix="install one version on all nodes")
        with contextlib.suppress(OSError):  # then it is of no use: what is not there is told below
            os.chdir(setup.cwd)
        try:
            for path in setup.shared:
                os.lstat(path)
            if isinstance(setup.out, Path):
                setup.out.joinpath(mark).touch()
        except OSError as error:
            told = f"is not to be had on {host}: {error.strerror or error}"
            raise UsageError(told, where=error.filename, fix=SHARE) from error
        engine = open_stream_engine(setup.plan, CPU_STREAMS, setup.options, self._lines.append)
        staging = self._held.enter_context(Staging.open(setup.out, setup.urls))
        self._copies = staging.copies
        outputs = make_outputs(setup.plan, setup.options, staging.folder, Outputs, staging.remote)
        progress = Progress(image=self._settle)
        sources = self._copies.ahead(self._sources())
        self._stream = make_stream(engine, setup.plan, sources, outputs, self, setup.options, progress)
        threading.Thread(target=self._run, name="stream", daemon=True).start()
        workers = self._stream.workers
        room = workers["read"] + workers["write"] + engine.depth * self._stream.batch + 1
        known = engine.device, engine.name, engine.precision, engine.batch, self._stream.key
        return Started(host, *known, room, self._take_lines())

    def _run(self) -> None:
        try:
            self._stream.run()
        except BaseException as error:  # for those who wait
            self._fatal = error
        self._over = True
        self._loop.call_soon_threadsafe(self._end)

    def _sources(self) -> Iterator[Source | None]:
        while True:
            try:
                yield self._orders.get(timeout=REST_SECONDS)
            except queue.Empty:
                yield None

    def _settle(self, entry: Entry) -> None:
        self._loop.call_soon_threadsafe(self._answer, entry)

    def complete(
        self, name: str, sha256: str, key: str, paths: Mapping[str, str], digest: Callable[[str], str | None], /
    ) -> bool:
        """As `is_complete` has it, by the line that came with the order."""
        return is_complete(self._before[name], sha256, key, paths, digest)

    def add(self, entry: Entry, /) -> None:
        """Nothing: the driver keeps the manifest."""

    # -- on the loop -----------------------------------------------------------------------------------

    def _answer(self, entry: Entry) -> None:
        self._copies.over(entry)
        del self._before[entry["input"]]
        self._waiting.pop(entry["input"]).set_result(entry)

    def _end(self) -> None:
        for waiting in self._waiting.values():
            if self._fatal is None:
                waiting.set_result(None)
            else:
                waiting.set_exception(self._fatal)
        self._waiting.clear()
