"""What a benchmark runs: the engine gets the stream's batches, files are forgotten, clocks tell what they say."""

from __future__ import annotations

import mmap
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running import PATIENCE, FakeEngine, make_pictures, picture, run_stream

from histoseg_fast.benchmarking.files import FIELDS, forget_pages, make_fields, pages_in_memory
from histoseg_fast.benchmarking.gpus import GpuWatch
from histoseg_fast.benchmarking.runs import EngineAlone, Stopwatch, Work, batches
from histoseg_fast.benchmarking.sweep import TILES, tile_sizes
from histoseg_fast.engines.base import CLASSES, Slot, Wants
from histoseg_fast.images import read_image, write_png
from histoseg_fast.machine import busy_seconds, peak_rss_bytes, reset_peak_rss
from histoseg_fast.pipeline.run import InferOptions
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import TileGrid


class WatchedEngine(FakeEngine):
    """Notes the shape of every batch, the order of the slots, and how many are in flight at most."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.wants: set[Wants] = set()
        self.in_flight: list[Slot] = []
        self.most = self.closed = 0

    def slots(self, count: int) -> list[Slot]:
        made = super().slots(count)
        for slot in made:
            slot.close = self._close  # type: ignore[method-assign]
        return made

    def _close(self) -> None:
        self.closed += 1

    def submit(self, slot: Slot) -> None:
        assert slot not in self.in_flight
        assert (slot.cores == slot.cores[0]).all() and tuple(slot.cores[0]) == (0, 0, *slot.input.shape[1:3])
        self.shapes.append(slot.input.shape[:3])
        self.wants.add(slot.wants)
        self.in_flight.append(slot)
        self.most = max(self.most, len(self.in_flight))

    def wait(self, slot: Slot) -> None:
        assert self.in_flight.pop(0) is slot, "not in the order of submission"


def work_of(plan: Plan, tmp_path: Path, **options: object) -> Work:
    return Work(plan, [], InferOptions(**options), tmp_path)  # type: ignore[arg-type]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(8, 8), (8, 9), (40, 50), (20, 90), (70, 33)]), min_size=1, max_size=6),
    batch=st.integers(1, 5),
    tile=st.sampled_from([20, 32, 64]),
)
def test_the_batches_are_those_of_the_stream(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_plan: Plan,
    shapes: list[tuple[int, int]],
    batch: int,
    tile: int,
) -> None:
    folder, seen = tmp_path_factory.mktemp("stream"), []

    class Engine(FakeEngine):
        def submit(self, slot: Slot) -> None:
            seen.append(slot.input.shape[:3])

    for i, (height, width) in enumerate(shapes):
        write_png(folder / "in" / f"{i}.png", picture(i, height, width))
    run_stream(Engine(), folder / "in", folder / "out", tile=tile, batch=batch, halo=8, stride=2)
    assert batches(work_of(tiny_plan, folder, tile=tile), "cpu", shapes, batch) == seen


def test_large_images_have_large_tiles_on_a_cpu(tmp_path: Path) -> None:
    plan: Any = SimpleNamespace(tile=1152, halo=160, stride=32)
    work, shapes = work_of(plan, tmp_path), [(720, 1128), (3000, 4000)]
    assert [work.tile(device, shapes[:count]) for count in (1, 2) for device in ("cpu", "cuda:0")] == [
        1152,
        1152,
        2816,
        1152,
    ]
    assert batches(work, "cpu", shapes, 1) == [(1, 736, 1152), *[(1, 1664, 2176)] * 4]
    assert len(batches(work, "cuda:0", shapes, 1)) == 21
    assert work_of(plan, tmp_path, tile=1280).tile("cpu", shapes) == 1280


@pytest.mark.parametrize("wants", [CLASSES, Wants(logits=True)])
def test_the_engine_alone_runs_every_batch_with_all_slots_in_flight(wants: Wants) -> None:
    engine, polls = WatchedEngine(), Mock()
    wanted = [(2, 20, 30), (2, 20, 30), (1, 20, 30), (3, 8, 8), (2, 20, 30), (1, 4, 200)]
    with EngineAlone(engine, wanted, wants, polls) as alone:
        assert engine.shapes == [(2, 20, 30)] * engine.depth  # the largest warms every slot
        for _ in range(2):
            engine.shapes.clear()
            assert alone.run() > 0
            assert engine.shapes == wanted and not engine.in_flight
    assert engine.most == engine.depth == engine.closed and engine.wants == {wants}
    assert polls.call_count == engine.depth + 2 * len(wanted)


def test_the_engine_alone_ends_with_nothing_in_flight_when_it_is_interrupted() -> None:
    engine, poll = WatchedEngine(), Mock(side_effect=[None] * 5 + [KeyboardInterrupt])
    with EngineAlone(engine, [(1, 8, 8)] * 9, CLASSES, poll) as alone, pytest.raises(KeyboardInterrupt):
        alone.run()
    assert not engine.in_flight and engine.closed == engine.depth


def test_the_engine_alone_with_fewer_batches_than_slots() -> None:
    engine = WatchedEngine()
    with EngineAlone(engine, [(1, 8, 8)], CLASSES, lambda: None) as alone:
        engine.shapes.clear()
        alone.run()
    assert engine.shapes == [(1, 8, 8)]


def test_tile_sizes_end_with_the_first_that_cuts_nothing(tiny_plan: Plan, tmp_path: Path) -> None:
    work = work_of(tiny_plan, tmp_path)
    assert tile_sizes(work, [(40, 50)]) == [128]
    assert tile_sizes(work, [(40, 50), (720, 1128)]) == [128, *(tile for tile in TILES if tile <= 2048)]
    for tile in tile_sizes(work, [(720, 1128)])[:-1]:
        grid = TileGrid.cover(720, 1128, tile, tiny_plan.halo, tiny_plan.stride)
        assert grid.tiles > 1


def test_made_up_fields_are_the_same_each_time_and_files_of_their_own(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_fields(tmp_path / name, FIELDS + 1)
    first = sorted((tmp_path / "a").iterdir())
    assert [path.read_bytes() for path in first] == [p.read_bytes() for p in sorted((tmp_path / "b").iterdir())]
    assert len({path.stat().st_ino for path in first}) == FIELDS + 1  # or a cold read of one would warm another
    assert read_image(first[0]).shape == (720, 1128, 3)
    assert len({path.read_bytes() for path in first}) == FIELDS


def test_forgotten_files_are_read_again_from_the_disk(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path, 3, 200, 300)
    before = [path.read_bytes() for path in paths]
    if not forget_pages(paths):
        pytest.skip("this file system keeps its files in memory")
    with open(paths[0], "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        assert pages_in_memory(stream) == 0
        assert stream.read() == before[0]
        assert pages_in_memory(stream) == -(-size // mmap.PAGESIZE)
    assert [path.read_bytes() for path in paths] == before


def test_files_that_are_gone_or_in_memory_are_not_cold(tmp_path: Path) -> None:
    assert not forget_pages([tmp_path / "gone"])
    shared = Path("/dev/shm")
    if shared.is_dir() and os.access(shared, os.W_OK):
        path = shared / f"histoseg-test-{os.getpid()}"
        try:
            path.write_bytes(bytes(10_000))
            assert not forget_pages([path])
        finally:
            path.unlink()


def test_the_stopwatch_tells_work_from_sleep() -> None:
    with Stopwatch() as idle:
        time.sleep(0.05)
    assert idle.wall >= 0.05 and idle.cpu < idle.wall
    with Stopwatch() as busy:
        while time.process_time() - busy._cpu < 0.1:
            pass
    assert busy.cpu >= 0.1 and busy.wall >= busy.cpu * 0.9
    assert busy.others is None or busy.others >= 0
    first = busy_seconds()
    assert first is None or 0 < first <= busy_seconds()  # type: ignore[operator]


def test_the_peak_of_memory_starts_again() -> None:
    block = np.ones(300 << 20, np.uint8)
    high = peak_rss_bytes()
    assert high >= block.nbytes
    del block
    if not reset_peak_rss():
        pytest.skip("this system cannot")
    assert peak_rss_bytes() <= high - (200 << 20)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Put a program of that name in the path, which notes its arguments and prints lines until it is killed."""

    def install(lines: str) -> Path:
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nprintf "{lines}"\nexec sleep {PATIENCE}\n')
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
        return tmp_path / "arguments"

    return install


def wait_for(watch: GpuWatch, samples: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(watch._samples) < samples:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_gpus_are_watched(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    arguments, started = nvidia_smi("100, 1000\\n50, 200\\n[N/A], [N/A]\\n0, 3000\\n50, 400\\n"), time.perf_counter()
    watch = GpuWatch("cuda:0,2")
    wait_for(watch, 4)
    watch.close()
    assert "-i 3,7 -lms 100" in arguments.read_text()
    assert watch.busy_share(started, time.perf_counter()) == 0.5
    assert watch.busy_share(0, started) is None
    assert watch.peak_bytes(started) == 3400 << 20 and watch.peak_bytes(time.perf_counter()) is None
    assert watch._process is not None and watch._process.poll() is not None


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_without_gpus_or_their_tool_nothing_is_watched(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    watch = GpuWatch(device)
    watch.close()
    assert watch.busy_share(0, time.perf_counter()) is watch.peak_bytes(0) is None
