"""What breaks in the middle: one image costs itself, an engine or a disk ends the run, nothing hangs or is lost."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from running import (
    PATIENCE,
    FakeEngine,
    entries,
    finish,
    make_pictures,
    make_stream,
    partials,
    picture,
    results,
    run_stream,
)

from histoseg_fast import _core
from histoseg_fast.engines.base import Slot
from histoseg_fast.errors import EngineError, ImageError
from histoseg_fast.images import MaskWriter, write_png
from histoseg_fast.images.content import Content
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.pipeline import run
from histoseg_fast.pipeline import sources as sources_module
from histoseg_fast.pipeline.job import Job
from histoseg_fast.pipeline.outputs import Outputs
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.ring import Tile
from histoseg_fast.pipeline.sources import Source
from histoseg_fast.pipeline.stream import QUEUED_BANDS
from histoseg_fast.postprocess import NO_STEPS, PostProcessing
from histoseg_fast.tiling import TileGrid

THREADS = {"readers": 2, "writers": 2, "batch": 2, "tile": 32}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images of several bands each."""
    make_pictures(tmp_path / "in", 12, 100, 60)
    return tmp_path / "in"


def check_resumes(images: Path, out: Path) -> None:
    """After a failed run: nothing half-written, and the next run ends as if nothing had happened."""
    assert not partials(out)
    totals = run_stream(FakeEngine(), images, out, **THREADS)
    assert totals.done + totals.skipped == 12 and totals.failed == 0
    run_stream(FakeEngine(), images, out.parent / "plain", **THREADS)
    assert results(out) == results(out.parent / "plain")


@pytest.mark.parametrize("stage", ["on_submit", "on_wait"])
@pytest.mark.parametrize("error", [EngineError("the device is gone"), RuntimeError("a bug"), MemoryError()])
@pytest.mark.parametrize("call", [1, 5])
def test_an_engine_that_fails_ends_the_run(
    images: Path, tmp_path: Path, stage: str, error: Exception, call: int
) -> None:
    def fail(number: int) -> None:
        if number >= call:
            raise error

    with pytest.raises(type(error)) as raised:
        run_stream(FakeEngine(**{stage: fail}), images, tmp_path / "out", **THREADS)
    assert raised.value is error
    check_resumes(images, tmp_path / "out")


@pytest.mark.parametrize("error", [EngineError("late"), RuntimeError("late")])
def test_an_engine_that_fails_at_the_very_last_batch(tmp_path: Path, error: Exception) -> None:
    """The last, unfilled batch is submitted by the main thread, not by a reader."""
    make_pictures(tmp_path / "in", 3, 8, 8)

    def fail(number: int) -> None:
        raise error

    with pytest.raises(type(error), match="late"):
        run_stream(FakeEngine(on_submit=fail), tmp_path / "in", tmp_path / "out", batch=8)
    assert not partials(tmp_path / "out")


@pytest.mark.parametrize("bands", [1, 4])
def test_broken_logits_cost_their_image_alone(tmp_path: Path, bands: int) -> None:
    """No two images share a batch's fate: the marked one fails, the others are as without it."""
    for i in range(6):
        rgb = picture(i, 32 * bands, 40) // 2
        rgb[-1, -1] = 255 if i == 3 else 0
        write_png(tmp_path / "in" / f"{i}.png", rgb)
    totals = run_stream(FakeEngine(broken=255), tmp_path / "in", tmp_path / "out", **THREADS)
    assert (totals.done, totals.failed) == (5, 1) and not partials(tmp_path / "out")
    line = entries(tmp_path / "out")["3.png"]
    assert line["status"] == "failed" and "NaN" in line["error"] and "3.png" in line["error"]
    assert line["engine"] == "fake 1" and line["precision"] == "fp32" and len(line["sha256"]) == 64
    (tmp_path / "in" / "3.png").unlink()
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", **THREADS)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_an_unexpected_error_in_any_thread_ends_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    places = ((sources_module, "open_image"), (Job, "fill_band"), (Job, "stitch"), (Job, "write"), (Job, "finish"))
    for i, (owner, name) in enumerate(places):
        with monkeypatch.context() as patch, pytest.raises(KeyError, match="a bug"):
            patch.setattr(owner, name, broken)
            run_stream(FakeEngine(), images, tmp_path / f"out{i}", **THREADS)
        assert not partials(tmp_path / f"out{i}")
    with pytest.raises(KeyError, match="a bug"):
        run_stream(FakeEngine(), images, tmp_path / "out", on_image=broken, **THREADS)
    check_resumes(images, tmp_path / "out")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenPipeError()])
def test_an_error_in_the_caller_stops_every_thread_first(images: Path, tmp_path: Path, error: BaseException) -> None:
    def poll() -> None:
        raise error

    manifest = Manifest(tmp_path / "out")
    with pytest.raises(type(error)):
        finish(make_stream(FakeEngine(), images, tmp_path / "out", manifest, **THREADS), poll)
    manifest.close()
    check_resumes(images, tmp_path / "out")


def fail_writes(patch: pytest.MonkeyPatch, number: int, when: object) -> None:
    """Let the bytes of masks meet OSError `number` where `when(writer)`."""
    write = MaskWriter._write

    def fail(self: MaskWriter, data: bytes) -> None:
        if when(self):
            raise OSError(number, os.strerror(number))
        write(self, data)

    patch.setattr(MaskWriter, "_write", fail)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_takes_no_more_ends_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(ImageError) as raised:
        fail_writes(patch, number, lambda writer: writer.path.name >= "image_005.png" and writer._row)
        run_stream(FakeEngine(), images, tmp_path / "out", **THREADS)
    assert os.strerror(number) in str(raised.value) and "masks/image_" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert all(entry["status"] == "done" for entry in entries(tmp_path / "out").values())
    check_resumes(images, tmp_path / "out")


def test_a_mask_that_may_not_be_written_costs_its_image_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.EACCES, lambda writer: writer.path.name == "image_005.png")
        totals = run_stream(FakeEngine(), images, tmp_path / "out", **THREADS)
    assert (totals.done, totals.failed) == (11, 1)
    assert "Permission denied" in entries(tmp_path / "out")["image_005.png"]["error"]
    check_resumes(images, tmp_path / "out")


@pytest.mark.parametrize("steps", [NO_STEPS, PostProcessing(majority_radius=1)])
def test_an_image_given_up_while_its_tile_is_stitched_is_no_error(tmp_path: Path, monkeypatch, steps) -> None:
    """A writer that meets an error abandons the image from its own thread, at any moment."""
    source = Source(tmp_path / "a.png", "a.png", "a")
    grid = TileGrid.cover(8, 8, 64, 0, 1)
    job = Job(source, None, grid, Outputs(tmp_path / "out", PAPER_PALETTE, postprocess=steps), 0)
    stitch = _core.stitch
    monkeypatch.setattr(_core, "stitch", lambda *arguments: (job.abandon(), stitch(*arguments))[1])
    slot = Slot()
    slot.reshape(1, 8, 8)
    slot.logits = np.zeros((1, 3, 8, 8), np.float32)
    assert job.stitch(Tile(job, 0, 0, grid.core(0, 0)), slot, 0) is None


def test_an_image_that_changes_while_it_is_read_fails_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(self: Content) -> None:
        if self.path.name == "image_004.png":
            raise ImageError("changed while it was read", where=self.path)

    monkeypatch.setattr(Content, "check_unchanged", changed)
    totals = run_stream(FakeEngine(), images, tmp_path / "out", **THREADS)
    assert (totals.done, totals.failed) == (11, 1)
    monkeypatch.undo()
    assert run_stream(FakeEngine(), images, tmp_path / "out", **THREADS).skipped == 11
    monkeypatch.setattr(Content, "check_unchanged", changed)  # while it is found complete: nothing to lose
    assert run_stream(FakeEngine(), images, tmp_path / "out", **THREADS).skipped == 12


def test_each_image_is_counted_once_however_many_stages_it_fails_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken logits and an unwritable mask in the same image, in either order."""
    for i in range(40):
        rgb = np.full((64, 32, 3), 7, np.uint8)
        rgb[-1] = 255
        write_png(tmp_path / "in" / f"{i:02}.png", rgb)
    fail_writes(monkeypatch, errno.EACCES, lambda writer: True)
    reported = []
    options = THREADS | {"on_image": lambda entry: reported.append(entry["input"])}
    totals = run_stream(FakeEngine(broken=255), tmp_path / "in", tmp_path / "out", **options)
    assert (totals.done, totals.failed) == (0, 40)
    assert sorted(reported) == sorted(set(reported)) and len(reported) == 40


def test_a_slow_image_holds_up_its_own_writer_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images go to the writer that has the fewest: while one is busy, all but those that wait for it pass it by."""
    make_pictures(tmp_path / "in", 12, 40, 40)
    passed, finish_job = threading.Event(), Job.finish
    order: list[int] = []

    def slow(job: Job) -> dict[str, object]:
        if job.number == 0:
            assert passed.wait(PATIENCE), "the others wait for it"
        time.sleep(0.02)  # so that queues fill before any image is over
        entry = finish_job(job)
        order.append(job.number)
        if len(order) == 11 - QUEUED_BANDS:
            passed.set()
        return entry

    monkeypatch.setattr(Job, "finish", slow)
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", readers=1, writers=2).done == 12
    assert 0 in order[-1 - QUEUED_BANDS :]


def test_what_ended_a_run_is_told_also_where_its_records_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_plan
) -> None:
    make_pictures(tmp_path / "in", 1)
    gone = EngineError("the device is gone")

    def fail(number: int) -> None:
        raise gone

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run, "open_engine", lambda *_, **__: contextlib.nullcontext(FakeEngine(on_wait=fail)))
    monkeypatch.setattr(run, "write_summary", full)
    with pytest.raises(EngineError) as raised:
        run.infer(tiny_plan, [str(tmp_path / "in")], tmp_path / "out", run.InferOptions())
    assert raised.value is gone


def test_what_progress_raises_is_not_blamed_on_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_plan
) -> None:
    make_pictures(tmp_path / "in", 1)
    monkeypatch.setattr(run, "open_engine", lambda *_, **__: contextlib.nullcontext(FakeEngine()))

    def broken(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        run.infer(tiny_plan, [str(tmp_path / "in")], tmp_path / "out", run.InferOptions(), run.Progress(start=broken))
