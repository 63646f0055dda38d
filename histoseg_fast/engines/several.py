"""Several engines, one on each device, behind the interface of one: all slots are fed from one queue."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from itertools import zip_longest
from weakref import WeakKeyDictionary

from histoseg_fast.engines.base import Engine, Slot


class SeveralEngines(Engine):
    """`engines` of one kind, in one precision; closes them. A batch runs on the engine that its slot belongs to."""

    def __init__(self, engines: Sequence[Engine]):
        self._engines = tuple(engines)
        first = self._engines[0]
        indices = ",".join(engine.device.partition(":")[2] for engine in self._engines)
        self.device, self.precision = f"{first.device.partition(':')[0]}:{indices}", first.precision
        self.name = "; ".join(dict.fromkeys(engine.name for engine in self._engines))
        self.batch, self.depth = first.batch, sum(engine.depth for engine in self._engines)
        self._owners: WeakKeyDictionary[Slot, Engine] = WeakKeyDictionary()

    def slots(self, count: int) -> list[Slot]:
        """`count` slots, the engines taking turns: whoever takes the free one first keeps all of them busy."""
        total = len(self._engines)
        made = [engine.slots(len(range(i, count, total))) for i, engine in enumerate(self._engines)]
        for slots, engine in zip(made, self._engines, strict=True):
            self._owners.update(dict.fromkeys(slots, engine))
        return [slot for turn in zip_longest(*made) for slot in turn if slot is not None]

    def submit(self, slot: Slot) -> None:
        self._owners[slot].submit(slot)

    def wait(self, slot: Slot) -> None:
        self._owners[slot].wait(slot)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for engine in self._engines:
                stack.callback(engine.close)
