"""kill -9 at any moment: what was complete stays, nothing half-written bears a real name, and the next run ends as if
nothing had happened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from children import fake_engine, run_child
from running import entries, make_pictures, partials, results
from tiny_plans import tiny_manifest

from histoseg_fast.plan import MODEL, Plan, read_plan, write_plan

KILLS = 50
SEED = 2024
MAX_DELAY = 0.004
"""Seconds between the operation on a file that a kill waits for and the kill: it strikes between operations as well."""
OUTPUTS = [("mask", "masks"), ("overlay", "overlays"), ("geojson", "geojson"), ("probabilities", "probabilities")]


def on_event(below: str, act: Callable[[int], None]) -> None:
    """Call `act` with the number of each operation on a file whose name holds `below`, as Python audits them."""
    lock, count = threading.Lock(), 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and below in str(arguments[0]):
            with lock:
                count += 1
                number = count
            act(number)

    sys.addaudithook(hook)


def count_events(below: str, path: str) -> None:
    """A fault that is none: leave the number of operations in `path`."""
    fake_engine()
    numbers: list[int] = []
    on_event(below, numbers.append)
    finish = sys.exit

    def leave(code: object) -> None:
        Path(path).write_text(str(len(numbers)))
        finish(code)

    sys.exit = leave  # type: ignore[assignment]


def kill_at(below: str, number: int, delay: float) -> None:
    """kill -9 `delay` seconds after operation `number`."""
    fake_engine()
    due = threading.Event()

    def kill() -> None:
        due.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    on_event(below, lambda n: due.set() if n == number else None)


def check_killed(out: Path, whole: dict[str, bytes]) -> int:
    """What a killed run may leave behind; the number of images that it completed."""
    for name, data in results(out).items():
        if not name.endswith(".partial"):
            assert whole[name] == data, f"{name} is half written"
    if not (out / "manifest.jsonl").exists():
        return 0
    lines = [line for line in (out / "manifest.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    for entry in map(json.loads, lines):
        assert entry["status"] == "done"
        for kind, folder in OUTPUTS:
            assert entry[kind].startswith(f"{folder}/")
            assert hashlib.sha256((out / entry[kind]).read_bytes()).hexdigest() == entry[f"{kind}_sha256"]
    assert not (out / "run.json").exists() or len(lines) == len(whole) // len(OUTPUTS)
    return len({json.loads(line)["input"] for line in lines})


def test_fifty_kills_at_random_moments_lose_nothing(tmp_path: Path, tiny_plan_path: Path) -> None:
    make_pictures(tmp_path / "in", 6, 90, 70)
    wanted = ("--overlay", "--probabilities", "--geojson", "--tile", 64, "--threads", 2)
    arguments = ("infer", tmp_path / "in", "--engine", tiny_plan_path, *wanted, "--out")
    plain, logs = tmp_path / "plain", tmp_path / "logs"
    counted = functools.partial(count_events, str(plain), str(tmp_path / "count"))
    assert run_child(logs, *arguments, plain, fault=counted).code == 0
    total, whole = int((tmp_path / "count").read_text()), results(plain)
    assert total > 30 and len(whole) == 6 * len(OUTPUTS) + 1
    dice, struck, resumed = random.Random(SEED), 0, 0
    out = tmp_path / "out0"
    for i in range(KILLS):
        fault = functools.partial(kill_at, str(out), dice.randint(1, total), dice.uniform(0, MAX_DELAY))
        ended = run_child(logs, *arguments, out, fault=fault)
        assert ended.code in (-signal.SIGKILL, 0) and not ended.errors  # 0: it was over sooner
        struck += ended.code != 0
        complete = check_killed(out, whole)
        if dice.random() < 0.5:
            continue  # killed once more, in the same folder
        run = run_child(logs, *arguments, out, fault=fake_engine)
        assert run.code == 0 and f"{6 - complete} done, 0 failed, {complete} skipped" in run.out
        assert results(out) == whole and not partials(out) and len(entries(out)) == 6
        resumed += 1
        out = tmp_path / f"out{i + 1}"
    assert struck > KILLS // 2 and resumed > KILLS // 4


@pytest.mark.parametrize("there", [False, True])
def test_a_plan_is_the_old_one_or_the_new_one_whenever_its_writer_is_killed(
    tmp_path: Path, tiny_plan: Plan, tiny_plan_path: Path, there: bool
) -> None:
    path = tmp_path / "made" / "x.plan"
    old = tiny_manifest(name="old")
    seen = set()
    for number in range(1, 9):
        if there:
            write_plan(path, old, tiny_plan.members)
        fault = functools.partial(write_and_die, str(path), str(tiny_plan_path), number)
        ended = run_child(tmp_path / "logs", "--version", fault=fault)
        assert ended.code in (-signal.SIGKILL, 0)
        found = read_plan(path).name if path.exists() else None
        seen.add(found)
        assert found in ("old" if there else None, "tiny") and (ended.code != 0 or found == "tiny")
    assert seen == {"old" if there else None, "tiny"}


def write_and_die(path: str, source: str, number: int) -> None:
    """Write the plan in `source` to `path`; kill -9 at operation `number`, or after the last."""
    plan = read_plan(source)
    on_event(os.path.dirname(path), lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)
    write_plan(path, tiny_manifest(), {MODEL: plan.members[MODEL]})
