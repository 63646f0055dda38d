"""Ray: the cluster that a run is spread over, and the actors that the run has there."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from histoseg_fast.engines.devices import parse_device
from histoseg_fast.engines.gpu_precision import GPU_PRECISIONS
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.extras import need
from histoseg_fast.files import TEMPORARY_SUFFIX
from histoseg_fast.pipeline.actor import SHARE, Actor, Answer, Order, Setup, Started
from histoseg_fast.pipeline.records import writing
from histoseg_fast.pipeline.remote import Staging
from histoseg_fast.pipeline.run import InferOptions
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.plan import Plan

START_TRIES = 3
"""Actors that may die one after the other before one is ready."""
PATIENCE_SECONDS = 10.0
"""After so long a line says what the start waits for."""
CONNECT_SECONDS = 10.0
FAREWELL_SECONDS = 5.0
ADDRESS, USAGE_STATS = "RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED"


@dataclass(frozen=True)
class Crew:
    """How many actors a cluster has room for, and what each takes of its node."""

    actors: int
    threads: int
    gpus: int

    @classmethod
    def fit(cls, nodes: Sequence[Mapping[str, float]], options: InferOptions) -> Crew:
        """By the resources of each node: an actor for each GPU, or one for every `threads` CPUs.

        Where `threads` is 0 an actor takes a node's CPUs, or a GPU's share of them; of different nodes, the fewest.
        Raises UsageError where no node has room for one.
        """
        gpus = int(_wants_gpu(options, any(node.get("GPU", 0) >= 1 for node in nodes)))
        sizes = [(int(node.get("CPU", 0)), int(node.get("GPU", 0)) if gpus else 1) for node in nodes]
        shares = [cpus // count for cpus, count in sizes if 0 < count <= cpus]
        threads = options.threads or min(shares, default=1)
        actors = sum(min(cpus // threads, count) if gpus else cpus // threads for cpus, count in sizes)
        crew = cls(actors, threads, gpus)
        if not actors:
            raise UsageError(f"no node of the Ray cluster has {crew}", fix="see `ray status`, --device and --threads")
        return crew

    def __str__(self) -> str:
        return f"{self.threads} CPU(s)" + " and a GPU" * self.gpus


def _wants_gpu(options: InferOptions, there: bool) -> bool:
    """Whether actors are to run on GPUs; `there` is whether the cluster has any. Raises UsageError: no such device."""
    indices = parse_device(options.device)
    if indices is None:
        return there and options.precision in ("auto", *GPU_PRECISIONS)
    return bool(indices)


class ActorLost(Exception):
    """An actor died, or its node did."""


@dataclass(eq=False)
class Task:
    """An image to do. deaths : actors that died while they had it."""

    source: Source
    deaths: int = 0


@dataclass(eq=False)
class Member:
    """An actor as the driver knows it. mark : the file that it leaves in the folder. starting : a reference to its
    `Started`, until it is ready. at_work : its images, by references to their `Answer`. alone : whether it has one
    image that is to have no other beside it.
    """

    handle: Any
    mark: Path
    starting: Any
    started: Started | None = None
    at_work: dict[Any, Task] = field(default_factory=dict)
    alone: bool = False

    @property
    def room(self) -> int:
        """How many more images it can be given."""
        if self.started is None or (self.alone and self.at_work):
            return 0
        return self.started.room - len(self.at_work)

    def give(self, task: Task, before: Mapping[str, Any] | None) -> None:
        """Let it do an image, whose line in the manifest is `before`."""
        self.alone = task.deaths > 0
        self.at_work[self.handle.segment.remote(Order(task.source, before))] = task


class Cluster:
    """The actors of a run in a Ray cluster; `open_cluster` makes it.

    wanted : how many actors the run can have. device, name, precision, batch : as of `Engine`; what the first actor
    has, and all others get. key : as of `Stream`. lost : whether any died.
    """

    def __init__(self, staging: Staging, report: Callable[[str], None]):
        self._staging, self._report = staging, report
        self.members: list[Member] = []
        self.wanted, self.key, self.lost = 0, "", False
        self._marks: set[Path] = set()
        self._told: set[str] = set()
        self._futile = 0

    def start(self, plan: Plan, options: InferOptions, sources: Sequence[Source]) -> None:
        """Start the first actor and wait for it. Raises as `open_cluster` does."""
        import ray

        nodes: Any = ray.nodes  # which has no types
        crew = Crew.fit([node["Resources"] for node in nodes() if node["Alive"]], options)
        self.wanted = min(crew.actors, len(sources))
        folder, remote = self._staging.folder, self._staging.remote
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        options = replace(options, device="cuda" if crew.gpus else "cpu", threads=crew.threads)
        shared = [source.path for source in sources if source.place is None][:1]
        setup = Setup(plan, options, remote or folder, os.getcwd(), shared, any(source.place for source in sources))
        self._setup = ray.put(setup)
        self._actor: Any = ray.remote(Actor).options(
            num_cpus=crew.threads, num_gpus=crew.gpus, max_restarts=0, max_task_retries=0
        )
        self._report(f"Ray: up to {self.wanted} actor(s), each with {crew}")
        first = self._first(f"waiting for Ray to find {crew} free, and for the engine to start there")
        self.device, self.name, self.precision = first.device, first.name, first.precision
        self.batch, self.key = first.batch, first.key
        self._setup = ray.put(replace(setup, options=replace(options, precision=first.precision)))

    def _first(self, told: str) -> Started:
        """Start one actor and wait for it, saying what for."""
        while True:
            self.hire()
            while not (ready := self.wait(PATIENCE_SECONDS)):
                self._tell("", [told])
            member, _ = ready[0]
            try:
                return self.arrive(member)
            except ActorLost as error:
                self.lose(member, error)

    def hire(self) -> None:
        """Start an actor; it is ready when `arrive` can take it in."""
        mark = self._staging.folder / f".{os.urandom(8).hex()}{TEMPORARY_SUFFIX}"
        handle = self._actor.remote()
        self._marks.add(mark)
        self.members.append(Member(handle, mark, handle.start.remote(self._setup, mark.name)))

    def wait(self, seconds: float) -> list[tuple[Member, Any]]:
        """An actor, and what of it is ready; nothing after so many seconds."""
        import ray

        owners = {ref: member for member in self.members for ref in member.at_work}
        owners |= {member.starting: member for member in self.members if member.started is None}
        ready, _ = ray.wait(list(owners), timeout=seconds)
        return [(owners[ref], ref) for ref in ready]

    def arrive(self, member: Member) -> Started:
        """Take in an actor that is ready.

        Raises ActorLost, what its start raised, and UsageError or EngineError where it does not fit the others.
        """
        started: Started = self._get(member.starting)
        try:
            if self._staging.remote is None:
                member.mark.unlink()
            self._marks.remove(member.mark)
        except FileNotFoundError:
            raise UsageError(f"is another folder on {started.host}", where=self._staging.folder, fix=SHARE) from None
        if self.key not in ("", started.key):
            told = f"{started.host} runs {started.precision} on {started.device}, others {self.precision}"
            raise EngineError(told, fix="name --device and --precision")
        member.started, self._futile = started, 0
        self._tell(f"{started.host}: ", started.lines)
        return started

    def take(self, member: Member, reference: Any) -> dict[str, Any] | None:
        """The entry of an image, None where it was given up. Raises ActorLost, and what ended the stream."""
        assert member.started is not None
        answer: Answer = self._get(reference)
        self._tell(f"{member.started.host}: ", answer.lines)
        return answer.entry

    def lose(self, member: Member, error: ActorLost) -> None:
        """Give up an actor that died. Raises EngineError where one after the other does before it is ready."""
        self.lost = True
        self.dismiss(member)
        if member.started is not None:
            return self._report(
                f"Ray: an actor on {member.started.host} died; it was at {len(member.at_work)} image(s)"
            )
        self._futile += 1
        if self._futile == START_TRIES:
            reason = str(error).strip().splitlines()
            raise EngineError(f"{START_TRIES} actors of Ray died as they started: {reason[-1] if reason else error!r}")

    def dismiss(self, member: Member) -> None:
        """Kill an actor."""
        import ray

        self.members.remove(member)
        ray.kill(member.handle)

    def _get(self, reference: Any) -> Any:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            return ray.get(reference)
        except RayTaskError as error:  # raised in the actor
            raise error.cause from None
        except RayError as error:
            raise ActorLost(str(error)) from None

    def _tell(self, prefix: str, lines: Sequence[str]) -> None:
        """Report what no actor has said before."""
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                self._report(f"{prefix}{line}")

    def close(self) -> None:
        """Kill all actors, once they have left nothing behind."""
        import ray

        starting = [member.starting for member in self.members]
        ready = set(ray.wait(starting, num_returns=len(starting), timeout=0)[0]) if starting else set()
        if farewells := [member.handle.close.remote() for member in self.members if member.starting in ready]:
            ray.wait(farewells, num_returns=len(farewells), timeout=FAREWELL_SECONDS)
        for member in list(self.members):
            self.dismiss(member)

    def clear(self) -> None:
        """Remove what actors left that were still starting when they were killed."""
        for mark in self._marks:
            with contextlib.suppress(OSError):
                mark.unlink()


@contextlib.contextmanager
def open_cluster(
    plan: Plan, options: InferOptions, staging: Staging, sources: Sequence[Source], report: Callable[[str], None]
) -> Iterator[Cluster]:
    """The cluster that RAY_ADDRESS names, or one that runs on this machine, or else one of this machine for this run.

    Its first actor is ready. Raises UsageError where Ray is not installed, no node has room, or folders are not shared,
    EngineError where Ray cannot be reached, and as `open_engine` does.
    """
    need("ray", "ray")
    cluster = Cluster(staging, report)
    try:
        with _connection(), contextlib.closing(cluster):
            cluster.start(plan, options, sources)
            yield cluster
    finally:
        cluster.clear()


@contextlib.contextmanager
def _connection() -> Iterator[None]:
    """Ray, connected unless the caller had done so; what it prints on its own is dropped."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault(USAGE_STATS, "0")
    before = signal.getsignal(signal.SIGTERM)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            _connect()
            yield
        except SystemExit as error:  # Ray's own handler of SIGTERM, which leaves with another code
            raise SystemExit(128 + signal.SIGTERM) from error
        finally:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)


def _connect() -> None:
    import ray

    address = os.environ.get(ADDRESS, "")
    host, _, port = address.rpartition(":")
    if "://" in address:
        fix = "start it on a node of the cluster, as `ray job submit` does"
        raise UsageError("Ray Client is of no use here", where=f"{ADDRESS}={address}", fix=fix)
    try:
        if port.isdecimal():  # Ray itself would wait for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise EngineError(f"Ray cannot be reached or started: {error}", fix=f"check {ADDRESS}") from error
