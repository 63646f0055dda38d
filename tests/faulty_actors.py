"""Actors that break, for the tests of --runner ray; a module of its own, as Ray's processes import it."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from histoseg_fast.errors import EngineError, ImageError
from histoseg_fast.pipeline.actor import Actor, Answer, Order, Setup, Started


class Dying(Actor):
    """Its process ends with images called killer, and once with those called once."""

    async def segment(self, order: Order) -> Answer:
        path = Path(order.source.path)
        if path.stem == "killer":
            os._exit(1)
        if path.stem == "once" and not path.with_suffix(".died").exists():
            path.with_suffix(".died").touch()
            os._exit(1)
        return await super().segment(order)


class Holding(Actor):
    """The first to be given an image called held never answers; the next does it."""

    async def segment(self, order: Order) -> Answer:
        path = Path(order.source.path)
        if path.stem == "held" and not path.with_suffix(".seen").exists():
            path.with_suffix(".seen").touch()
            await asyncio.Event().wait()
        return await super().segment(order)


class DyingAtStart(Actor):
    """Its process ends before it is ready."""

    def _start(self, setup: Setup, mark: str) -> Started:
        os._exit(1)


class WithoutEngine(Actor):
    """Its engine cannot run."""

    def _start(self, setup: Setup, mark: str) -> Started:
        raise EngineError("the device is gone", fix="look for it")


class Elsewhere(Actor):
    """On its node the folder of results is another one."""

    def _start(self, setup: Setup, mark: str) -> Started:
        assert isinstance(setup.out, Path)
        other = setup.out.with_name("other")
        other.mkdir()
        return super()._start(replace(setup, out=other), mark)


class OtherVersion(Actor):
    """Its node has another version installed."""

    def _start(self, setup: Setup, mark: str) -> Started:
        return super()._start(replace(setup, version="0.0.1"), mark)


class DiskFull(Actor):
    """Its stream ends, as on a full disk, with the third image that it is given."""

    given = 0

    async def segment(self, order: Order) -> Answer:
        self.given += 1
        if self.given == 3:
            self._stream._die(ImageError("no space left", where="disk"))
        return await super().segment(order)
