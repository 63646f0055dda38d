"""The stream as a whole: the same answer whatever the tiles, threads and order; resumed after any stop."""

from __future__ import annotations

import functools
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
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
from histoseg_fast.engines import Engine, open_engine, run_tiled
from histoseg_fast.images import MaskWriter, write_png
from histoseg_fast.pipeline import sources as sources_module
from histoseg_fast.pipeline import stream as stream_module
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.sources import find_sources
from histoseg_fast.plan import Plan


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan) -> Iterator[Engine]:
    with open_engine(tiny_plan, precision="fp32", threads=1) as opened:
        yield opened


def whole(engine: Engine, plan: Plan, rgb: np.ndarray, path: Path) -> tuple[bytes, dict[str, int], float]:
    """The plain twin: mask bytes, pixels by class and mean confidence from one pass over the whole image."""
    logits = run_tiled(engine, plan, rgb)
    classes, (height, width) = logits.argmax(0).astype(np.uint8), rgb.shape[:2]
    writer = MaskWriter(path, width, height, plan.palette.array)
    writer.write_rows(classes)
    writer.finish()
    counts, confidence, ignored = np.zeros(3, np.uint64), np.zeros(3, np.uint64), np.empty_like(classes)
    _core.stitch(logits, (0, 0, height, width), ignored, counts, confidence, None)
    pixels = {name: int((classes == i).sum()) for i, name in enumerate(plan.palette.names)}
    mean = int(confidence.sum()) / (65535 * height * width)
    powers = np.exp(logits.astype(np.float64) - logits.max(0))
    assert mean == pytest.approx(float((1 / powers.sum(0)).mean()), abs=1e-4)
    return path.read_bytes(), pixels, mean


SIZES = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    SIZES,
    st.integers(20, 320),
    st.integers(0, 80),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.randoms(),
)
@example([(300, 24), (299, 24), (298, 24)], 24, 0, 2, 3, 2, random.Random(0))  # batches shared by three tall images
@example([(1, 1), (1, 300), (300, 1)], 20, 0, 3, 2, 2, random.Random(0))
def test_the_stream_equals_the_whole_image(
    tiny_plan: Plan,
    engine: Engine,
    sizes: list[tuple[int, int]],
    tile: int,
    larger: int,
    batch: int,
    readers: int,
    writers: int,
    order: random.Random,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name, "in"), Path(name, "out")
        pictures = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
        for file, rgb in pictures.items():
            write_png(folder / file, rgb)
        sources = find_sources([str(folder)], out)
        order.shuffle(sources)
        options = {"stride": tiny_plan.stride, "halo": tiny_plan.halo, "sources": sources}
        options |= {"tile": tile, "large": tile + larger, "batch": batch, "readers": readers, "writers": writers}
        totals = run_stream(engine, folder, out, **options)
        assert (totals.done, totals.failed, totals.skipped) == (len(sizes), 0, 0)
        assert totals.pixels == sum(h * w for h, w in sizes)
        lines = entries(out)
        for file, rgb in pictures.items():
            mask, pixels, confidence = whole(engine, tiny_plan, rgb, Path(name, "twin.png"))
            assert (out / "masks" / file).read_bytes() == mask
            assert lines[file]["pixels"] == pixels
            assert lines[file]["mean_confidence"] == pytest.approx(confidence, abs=1e-9)
            assert (lines[file]["height"], lines[file]["width"]) == rgb.shape[:2]


def test_a_slow_reader_in_a_shared_batch_does_not_mix_up_the_bands_of_another_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "in", 2, 64, 8)
    holds_place, open_image = threading.Event(), sources_module.open_image

    def read_slowly(read: Callable[..., None], name: str, y0: int, *rest: object) -> None:
        if name == "image_001.png" and y0 == 0:
            holds_place.set()
            time.sleep(0.5)  # meanwhile the other image fills whole batches of its own
        elif y0 == 0:
            assert holds_place.wait(PATIENCE)
        read(y0, *rest)

    def open_slowly(path: Path, *options: object) -> object:
        image = open_image(path, *options)
        image.read_rows = functools.partial(read_slowly, image.read_rows, path.name)
        return image

    with monkeypatch.context() as patch:
        patch.setattr(sources_module, "open_image", open_slowly)
        run_stream(FakeEngine(), tmp_path / "in", tmp_path / "slow", tile=16, batch=2, readers=2)
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", tile=64)
    assert results(tmp_path / "slow") == results(tmp_path / "plain")


@pytest.mark.parametrize("after", [1, 4, 8])
@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("steps", ["none", "min_island=9"])
def test_a_stopped_run_is_resumed_to_the_same_bytes(tmp_path: Path, after: int, readers: int, steps: str) -> None:
    make_pictures(tmp_path / "in", 9, 100, 60)  # of several bands, so that some are given up half-way
    options = {"tile": 32, "readers": readers, "writers": 2, "batch": 2, "overlay": True, "postprocess": steps}
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", **options).done == 9
    manifest, done = Manifest(tmp_path / "out"), []

    def on_image(entry: dict) -> None:
        done.append(entry)
        if len(done) == after:
            stream.stop()

    stream = make_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", manifest, on_image=on_image, **options)
    first = finish(stream)
    manifest.close()
    assert after <= first.done <= 9 and first.failed == 0 and not partials(tmp_path / "out")
    assert len(list((tmp_path / "out" / "masks").iterdir())) == first.done
    second = run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **options)
    assert (second.done, second.skipped) == (9 - first.done, first.done)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_stop_before_the_start_does_nothing(tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 3)
    manifest = Manifest(tmp_path / "out")
    stream = make_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", manifest)
    stream.stop()
    assert finish(stream).done == 0 and stream.stopped and results(tmp_path / "out") == {}
    manifest.close()


@pytest.mark.parametrize("slow", ["engine", "writer"])
def test_a_slow_stage_holds_the_readers_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: str) -> None:
    make_pictures(tmp_path / "in", 60, 8, 8)
    batch, readers, writers, opened, over, most = 2, 2, 2, [], [], []
    open_image = sources_module.open_image
    monkeypatch.setattr(
        sources_module, "open_image", lambda path, *more: (opened.append(path), open_image(path, *more))[1]
    )

    def dawdle(_: object) -> None:
        time.sleep(0.01)
        most.append(len(opened) - len(over))

    def on_image(entry: dict) -> None:
        if slow == "writer":
            dawdle(entry)
        over.append(entry)

    engine = FakeEngine(on_wait=dawdle if slow == "engine" else lambda call: None)
    options = {"batch": batch, "readers": readers, "writers": writers, "on_image": on_image}
    run_stream(engine, tmp_path / "in", tmp_path / "out", **options)
    slots = engine.depth + 1  # one more batch: its slot is free again, its bands wait for a place
    assert max(most) <= slots * batch + readers + writers * (stream_module.QUEUED_BANDS + 1) < 60
    assert len(over) == 60


def test_an_image_changed_between_runs_is_the_only_one_done_again(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path / "in", 5)
    out = tmp_path / "out"
    run_stream(FakeEngine(), tmp_path / "in", out)
    write_png(paths[2], picture(77, 30, 30))
    (out / "masks" / "image_003.png").unlink()
    (out / "masks" / "image_004.png").write_bytes(b"damaged")
    again = []
    totals = run_stream(FakeEngine(), tmp_path / "in", out, on_image=lambda entry: again.append(entry))
    assert (totals.done, totals.skipped) == (3, 2)
    done = {entry["input"] for entry in again if entry["status"] == "done"}
    assert done == {"image_002.png", "image_003.png", "image_004.png"}
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "fresh")
    assert results(out) == results(tmp_path / "fresh")


def test_an_image_whose_mask_moves_is_done_again(tmp_path: Path) -> None:
    """A second image of the same stem gives both masks longer names; a resumed run must end up there too."""
    make_pictures(tmp_path / "in", 1)
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out")
    write_png(tmp_path / "in" / "image_000.tif", picture(5, 20, 20))  # content decides, not the suffix
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out").done == 2
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "fresh")
    assert results(tmp_path / "fresh").items() <= results(tmp_path / "out").items()
