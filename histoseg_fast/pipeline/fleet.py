"""A run over the actors of a Ray cluster: it deals images out, and keeps manifest and totals, as a stream does."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from histoseg_fast.errors import ImageError
from histoseg_fast.pipeline.cluster import ActorLost, Cluster, Member, Task
from histoseg_fast.pipeline.outputs import Outputs
from histoseg_fast.pipeline.records import Manifest, clear_partials
from histoseg_fast.pipeline.run import Progress
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.tiling import Tiling

TRIES = 3
"""An image that so many actors died with has failed. After the first it is given to an actor that has no other, so that
it costs its neighbours nothing more.
"""
POLL_SECONDS = 0.1


class FleetStream:
    """Stands where a `Stream` does; each actor has one of its own, and as many images as keep it busy.

    engine, tiling, totals, outputs, batch, key : as of `Stream`.
    """

    def __init__(
        self,
        cluster: Cluster,
        sources: Sequence[Source],
        outputs: Outputs,
        manifest: Manifest,
        progress: Progress,
        *,
        tiling: Tiling,
        batch: int,
    ):
        self.engine, self.outputs, self.tiling, self.batch = cluster, outputs, tiling, batch
        self.key, self.totals = cluster.key, Totals()
        self._manifest, self._progress = manifest, progress
        self._fresh = deque(Task(source) for source in sources)
        self._suspects: deque[Task] = deque()
        self._stop = threading.Event()
        self._told_stop = False

    def run(self, poll: Callable[[], None] = lambda: None) -> Totals:
        """Work until all is done or stopped; `poll` is called ten times a second or more. Raises what ended the run."""
        cluster, ended = self.engine, False
        try:
            while self._staff():
                for member in cluster.members:
                    self._deal(member)
                for member, reference in cluster.wait(POLL_SECONDS):
                    self._collect(member, reference)
                poll()
            ended = True
        finally:
            cluster.close()
            if cluster.lost or not ended:
                self._clear()
        return self.totals

    def _clear(self) -> None:
        """Remove what actors that are gone left half-written, where no other run can be in the folder."""
        if self._manifest.locked:
            with contextlib.suppress(OSError):  # what ended the run is what is told
                clear_partials(self.outputs.folder)

    def stop(self) -> None:
        """Take no new image, give up those of more than one band, finish what is in flight. For signal handlers too."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stop.is_set()

    def _staff(self) -> bool:
        """See that there are as many actors as there is work for; whether there is any work left."""
        cluster = self.engine
        at_work = sum(len(member.at_work) for member in cluster.members)
        if self.stopped:
            if not self._told_stop:
                self._told_stop = True
                for member in cluster.members:
                    if member.at_work:
                        member.handle.stop.remote()
            return at_work > 0
        waiting = len(self._fresh) + len(self._suspects)
        while len(cluster.members) < min(cluster.wanted, waiting):
            cluster.hire()
        return at_work + waiting > 0

    def _deal(self, member: Member) -> None:
        """Give an actor what it has room for: one suspect, or others."""
        while not self.stopped and member.room > 0:
            if self._suspects and not member.at_work:
                task = self._suspects.popleft()
            elif self._fresh:
                task = self._fresh.popleft()
            else:
                return
            member.give(task, self._manifest.entries.get(task.source.name))

    def _collect(self, member: Member, reference: Any) -> None:
        """Take what an actor has to give: that it is ready, an image, or its death."""
        try:
            if reference == member.starting:
                self.engine.arrive(member)
                return
            entry = self.engine.take(member, reference)
        except ActorLost as error:
            self.engine.lose(member, error)
            for task in member.at_work.values():
                self._suspect(task)
            return
        del member.at_work[reference]
        if entry is not None:
            self._report(entry)

    def _suspect(self, task: Task) -> None:
        """Do an image again, or give it up."""
        task.deaths += 1
        if task.deaths < TRIES:
            return self._suspects.append(task)
        source, engine = task.source, self.engine
        fix = "see whether memory was short; try it alone with --runner local"
        error = ImageError(f"given up: {TRIES} actors of Ray died with it", where=source.url or source.path, fix=fix)
        self._progress.failure(source, error)
        known = {"engine": engine.name, "device": engine.device, "precision": engine.precision}
        self._report({"input": source.name, "path": source.shown, **known, "status": "failed", "error": str(error)})

    def _report(self, entry: dict[str, Any]) -> None:
        if entry["status"] != "skipped":
            self._manifest.add(entry)
        self.totals.count(entry)
        if entry["status"] == "done":
            self.totals.segmented += entry["width"] * entry["height"] - entry["glass_pixels"]
        self._progress.image(entry)
