"""A disk that is full or may only be read: one line, nothing half-written, nothing lost.

The disks are file systems of a few kilobytes (tmpfs), mounted by the test; where this user may not mount one, these
tests skip, and the last ones here, with patched writes, still run.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import fake_engine, run_child
from disks import Disk, small_disk
from running import FakeEngine, make_pictures, partials, results, run_stream
from slide_files import halves, write_pyramid
from test_stages import STAGES, break_call
from tiny_plans import tiny_manifest

from histoseg_fast import files
from histoseg_fast.engines.choice import FILE, fastest
from histoseg_fast.errors import HistosegError, ImageError, PlanError
from histoseg_fast.images import OutlineOptions, write_png
from histoseg_fast.pipeline.records import Manifest, read_entries
from histoseg_fast.pipeline.stream import FATAL_ERRNO
from histoseg_fast.plan import MODEL, Plan, read_plan, write_plan
from histoseg_fast.reporting.page import write_report

SEED = 7
ROOMS = 10
"""Amounts of room that a run is given, each at random: what fails first is another file each time."""
WANTED = ("--overlay", "--probabilities", "--geojson", "--tile", 64, "--threads", 2, "--level", 0)


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "disk") as found:
        yield found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_plan_path: Path) -> tuple[list[object], dict[str, bytes]]:
    """Arguments of a run over fields and slides, with every kind of output, and its results."""
    folder = tmp_path_factory.mktemp("disks")
    for i, path in enumerate(make_pictures(folder / "in", 5, 150, 90)):
        write_png(path, np.random.default_rng(i).integers(0, 256, (150, 90, 3), np.uint8))
    write_pyramid(folder / "in" / "slide.tif", halves(300, 200, 2))
    arguments = ["infer", folder / "in", "--engine", tiny_plan_path, *WANTED, "--out"]
    assert run_child(folder, *arguments, folder / "plain", fault=fake_engine).code == 0
    kinds = {name.partition("/")[0] for name in results(folder / "plain")}
    assert kinds >= {"masks", "overlays", "probabilities", "geojson", "overviews", "tissue", "summary.csv"}
    assert any(name.endswith(".ome.tif") for name in results(folder / "plain"))
    return arguments, results(folder / "plain")


def check(out: Path, whole: dict[str, bytes]) -> int:
    """What lies in `out` after a failure is whole; the number of complete images."""
    assert not partials(out)
    for name, data in results(out).items():
        assert whole[name] == data or name == "summary.csv", f"{name} is half written"
    kept, _ = read_entries(out / "manifest.jsonl")  # its last line may be torn
    done = [entry for entry in kept.values() if entry["status"] == "done"]
    assert all((out / entry["mask"]).exists() for entry in done)
    return len(done)


def test_a_disk_that_is_full_at_any_file(plain, tmp_path: Path, disk: Disk) -> None:
    """Masks, ome.tif, geojson, overlays, probabilities, manifest and summary meet the end of the disk."""
    arguments, whole = plain
    total, dice, failed = sum(map(len, whole.values())), random.Random(SEED), set()
    for i in range(ROOMS):
        out = disk.folder / f"out{i}"
        disk.leave(dice.randint(0, total + 20_000))
        ended = run_child(tmp_path, *arguments, out, fault=fake_engine)
        if ended.code == 0:
            assert results(out) == whole
            continue
        assert ended.code == 1 and len(ended.errors) == 1, ended.err
        assert ended.errors[0].startswith("histoseg-fast: /") and "No space left" in ended.errors[0]
        failed.add(ended.errors[0].partition(": cannot")[0].removeprefix(f"histoseg-fast: {out}").split("/")[-2])
        done = check(out, whole) if (out / "manifest.jsonl").exists() else 0
        disk.leave(2 * total + 100_000)
        run = run_child(tmp_path, *arguments, out, fault=fake_engine)
        assert run.code == 0 and f"{6 - done} done, 0 failed, {done} skipped" in run.out
        assert results(out) == whole
        disk.clear()
    assert len(failed) > 2, failed


@pytest.mark.parametrize("place", ["manifest", "summary", "run.json"])
def test_a_disk_that_is_full_at_a_record(plain, tmp_path: Path, disk: Disk, place: str) -> None:
    arguments, whole = plain
    out = disk.folder / "out"
    fault = functools.partial(fill_before, place, str(disk.folder))
    ended = run_child(tmp_path, *arguments, out, fault=fault)
    assert ended.code == 1 and len(ended.errors) == 1 and "No space left" in ended.errors[0]
    done = check(out, whole)
    assert done == (6 if place == "run.json" else done) and not (out / "run.json").exists()
    disk.leave(2 * sum(map(len, whole.values())) + 100_000)
    run = run_child(tmp_path, *arguments, out, fault=fake_engine)
    assert run.code == 0 and f"{6 - done} done, 0 failed, {done} skipped" in run.out
    assert results(out) == whole


def fill_before(place: str, folder: str) -> None:
    """Fill the disk to the last byte as the record is written: of the manifest, its third line."""
    places = {
        "manifest": STAGES["manifest"],
        "summary": ("histoseg_fast.pipeline.run", "write_summary"),
        "run.json": ("histoseg_fast.pipeline.run", "write_run"),
    }
    break_call(places[place], 3 if place == "manifest" else 1, functools.partial(Disk(Path(folder)).leave, 0))
    if place == "manifest":  # a line longer than what is left of its last block
        whole = Manifest.add
        Manifest.add = lambda self, entry: whole(self, entry | {"fill": "x" * 5000})  # type: ignore[method-assign]


def test_full_and_read_only_disks_of_plans(tmp_path: Path, disk: Disk, tiny_plan: Plan) -> None:
    path = disk.folder / "new" / "x.plan"
    write_plan(path, tiny_manifest(name="old"), {MODEL: tiny_plan.members[MODEL]})
    before = path.read_bytes()
    disk.leave(4096)
    with pytest.raises(HistosegError, match=r"x\.plan: cannot be written \(No space left") as raised:
        write_plan(path, tiny_manifest(), {MODEL: tiny_plan.members[MODEL]})
    assert "\n" not in str(raised.value) and path.read_bytes() == before and not partials(disk.folder)
    with disk.read_only(), pytest.raises(HistosegError, match="Read-only file system"):
        write_plan(path, tiny_manifest(), {MODEL: tiny_plan.members[MODEL]})
    disk.leave(1 << 20)
    write_plan(path, tiny_manifest(), {MODEL: tiny_plan.members[MODEL]})
    assert read_plan(path).name == "tiny"


def test_full_and_read_only_disks_of_checkpoints(tmp_path: Path, disk: Disk) -> None:
    torch = pytest.importorskip("torch")
    from histoseg_fast.training.checkpoint import REQUIRED, read_checkpoint, write_checkpoint

    description = dict.fromkeys(REQUIRED, "x")
    path = disk.folder / "last.safetensors"
    write_checkpoint(path, {"a": torch.zeros(2000)}, description)
    before = path.read_bytes()
    disk.leave(4096)
    with pytest.raises(HistosegError, match=r"last\.safetensors: cannot be written: No space left"):
        write_checkpoint(path, {"a": torch.ones(2000)}, description)
    assert path.read_bytes() == before and not partials(disk.folder)
    with disk.read_only(), pytest.raises(HistosegError, match="Read-only file system"):
        write_checkpoint(path, {"a": torch.ones(2000)}, description)
    assert read_checkpoint(path)[0]["a"].sum() == 0


def test_a_cache_on_a_full_or_read_only_disk_costs_only_time(
    tiny_plan: Plan, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTOSEG_CACHE", str(disk.folder / "cache"))
    speeds = {"fp32": 1.0, "bf16": 2.0}
    asked: list[str] = []

    def measure(plan: Plan, precision: str) -> float:
        asked.append(precision)
        return speeds[precision]

    def choose() -> None:
        assert fastest(tiny_plan, list(speeds), measure) == "bf16"

    disk.leave(0)
    choose()
    choose()
    assert asked == [*speeds, *speeds] and not partials(disk.folder)
    with disk.read_only():
        choose()
    assert asked == [*speeds] * 3 and not (disk.folder / "cache" / FILE).exists()
    disk.leave(1 << 20)
    choose()
    choose()
    assert asked == [*speeds] * 4 and json.loads((disk.folder / "cache" / FILE).read_text())


def test_a_report_on_a_full_or_read_only_disk(plain, tmp_path: Path, disk: Disk) -> None:
    arguments, _ = plain
    run, page = tmp_path / "out", disk.folder / "page.html"
    assert run_child(tmp_path, *arguments, run, fault=fake_engine).code == 0
    for _ in range(2):  # nothing there, then an older page
        before = page.read_bytes() if page.exists() else None
        disk.leave(8192)
        ended = run_child(tmp_path, "report", run, "-o", page)
        assert ended.code == 1 and len(ended.errors) == 1 and "page.html: cannot be written: No space" in ended.err
        assert not partials(disk.folder) and (page.read_bytes() if page.exists() else None) == before
        disk.leave(1 << 20)
        assert run_child(tmp_path, "report", run, "-o", page).code == 0
    with disk.read_only():
        ended = run_child(tmp_path, "report", run, "-o", page)
    assert ended.code == 1 and "page.html: cannot be written: Read-only file system" in ended.err


def test_an_output_folder_that_may_only_be_read(plain, tmp_path: Path, disk: Disk) -> None:
    """From the first, with nothing in it, and with an interrupted run in it."""
    arguments, whole = plain
    out = disk.folder / "out"
    fault = functools.partial(break_call, STAGES["write"], 5, stop)
    for there in (False, True):
        if there:
            assert run_child(tmp_path, *arguments, out, fault=fault).code == 128 + signal.SIGTERM
        before = {path: path.stat().st_mtime_ns for path in disk.folder.rglob("*")}
        with disk.read_only():
            ended = run_child(tmp_path, *arguments, out, fault=fake_engine)
        assert ended.code == 1 and len(ended.errors) == 1
        assert "cannot be written: Read-only file system; choose another --out" in ended.errors[0]
        assert {path: path.stat().st_mtime_ns for path in disk.folder.rglob("*")} == before
    assert run_child(tmp_path, *arguments, out, fault=fake_engine).code == 0
    assert results(out) == whole


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


# -- the same without a mount ------------------------------------------------------------------------


class FullFile(io.FileIO):
    """A file that takes `room` bytes in all; then the disk is full."""

    room = 0

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A slide and two fields."""
    make_pictures(tmp_path / "in", 2, 300, 200)
    write_pyramid(tmp_path / "in" / "a.tif", halves(600, 200, 2))
    return tmp_path / "in"


@pytest.fixture(params=[0, 300, 4000])
def full(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that `atomic_write` makes ends after so many bytes, in a write or as it is flushed or closed."""
    kind = type("Full", (FullFile,), {"room": request.param})
    monkeypatch.setattr(files, "open", lambda path, mode: io.BufferedWriter(kind(path, mode)), raising=False)


@pytest.mark.parametrize("options", [{}, {"overlay": True, "probabilities": True}, {"geojson": OutlineOptions(0)}])
def test_patched_writes_of_every_kind_of_output(
    tmp_path: Path, pictures: Path, full: None, options: dict[str, Any]
) -> None:
    """ome.tif, overview, tissue, mask, overlay, geojson, probabilities."""
    out = tmp_path / "out"
    with pytest.raises(ImageError, match="cannot be written: No space left on device; free space") as raised:
        run_stream(FakeEngine(), pictures, out, **options)
    assert "\n" not in str(raised.value) and not partials(out)
    assert all(entry["status"] == "done" for entry in read_entries(out / "manifest.jsonl")[0].values())


def test_patched_writes_of_plans_reports_and_the_cache(
    tmp_path: Path, tiny_plan: Plan, full: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.plan"
    path.write_bytes(b"before")
    with pytest.raises(PlanError, match=r"x\.plan: cannot be written \(No space left"):
        write_plan(path, tiny_manifest(), {MODEL: tiny_plan.members[MODEL]})
    assert path.read_bytes() == b"before"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.jsonl").write_text("")
    with pytest.raises(HistosegError, match=r"report\.html: cannot be written: No space left"):
        write_report(tmp_path / "out")
    monkeypatch.setenv("HISTOSEG_CACHE", str(tmp_path / "cache"))
    assert fastest(tiny_plan, ["fp32", "bf16"], lambda plan, precision: 1.0) == "fp32"
    assert not partials(tmp_path) and not (tmp_path / "out" / "report.html").exists()


def test_errors_of_the_disk_have_their_numbers() -> None:
    """Those after which no other image can be written either."""
    assert {errno.ENOSPC, errno.EDQUOT, errno.EROFS} == FATAL_ERRNO
