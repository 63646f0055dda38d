"""A folder that is written to while it is watched: what comes through, when, how often, and under which name."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from running import PATIENCE, FakeEngine, entries, finish, make_pictures, make_stream, picture, results, run_stream

from histoseg_fast.errors import UsageError
from histoseg_fast.images import write_png
from histoseg_fast.pipeline import watch as watch_module
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.stream import Stream
from histoseg_fast.pipeline.watch import Watcher

SETTLE, LONG = 0.3, 1.5
"""Seconds that a file must keep still; the long ones where a test pauses in between, on a machine that may be busy."""
PAUSE = 0.1


@pytest.fixture(autouse=True)
def _short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "REST_SECONDS", 0.02)


def make_watcher(folder: Path, out: Path, idle: float | None = None, **options: Any) -> Watcher:
    told = options.pop("told", [])
    return Watcher([str(folder)], out, idle, told.append, **{"settle": SETTLE, "poll": 0.05, **options})


class Watched:
    """A stream over `folder` in a thread of its own, and the entries that it gave so far."""

    def __init__(self, folder: Path, out: Path, idle: float | None = None, settle: float = SETTLE, **options: Any):
        self.seen: list[tuple[str, str]] = []
        folder.mkdir(exist_ok=True)
        self._watcher = make_watcher(folder, out, idle, settle=settle)
        self._manifest = Manifest(out)
        sources = self._watcher.sources(dict(self._manifest.entries))
        self.stream: Stream = make_stream(
            FakeEngine(), folder, out, self._manifest, sources=sources, on_image=self._image, **options
        )
        self._thread = threading.Thread(target=self._run)

    def _image(self, entry: dict[str, Any]) -> None:
        self._watcher.over(entry)
        self.seen.append((entry["input"], entry["status"]))

    def _run(self) -> None:
        finish(self.stream)

    def wait(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert time.monotonic() < deadline and self._thread.is_alive(), self.seen
            time.sleep(0.01)

    def wait_for(self, *seen: tuple[str, str]) -> None:
        """Wait until so many entries came; they must be `seen`, in order."""
        self.wait(lambda: len(self.seen) >= len(seen))
        assert self.seen == list(seen)

    def join(self) -> None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.stop()
        self.join()
        self._manifest.close()


def test_a_file_is_taken_when_its_writer_is_done(tmp_path: Path) -> None:
    write_png(tmp_path / "whole.png", picture(0, 200, 200))
    data, folder = (tmp_path / "whole.png").read_bytes(), tmp_path / "in"
    with Watched(folder, tmp_path / "out", settle=LONG) as watched:
        with open(folder / "a.png", "wb", buffering=0) as stream:
            for i in range(20):  # each pause is shorter than it takes to settle, all of them are longer
                stream.write(data[i * len(data) // 20 : (i + 1) * len(data) // 20])
                time.sleep(PAUSE)
                assert watched.seen == []
        watched.wait_for(("a.png", "done"))
        (folder / "b.png.part").write_bytes(data)
        os.rename(folder / "b.png.part", folder / "b.png")
        watched.wait_for(("a.png", "done"), ("b.png", "done"))
        time.sleep(1.5 * LONG)
        assert len(watched.seen) == 2  # each once
    run_stream(FakeEngine(), folder, tmp_path / "plain")
    assert {name: data for name, data in results(tmp_path / "out").items() if name != "summary.csv"} == {
        name: data for name, data in results(tmp_path / "plain").items() if name != "summary.csv"
    }


def test_what_changes_is_done_again_and_what_goes_is_no_matter(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with Watched(folder, tmp_path / "out", settle=LONG) as watched:
        write_png(folder / "a.png", picture(0, 20, 20))
        watched.wait_for(("a.png", "done"))
        first = (tmp_path / "out" / "masks" / "a.png").read_bytes()
        write_png(folder / "a.png", picture(1, 20, 20))  # renamed over it
        watched.wait_for(*[("a.png", "done")] * 2)
        assert (tmp_path / "out" / "masks" / "a.png").read_bytes() != first
        os.utime(folder / "a.png", (1, 1))  # a clock that went backwards: another date, the same bytes
        watched.wait_for(*[("a.png", "done")] * 2, ("a.png", "skipped"))
        write_png(folder / "gone.png", picture(2, 20, 20))
        time.sleep(PAUSE)
        os.unlink(folder / "gone.png")
        os.unlink(folder / "a.png")
        write_png(folder / "sub" / "b.png", picture(3, 20, 20))
        watched.wait_for(*[("a.png", "done")] * 2, ("a.png", "skipped"), ("sub/b.png", "done"))
    assert watched.stream.totals.failed == 0 and (tmp_path / "out" / "masks" / "a.png").exists()


def test_a_broken_file_is_reported_once_and_tried_again_when_it_changes(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    with Watched(folder, tmp_path / "out") as watched:
        (folder / "a.png").write_bytes(b"half an ima")
        watched.wait_for(("a.png", "failed"))
        time.sleep(3 * SETTLE)
        assert len(watched.seen) == 1 and watched.stream.totals.failed == 1
        (folder / "a.png").write_bytes(b"")
        watched.wait_for(*[("a.png", "failed")] * 2)
        assert watched.stream.totals.failed == 1  # one image, not two
        write_png(folder / "a.png", picture(0, 20, 20))
        watched.wait_for(*[("a.png", "failed")] * 2, ("a.png", "done"))
        assert (watched.stream.totals.failed, watched.stream.totals.done) == (0, 1)
    assert entries(tmp_path / "out")["a.png"]["status"] == "done"


@pytest.mark.parametrize("readers", [1, 3])
def test_it_ends_when_nothing_comes_any_more_and_goes_on_where_it_was(tmp_path: Path, readers: int) -> None:
    make_pictures(tmp_path / "in", 7)
    for seen in ("done", "skipped"):
        with Watched(tmp_path / "in", tmp_path / "out", idle=2 * SETTLE, readers=readers, batch=4) as watched:
            watched.join()
            assert sorted(watched.seen) == [(f"image_{i:03}.png", seen) for i in range(7)]
            assert not watched.stream.stopped
    with Watched(tmp_path / "none", tmp_path / "other", idle=0) as watched:
        watched.join()
    assert watched.seen == []


def test_a_batch_that_is_not_full_does_not_wait_for_more_images(tmp_path: Path) -> None:
    with Watched(tmp_path / "in", tmp_path / "out", batch=8) as watched:
        write_png(tmp_path / "in" / "a.png", picture(0, 20, 20))
        watched.wait_for(("a.png", "done"))


def test_a_stop_is_noticed_at_once_while_nothing_comes(tmp_path: Path) -> None:
    with Watched(tmp_path / "in", tmp_path / "out", readers=3) as watched:
        time.sleep(0.1)
        watched.stream.stop()
        watched.join()
    assert watched.stream.stopped


def test_no_two_images_share_an_output_whatever_the_order_in_which_they_come(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    names = ["a.png", "a.PNG", "sub/a.jpg", "a.tif", "a.png.png"]

    def stems(watcher: Watcher, known: dict[str, Any]) -> dict[str, str]:
        for _ in watcher.sources(known):
            break
        return {name: watcher._stem(name) for name in names}

    folder.mkdir()
    first = stems(make_watcher(folder, out), {})
    assert first["a.png"] == "a" and first["sub/a.jpg"] == "sub/a" and first["a.tif"] == "a.tif"
    assert len({stem.casefold() for stem in first.values()}) == len(names)
    known = {name: {"mask": f"masks/{first[name]}.png"} for name in names}
    names.reverse()
    assert stems(make_watcher(folder, out), known) == first  # also after a restart
    hostile = {"../x.png": {"mask": "masks/../../x.png"}, "y.png": {"mask": 3}, "z.png": {}, "w.png": {"mask": "x"}}
    assert "../" not in "".join(stems(make_watcher(folder, out), hostile).values())


def test_an_image_is_not_begun_again_while_it_is_in_flight(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(0, 20, 20))
    watcher = make_watcher(tmp_path, tmp_path / "out", settle=0.0)
    sources = watcher.sources({})
    assert next(source for source in sources if source).name == "a.png"
    write_png(tmp_path / "a.png", picture(1, 20, 21))
    assert not any(source for source, _ in zip(sources, range(10), strict=False))
    watcher.over({"input": "a.png"})
    assert next(source for source in sources if source).name == "a.png"


def test_a_folder_that_cannot_be_listed_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path / "in", 2)
    told: list[str] = []
    watcher = make_watcher(tmp_path / "in", tmp_path / "out", told=told, settle=0.0, poll=0.0)
    sources, broken = watcher.sources({}), threading.Event()
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if broken.is_set() and os.fspath(path).startswith(str(tmp_path / "in")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    assert [next(sources).name for _ in range(2)] == ["image_000.png", "image_001.png"]  # type: ignore[union-attr]
    broken.set()
    assert [next(sources) for _ in range(5)] == [None] * 5
    assert len(told) == 1 and "trying again" in told[0] and str(tmp_path / "in") in told[0]
    broken.clear()
    for path in (tmp_path / "in").iterdir():
        watcher.over({"input": path.name})
    assert [next(sources) for _ in range(5)] == [None] * 5  # neither is new
    broken.set()
    assert [next(sources) for _ in range(3)] == [None] * 3 and len(told) == 2


def test_memory_is_flat(tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 10, 2, 2)
    watcher = make_watcher(tmp_path / "in", tmp_path / "out", settle=0.0, poll=0.0)
    sources = watcher.sources({})

    def look(count: int) -> int:
        for _ in range(count):
            for path in (tmp_path / "in").iterdir():
                os.utime(path, ns=(0, time.monotonic_ns()))
            for source in sources:
                if source is None:
                    break
                watcher.over({"input": source.name})
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        look(20)  # what is allocated once
        before = look(20)
        assert look(40) - before < 10_000
    finally:
        tracemalloc.stop()


def test_what_is_no_folder(tmp_path: Path) -> None:
    for inputs in ([], ["a", "b"], [str(tmp_path / "none")], [__file__]):
        with pytest.raises(UsageError, match="one folder"):
            Watcher(inputs, tmp_path / "out", None, print)
