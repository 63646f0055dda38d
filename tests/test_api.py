"""The Python interface: the bytes of `infer`, bounded, typed errors, no thread left behind, nothing imported early."""

from __future__ import annotations

import doctest
import gc
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openvino  # noqa: F401 (before threads are counted: its import starts one)
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from running import PATIENCE, FakeEngine, entries, make_pictures, picture
from slide_files import write_pyramid

import histoseg_fast
from histoseg_fast import HistosegError, Segmentation, api
from histoseg_fast.errors import EngineError, ImageError, PlanError, UsageError
from histoseg_fast.images import read_image, write_png
from histoseg_fast.labels import encode
from histoseg_fast.pipeline.job import Job
from histoseg_fast.pipeline.memory import WAITING_RESULTS
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import check_tile

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeEngine]:
    """Let the interface run on an engine whose logits are the colours."""

    def use(**options: Any) -> FakeEngine:
        engine = FakeEngine(**options)
        monkeypatch.setattr(api, "open_stream_engine", lambda *_: engine)
        return engine

    return use


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


SIZES = st.lists(st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=3)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SIZES, st.integers(20, 220), st.integers(1, 4), st.sampled_from(["none", "min_island=9", "majority_radius=1"]))
@example([(1, 1), (1, 200), (200, 1)], 20, 3, "none")
def test_the_results_are_those_of_infer(
    tiny_plan: Plan, sizes: list[tuple[int, int]], tile: int, batch: int, steps: str
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name, "in"), Path(name, "out")
        pictures = [picture(i, *size) for i, size in enumerate(sizes)]
        paths = [folder / f"{i}.png" for i in range(len(sizes))]
        for path, rgb in zip(paths, pictures, strict=True):
            write_png(path, rgb)
        wanted: dict[str, Any] = {"precision": "fp32", "probabilities": True, "postprocess": steps}
        infer(tiny_plan, [str(folder)], out, InferOptions(**wanted))
        lines = entries(out)
        found = list(histoseg_fast.stream([*paths, *pictures], tiny_plan, tile=tile, batch=batch, **wanted))
        assert len(found) == 2 * len(sizes)
        for given_image, result in found:
            same = [i for i, image in enumerate([*paths, *pictures]) if image is given_image]
            i = same[0] % len(sizes)
            assert isinstance(result, Segmentation) and result.probabilities is not None
            assert (encode(result.classes, tiny_plan.palette) == read_image(out / "masks" / f"{i}.png")).all()
            assert result.probabilities.shape == (3, *sizes[i]) and result.probabilities.dtype == np.uint8
            assert (result.probabilities == read_pages(out / "probabilities" / f"{i}.tif")).all()
            assert result.pixels == lines[f"{i}.png"]["pixels"]
            assert result.mean_confidence == lines[f"{i}.png"]["mean_confidence"]
            assert result.precision == "fp32" and result.device == "cpu" and result.warnings == ()


def read_pages(path: Path) -> np.ndarray:
    import tifffile

    pages = tifffile.imread(path, maxworkers=1)
    return pages.reshape(3, *pages.shape[-2:])


def test_one_image_with_the_plans_own_steps(tiny_plan: Plan, tmp_path: Path) -> None:
    rgb = picture(0, 60, 70)
    write_png(tmp_path / "a.png", rgb)
    found = [histoseg_fast.segment(image, tiny_plan) for image in (rgb, tmp_path / "a.png", str(tmp_path / "a.png"))]
    assert all((result.classes == found[0].classes).all() for result in found)
    assert found[0].probabilities is None and found[0].mpp is None and found[0].classes.flags.writeable
    assert sum(found[0].pixels.values()) == 60 * 70
    backwards = histoseg_fast.segment(np.asfortranarray(rgb[::-1])[::-1], tiny_plan)
    assert (backwards.classes == found[0].classes).all()


def test_a_slide_has_its_glass_left_out_and_its_resolution_stated(tiny_plan: Plan, tmp_path: Path) -> None:
    rgb = np.full((600, 500, 3), 250, np.uint8)
    rgb[100:200, 50:150] = picture(0, 100, 100) // 2
    (tmp_path / "in").mkdir()
    write_pyramid(tmp_path / "in" / "slide.tif", [rgb, np.ascontiguousarray(rgb[::2, ::2])], mpp=0.5)
    options: dict[str, Any] = {"mpp": 0.5, "precision": "fp32", "tile": 64}
    result = histoseg_fast.segment(tmp_path / "in" / "slide.tif", tiny_plan, **options)
    infer(tiny_plan, [str(tmp_path / "in")], tmp_path / "out", InferOptions(**options))
    line = entries(tmp_path / "out")["slide.tif"]
    assert result.mpp == pytest.approx(0.5) and result.classes.shape == (600, 500)
    assert line["glass_pixels"] > 0 and result.pixels == line["pixels"]
    import tifffile

    assert (tifffile.imread(tmp_path / "out" / line["mask"], level=0, maxworkers=1) == result.classes).all()


def test_images_that_fail_are_given_with_their_errors(fake: Callable[..., FakeEngine], tmp_path: Path) -> None:
    fake(broken=255)
    good, nan = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8, 3), 255, np.uint8)
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n no image")
    write_png(tmp_path / "good.png", good)
    images: list[Any] = [
        *(tmp_path / "good.png", tmp_path / "bad.png", str(tmp_path / "none.png"), tmp_path, good, nan),
        *(good.astype(float), good[..., 0], good[:0], good[:, :, :2], tmp_path / "good.png", "\0"),
    ]
    found = list(histoseg_fast.stream(images, "fast", postprocess="none"))
    assert len(found) == len(images)
    kinds = [next(type(result) for image, result in found if image is wanted) for wanted in images]
    of_files, of_arrays = [Segmentation, *[ImageError] * 3], [Segmentation, EngineError, *[ImageError] * 4]
    assert kinds == [*of_files, *of_arrays, Segmentation, ImageError]
    messages = [str(result) for _, result in found if isinstance(result, HistosegError)]
    assert all("\n" not in message for message in messages) and any("float64 (8, 8, 3)" in m for m in messages)
    with pytest.raises(ImageError, match="uint8"):
        histoseg_fast.segment(good.astype(float))
    with pytest.raises(ImageError, match="leave mpp and level out"):
        histoseg_fast.segment(good, mpp=0.5)


@pytest.mark.parametrize("error", [EngineError("the device is gone"), RuntimeError("a bug")])
def test_an_engine_that_fails_is_raised_after_what_was_done(fake: Callable[..., FakeEngine], error: Exception) -> None:
    def fail(call: int) -> None:
        if call > 3:
            raise error

    fake(on_wait=fail)
    done = []
    with pytest.raises(type(error)) as raised:
        for _, result in histoseg_fast.stream([picture(0, 8, 8)] * 50):
            done.append(result)
    assert raised.value is error and all(isinstance(result, Segmentation) for result in done) and len(done) <= 3


def test_what_the_images_raise_is_raised(fake: Callable[..., FakeEngine]) -> None:
    fake()

    def images() -> Iterator[np.ndarray]:
        yield picture(0, 8, 8)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(histoseg_fast.stream(images()))
    with pytest.raises(TypeError, match="PathLike"):
        list(histoseg_fast.stream([3]))  # type: ignore[list-item]


def test_a_slow_taker_holds_the_stream_back(fake: Callable[..., FakeEngine]) -> None:
    engine, asked = fake(), 0

    def images() -> Iterator[np.ndarray]:
        nonlocal asked
        while True:
            asked += 1
            yield picture(0, 8, 8)

    results = histoseg_fast.stream(images(), threads=2)
    most = WAITING_RESULTS + engine.depth + 2 * 4  # in the queues of bands, and in the hands of each thread
    for taken in range(30):
        next(results)
        time.sleep(0.01)
        assert asked <= taken + 1 + most
    results.close()
    at_close = asked
    time.sleep(0.2)
    assert asked == at_close


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_threads(fake: Callable[..., FakeEngine], tiny_plan: Plan, taken: int) -> None:
    fake(on_wait=lambda call: time.sleep(0.01))
    before = set(threading.enumerate())
    results = histoseg_fast.stream([picture(0, 200, 100)] * 1000, tiny_plan, tile=64, batch=2)
    for _ in range(taken):
        next(results)
    assert (set(threading.enumerate()) > before) == (taken > 0)
    results.close()
    assert set(threading.enumerate()) <= before
    for _ in histoseg_fast.stream([picture(0, 8, 8)] * 1000):
        break
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_an_image_too_large_for_memory_is_an_error_of_its_own(
    fake: Callable[..., FakeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    write = Job.write

    def fail(job: Job, band: Any) -> bool:
        if job.source.stem == "1":
            raise MemoryError
        return write(job, band)

    monkeypatch.setattr(Job, "write", fail)
    images = [picture(i, 8, 8) for i in range(3)]
    found = list(histoseg_fast.stream(images))
    kinds = [next(type(result) for image, result in found if image is wanted) for wanted in images]
    assert kinds == [Segmentation, ImageError, Segmentation]


def test_wrong_usage_is_told_before_any_work(tiny_plan: Plan, tmp_path: Path) -> None:
    for single in ("a.png", tmp_path, picture(0, 8, 8), b"a.png"):
        with pytest.raises(UsageError, match="several images"):
            histoseg_fast.stream(single)  # type: ignore[type-var, arg-type]
    for wrong in ({"tile": 8}, {"batch": -1}, {"threads": 5000}, {"postprocess": "x"}, {"tissue_threshold": 0.0}):
        with pytest.raises(UsageError):
            histoseg_fast.stream([], tiny_plan, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="choose the resolution"):
        histoseg_fast.stream([], tiny_plan, level=0, mpp=1.0)
    with pytest.raises(TypeError, match="unknown option 'overlay'"):
        histoseg_fast.stream([], tiny_plan, overlay=True)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="no such plan"):
        histoseg_fast.load_plan("nothing.plan")
    (tmp_path / "bad.plan").write_bytes(b"PK")
    with pytest.raises(PlanError):
        histoseg_fast.segment(picture(0, 8, 8), tmp_path / "bad.plan")
    with pytest.raises(EngineError):
        histoseg_fast.segment(picture(0, 8, 8), tiny_plan, device="cuda")
    assert list(histoseg_fast.stream([], tiny_plan)) == []
    check_tile(histoseg_fast.load_plan("fast").tile, 0, 1)


def in_python(code: str, folder: Path) -> str:
    """What another interpreter prints."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, cwd=folder, check=False
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    return run.stdout


def test_the_import_is_light(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import histoseg_fast; print(*set(sys.modules) - before)"
    loaded = in_python(code, tmp_path).split()
    assert "histoseg_fast" in loaded
    heavy = {"numpy", "openvino", "imagecodecs", "tifffile", "torch", "typer", "rich"}
    assert not heavy & set(loaded) and not [name for name in loaded if name.startswith("histoseg_fast.")]
    said = in_python(
        "import sys, histoseg_fast as h; print(sorted(set(h.__all__) - set(dir(h))), hasattr(h, 'nothing'));"
        "h.segment, h.stream, h.load_plan; print('torch' in sys.modules, 'openvino' in sys.modules)",
        tmp_path,
    )
    assert said.split() == ["[]", "False", "False", "False"]


def test_a_script_that_leaves_a_stream_behind_ends(tmp_path: Path, tiny_plan_path: Path) -> None:
    make_pictures(tmp_path, 1)
    code = (
        "import histoseg_fast\n"
        f"results = histoseg_fast.stream(['image_000.png'] * 1000, {str(tiny_plan_path)!r})\n"
        "print(next(results)[1].classes.shape)\n"
    )
    assert in_python(code, tmp_path) == "(40, 50)\n"


def test_the_examples_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testfile(str(DOCS / "api.md"), module_relative=False)
    assert tried > 15 and failed == 0
