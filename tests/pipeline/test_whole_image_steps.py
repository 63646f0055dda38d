"""Post-processing in the stream: of the whole image, whatever the tiles; too large an image goes without."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from running import FakeEngine, entries, make_pictures, picture, results, run_stream

from histoseg_fast import _core, postprocess
from histoseg_fast.engines import Engine, open_engine, run_tiled
from histoseg_fast.images import GeojsonWriter, MaskWriter, OutlineOptions, OverlayWriter, write_png
from histoseg_fast.pipeline.outputs import OVERLAY_ALPHA
from histoseg_fast.plan import Plan
from histoseg_fast.postprocess import CrfOptions, PostProcessing


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan) -> Iterator[Engine]:
    with open_engine(tiny_plan, precision="fp32", threads=1) as opened:
        yield opened


def twin(ids: np.ndarray, rgb: np.ndarray, plan: Plan, folder: Path) -> tuple[bytes, bytes, bytes]:
    """The bytes of mask, overlay and outlines, written in one go."""
    (height, width), colours = ids.shape, plan.palette.array
    mask, overlay = MaskWriter(folder / "twin.png", width, height, colours), OverlayWriter(folder / "t", width, height)
    mask.write_rows(ids)
    tinted = np.empty_like(rgb)
    _core.tint(rgb, ids, None, colours, OVERLAY_ALPHA, tinted)
    overlay.write_rows(tinted)
    outlines = GeojsonWriter(folder / "g", width, height, plan.palette.names, colours, OutlineOptions())
    outlines.write_rows(ids)
    mask.finish(), overlay.finish(), outlines.finish()
    return mask.path.read_bytes(), overlay.path.read_bytes(), outlines.path.read_bytes()


SIZES = st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=3)
GENTLE = CrfOptions(2, 0.25, 1.5, 1.5, 9.0, 40.0)  # stronger ones leave a single class
STEPS = st.builds(PostProcessing, st.integers(0, 30), st.integers(0, 2), st.sampled_from([None, GENTLE]))
FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(SIZES, st.integers(20, 100), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), STEPS)
@example([(90, 24), (89, 24), (88, 24)], 24, 2, 3, 2, PostProcessing(30, 1))  # batches shared by three tall images
@example([(1, 1), (70, 80)], 20, 3, 2, 2, PostProcessing(crf=GENTLE))
def test_the_steps_are_those_of_the_whole_image(
    tiny_plan: Plan,
    engine: Engine,
    sizes: list[tuple[int, int]],
    tile: int,
    batch: int,
    readers: int,
    writers: int,
    steps: PostProcessing,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, out, plain = Path(name, "in"), Path(name, "out"), Path(name, "plain")
        pictures = {f"{i}.png": picture(i, *size) for i, size in enumerate(sizes)}
        for file, rgb in pictures.items():
            write_png(folder / file, rgb)
        options = {"stride": tiny_plan.stride, "halo": tiny_plan.halo, "overlay": True, "geojson": OutlineOptions()}
        run_stream(engine, folder, plain, tile=128, **options)
        options |= {"tile": tile, "batch": batch, "readers": readers, "writers": writers, "postprocess": str(steps)}
        run_stream(engine, folder, out, **options)
        lines, before = entries(out), entries(plain)
        for file, rgb in pictures.items():
            ids = steps.apply(rgb, run_tiled(engine, tiny_plan, rgb)).ids
            mask, overlay, outlines = twin(ids, rgb, tiny_plan, Path(name))
            assert (out / "masks" / file).read_bytes() == mask
            assert (out / "overlays" / file).with_suffix(".jpg").read_bytes() == overlay
            assert (out / "geojson" / file).with_suffix(".geojson").read_bytes() == outlines
            counts = {name: int((ids == i).sum()) for i, name in enumerate(tiny_plan.palette.names)}
            assert lines[file]["pixels"] == counts and lines[file]["warnings"] == []
            assert lines[file]["mean_confidence"] == before[file]["mean_confidence"]  # the network's own


@pytest.mark.parametrize(
    ("steps", "left", "limit"),
    [
        ("majority_radius=1,min_island=30", "none", "MAX_REGION_PIXELS"),
        ("crf,min_island=30", "min_island=30", "MAX_CRF_PIXELS"),
    ],
)
def test_an_image_over_the_limit_goes_without_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: str, left: str, limit: str
) -> None:
    monkeypatch.setattr(postprocess, limit, 40 * 50)
    make_pictures(tmp_path / "in", 1, 40, 50)
    write_png(tmp_path / "in" / "large.png", picture(5, 41, 50))
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", tile=16, overlay=True, postprocess=left)
    totals = run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", tile=16, overlay=True, postprocess=steps)
    assert (totals.done, totals.failed) == (2, 0)
    lines, plain = entries(tmp_path / "out"), entries(tmp_path / "plain")
    assert lines["image_000.png"]["warnings"] == []
    assert left != "none" or lines["image_000.png"]["mask_sha256"] != plain["image_000.png"]["mask_sha256"]
    assert lines["large.png"]["warnings"] == [f"post-processed with {left}, not {steps}: it has 2050 pixels"]
    for key in ("mask_sha256", "overlay_sha256", "pixels", "mean_confidence"):
        assert lines["large.png"][key] == plain["large.png"][key]


def test_without_steps_no_image_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocess, "MAX_REGION_PIXELS", 1)
    make_pictures(tmp_path / "in", 1)
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out")
    assert entries(tmp_path / "out")["image_000.png"]["warnings"] == []


def test_broken_logits_cost_their_image_alone_with_steps_too(tmp_path: Path) -> None:
    for i in range(4):
        rgb = picture(i, 64, 40) // 2
        rgb[-1, -1] = 255 if i == 2 else 0
        write_png(tmp_path / "in" / f"{i}.png", rgb)
    options = {"tile": 32, "readers": 2, "writers": 2, "batch": 2, "postprocess": "crf,crf.iterations=1"}
    totals = run_stream(FakeEngine(broken=255), tmp_path / "in", tmp_path / "out", **options)
    assert (totals.done, totals.failed) == (3, 1)
    (tmp_path / "in" / "2.png").unlink()
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", **options)
    assert results(tmp_path / "out") == results(tmp_path / "plain")
