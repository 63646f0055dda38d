"""Short, repeatable runs of every fuzzer, their seeds, and what longer runs found."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import targets
from running import PATIENCE

from histoseg_fast.errors import DataError
from histoseg_fast.pipeline.merge import merge
from histoseg_fast.pipeline.records import MANIFEST, RUN, read_entries, read_run

RUNS = 400


@pytest.fixture(autouse=True)
def _limits(monkeypatch: pytest.MonkeyPatch) -> None:
    targets.lower_limits(monkeypatch)


def test_every_target_can_be_called_by_its_name() -> None:
    assert tuple(targets.TARGETS) == fuzz.NAMES


@pytest.mark.parametrize("name", targets.TARGETS)
def test_seeds_are_sound_and_cut_or_changed_ones_are_refused_in_one_line(name: str) -> None:
    """Without atheris too; `make sanitize` runs this as well."""
    if name == "checkpoint":
        pytest.importorskip("torch")
    target = targets.TARGETS[name]
    for seed in target.seeds():
        assert len(seed) <= target.max_bytes
        if b"Philips" not in seed:
            target.read(seed)
        for i in range(0, len(seed), max(1, len(seed) // 40)):
            targets.check(target, seed[:i])
            targets.check(target, seed[:i] + bytes([seed[i] ^ 0x80]) + seed[i + 1 :])
            if target.mutate is not None:
                targets.check(target, target.mutate(seed, random.Random(i)))


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.TARGETS)
def test_a_short_run_finds_nothing(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; its wheels are for Linux on x86_64 and CPython 3.10 to 3.14")
    if name == "checkpoint":
        pytest.importorskip("torch")
    command = [sys.executable, fuzz.__file__, name, "--runs", str(RUNS), "--seed", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    executed = re.search(r"number_of_executed_units: (\d+)", done.stderr)
    assert executed and int(executed[1]) >= RUNS
    assert not list(tmp_path.iterdir())


def records() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """run.json, and the lines of a done and of a failed image."""
    run, _, lines = next(targets.record_seeds()).partition(b"\0")
    done, failed = map(json.loads, lines.splitlines())
    return json.loads(run), done, failed


def write(folder: Path, run: dict[str, Any], *lines: dict[str, Any]) -> Path:
    (folder / "masks").mkdir(parents=True)
    for name in "ac":
        (folder / "masks" / f"{name}.png").write_bytes(targets.MASK)
    (folder / RUN).write_text(json.dumps(run))
    (folder / MANIFEST).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("key", ["input", "mask", "path", "warnings"])
def test_half_of_a_surrogate_pair_makes_no_line(tmp_path: Path, key: str) -> None:
    """No file has such a name, and it can be written to no file."""
    run, done, failed = records()
    for text in ("masks/\ud800", "masks/\udbff\udbff"):
        folder = write(tmp_path / ascii(text)[-6:-1], run, done | {key: text}, failed)
        assert list(read_entries(folder / MANIFEST)[0]) == ["b"]
    kept = write(tmp_path / "kept", run, done | {"input": "\udc80\U0001f600"}, failed)
    assert list(read_entries(kept / MANIFEST)[0]) == ["\udc80\U0001f600", "b"]


def test_half_of_a_surrogate_pair_in_run_json(tmp_path: Path) -> None:
    run, done, _ = records()
    folder = write(tmp_path / "out", run | {"classes": ["\ud800", "a", "b"]}, done)
    with pytest.raises(DataError, match="is damaged"):
        read_run(folder)


HUGE = 10**400
DAMAGED: dict[str, dict[str, Any]] = {
    "sides beyond floats": {"width": HUGE, "height": HUGE},
    "glass beyond floats": {"glass_pixels": HUGE},
    "more glass than pixels": {"glass_pixels": 7},
    "a name too long": {"mask": "masks/" + "a" * 3000},
    "a path too long": {"mask": "masks/" + "a/" * 3000},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_line_costs_its_image_and_not_the_merge(tmp_path: Path, name: str) -> None:
    run, done, failed = records()
    other = done | {"input": "c", "mask": "masks/c.png"}
    for line, status in ((other, "done"), (other | DAMAGED[name], "failed")):
        folder = write(tmp_path / status, run | {"shard": None}, done, line, failed)
        merge([folder], tmp_path / "merged" / status)
        entries, _ = read_entries(tmp_path / "merged" / status / MANIFEST)
        assert {name: entry["status"] for name, entry in entries.items()} == {"a": "done", "b": "failed", "c": status}


@pytest.fixture(scope="module", autouse=True)
def _folder() -> Iterator[None]:
    yield
    targets.FOLDER.cleanup()
