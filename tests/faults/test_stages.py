"""A signal, a bug, no memory or a clock that runs backwards, in every stage of a run: one line, the right exit code,
and the next run ends as if nothing had happened.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from children import Child, Ended, fake_engine, run_child
from running import PATIENCE, entries, make_pictures, partials, results

from histoseg_fast.images import write_png

IMAGES = 8
STAGES = {
    "open": ("histoseg_fast.pipeline.sources", "open_image"),
    "read": ("histoseg_fast.pipeline.job.Job", "fill_band"),
    "take a slot": ("histoseg_fast.pipeline.ring.Ring", "take"),
    "submit": ("running.FakeEngine", "submit"),
    "wait": ("running.FakeEngine", "wait"),
    "stitch": ("histoseg_fast.pipeline.job.Job", "stitch"),
    "write": ("histoseg_fast.pipeline.job.Job", "write"),
    "finish": ("histoseg_fast.pipeline.job.Job", "finish"),
    "manifest": ("histoseg_fast.pipeline.records.Manifest", "add"),
}
"""What every image goes through, with some of its work done."""
START = {
    "plan": ("histoseg_fast.plans", "open_plan"),
    "find": ("histoseg_fast.pipeline.run", "find_sources"),
    "engine": ("histoseg_fast.pipeline.run", "open_stream_engine"),
    "partials": ("histoseg_fast.pipeline.records", "clear_partials"),
}
END = {
    "summary": ("histoseg_fast.pipeline.run", "write_summary"),
    "run.json": ("histoseg_fast.pipeline.run", "write_run"),
}
AT = [1, 5]
"""The call in which it happens."""

Run = Callable[..., Ended]


def break_call(place: tuple[str, str], at: int, act: Callable[[], None]) -> None:
    """A fault: run `act` in call `at` of the function at `place`, before it does anything; the engine is a fake."""
    fake_engine()
    owner_name, name = place
    try:
        owner = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, kind = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    whole, calls = getattr(owner, name), itertools.count(1)

    def broken(*arguments: object, **options: object) -> object:
        if next(calls) == at:
            act()
        return whole(*arguments, **options)

    setattr(owner, name, broken)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.02)  # the signal is the main thread's to handle


def no_memory() -> None:
    raise MemoryError


def bug() -> None:
    raise KeyError("a bug")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_plan_path: Path) -> tuple[list[object], dict[str, bytes]]:
    """Arguments of a run of several bands an image, and the results of one that was left alone."""
    folder = tmp_path_factory.mktemp("stages")
    make_pictures(folder / "in", IMAGES, 150, 70)
    arguments = ["infer", folder / "in", "--engine", tiny_plan_path, "--overlay", "--tile", 64, "--threads", 2, "--out"]
    assert run_child(folder, *arguments, folder / "plain", fault=fake_engine).code == 0
    return arguments, results(folder / "plain")


def check_resumes(plain: tuple[list[object], dict[str, bytes]], tmp_path: Path, complete: int | None = None) -> None:
    """After a broken run: nothing half-written, what is done is skipped, and the results are those of a whole run."""
    arguments, whole = plain
    out = tmp_path / "out"
    assert not partials(out)
    done = [e for e in entries(out).values() if e["status"] == "done"] if (out / "manifest.jsonl").exists() else []
    assert complete is None or len(done) == complete
    for name, data in results(out).items():
        assert data == whole[name] or name == "summary.csv"
    run = run_child(tmp_path, *arguments, out, fault=fake_engine)
    assert run.code == 0 and f"{IMAGES - len(done)} done, 0 failed, {len(done)} skipped" in run.out
    assert results(out) == whole


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("stage", STAGES)
def test_sigterm_in_every_stage(plain, tmp_path: Path, stage: str, at: int) -> None:
    ended = run_child(
        tmp_path, *plain[0], tmp_path / "out", fault=functools.partial(break_call, STAGES[stage], at, terminate)
    )
    assert ended.code == 128 + signal.SIGTERM
    assert ended.errors[-1] == "interrupted; run the same command again to go on" and len(ended.errors) <= 2
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["interrupted"] is True
    check_resumes(plain, tmp_path, complete=record["images_done"])


@pytest.mark.parametrize("stage", START)
def test_sigterm_before_the_first_image(plain, tmp_path: Path, stage: str) -> None:
    """Nothing is in flight yet: the signal simply ends the process, as a shell's 143."""
    fault = functools.partial(break_call, START[stage], 1, terminate)
    ended = run_child(tmp_path, *plain[0], tmp_path / "out", fault=fault)
    assert ended.code == -signal.SIGTERM and not ended.err
    check_resumes(plain, tmp_path, complete=0)


@pytest.mark.parametrize("stage", END)
def test_sigterm_after_the_last_image(plain, tmp_path: Path, stage: str) -> None:
    ended = run_child(
        tmp_path, *plain[0], tmp_path / "out", fault=functools.partial(break_call, END[stage], 1, terminate)
    )
    assert ended.code == 128 + signal.SIGTERM
    check_resumes(plain, tmp_path, complete=IMAGES)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("stage", STAGES)
def test_no_memory_in_every_stage(plain, tmp_path: Path, stage: str, at: int) -> None:
    """Where it can, it costs the image that is too large; else the run ends, and says why."""
    fault = functools.partial(break_call, STAGES[stage], at, no_memory)
    ended = run_child(tmp_path, *plain[0], tmp_path / "out", fault=fault)
    assert ended.code in (1, 3) and len(ended.errors) == 1 and "not enough memory" in ended.errors[0]
    if ended.code == 3:
        assert ended.errors[0].startswith("failed: image_00") or "image_00" in ended.errors[0]
        failed = [entry for entry in entries(tmp_path / "out").values() if entry["status"] == "failed"]
        assert len(failed) == 1 and len(entries(tmp_path / "out")) == IMAGES
    else:
        assert ended.errors[0].startswith("histoseg-fast: ")
    check_resumes(plain, tmp_path)


@pytest.mark.parametrize("stage", [*STAGES, *START, *END])
def test_a_bug_in_every_stage_is_one_line(plain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    place = (STAGES | START | END)[stage]
    fault = functools.partial(break_call, place, 3 if stage in STAGES else 1, bug)
    ended = run_child(tmp_path, *plain[0], tmp_path / "out", fault=fault, bug=True)
    assert ended.code == 1 and len(ended.errors) == 1
    assert ended.errors[0].startswith("histoseg-fast: unexpected KeyError: 'a bug'; set HISTOSEG_TRACEBACK=1")
    check_resumes(plain, tmp_path)


def turn_back_the_clock() -> None:
    """The time of day goes back by an hour each time it is asked for."""
    fake_engine()
    start, steps = time.time(), itertools.count(1)
    time.time = lambda: start - 3600 * next(steps)
    time.time_ns = lambda: int(time.time() * 1e9)


def test_a_clock_that_runs_backwards(plain, tmp_path: Path) -> None:
    """Only a steady clock is used, and files are compared by digest: those of a run may be older than its inputs."""
    arguments, whole = plain
    out = tmp_path / "out"
    fault = functools.partial(break_call, STAGES["write"], 5, terminate)
    assert run_child(tmp_path, *arguments, out, fault=fault).code == 128 + signal.SIGTERM
    done = len(entries(out))
    for i, path in enumerate(sorted(out.rglob("*.*"))):  # the future, the past, before 1970
        os.utime(path, [(2**33, 2**33), (0, 0), (-(2**20), -(2**20))][i % 3])
    run = run_child(tmp_path, *arguments, out, fault=turn_back_the_clock)
    assert run.code == 0 and f"{IMAGES - done} done, 0 failed, {done} skipped" in run.out
    assert results(out) == whole
    record = json.loads((out / "run.json").read_text())
    assert 0 < record["wall_seconds"] < PATIENCE and all(s >= 0 for s in record["stage_seconds"].values())
    for entry in entries(out).values():
        assert entry["latency"] >= 0 and min(entry["seconds"].values()) >= 0


def wait_for(go: str) -> None:
    """In call 3 of the engine, wait until the file `go` is there."""

    def wait() -> None:
        while not os.path.exists(go):
            time.sleep(0.005)

    break_call(STAGES["wait"], 3, wait)


def test_a_second_run_into_the_same_folder_refuses(plain, tmp_path: Path) -> None:
    arguments, whole = plain
    out = tmp_path / "out"
    first = Child(tmp_path, *arguments, out, fault=functools.partial(wait_for, str(tmp_path / "go")))
    deadline = time.monotonic() + PATIENCE
    while not list(out.rglob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.005)
    before = {path: path.stat().st_ino for path in out.rglob("*")}
    assert any(path.suffix == ".partial" for path in before)
    for _ in range(3):
        ended = run_child(tmp_path, *arguments, out, fault=fake_engine)
        assert ended.code == 2 and len(ended.errors) == 1
        assert "another run is writing here; wait for it, or use another --out" in ended.errors[0]
    assert before.items() <= {path: path.stat().st_ino for path in out.rglob("*")}.items()
    (tmp_path / "go").touch()
    ended = first.wait()
    assert ended.code == 0 and f"{IMAGES} done, 0 failed, 0 skipped" in ended.out
    assert results(out) == whole


def limit_memory(room: int) -> None:
    """Leave `room` bytes of address space beyond what the process has now."""
    import resource

    fake_engine()
    threading.stack_size(1 << 20)
    with open("/proc/self/statm") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit on memory is Linux's")
def test_an_image_that_memory_does_not_hold_costs_itself_alone(plain, tmp_path: Path) -> None:
    """The limit is the system's: an allocation fails for real."""
    arguments, whole = plain
    folder = tmp_path / "in"
    make_pictures(folder, IMAGES, 150, 70)
    write_png(folder / "large.png", np.zeros((8_000, 9_000, 3), np.uint8))
    out = tmp_path / "out"
    fault = functools.partial(limit_memory, 180 << 20)
    ended = run_child(tmp_path, "infer", folder, *arguments[2:], out, fault=fault)
    assert ended.code == 3 and f"{IMAGES} done, 1 failed" in ended.out
    assert len(ended.errors) == 1 and "large.png: there is not enough memory" in ended.errors[0]
    assert results(out) == whole and not partials(out)
