"""Slides in the stream: glass is neither read nor run, and all else is what it is without the mask."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from running import FakeEngine, entries, finish, make_stream, partials, picture, results, run_stream

from histoseg_fast.engines import Engine, open_engine, run_tiled
from histoseg_fast.errors import ImageError
from histoseg_fast.images import OutlineOptions, PyramidWriter, Resolution, read_image, write_png
from histoseg_fast.images.content import Content
from histoseg_fast.images.overview import shrink
from histoseg_fast.images.png import PngSource
from histoseg_fast.pipeline import job as job_module
from histoseg_fast.pipeline import sources as sources_module
from histoseg_fast.pipeline.job import NO_OVERVIEW
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.tissue import Tissue
from histoseg_fast.plan import Plan
from histoseg_fast.tiling import TileGrid, Tiling

UNREAD = 77
"""What a slide of the tests leaves in the pixels that were not asked for."""


class Slide(PngSource):
    """A PNG that says it is a slide. `reads` are the rows and columns that were asked for."""

    slide, mpp = True, 0.5

    def __init__(self, path: Path):
        super().__init__(Content(path))
        self.reads: list[tuple[int, int, list[tuple[int, int]]]] = []

    def overview(self, step: int) -> np.ndarray | None:
        return shrink(read_image(self.path), step)

    def _read(self, y0: int, y1: int, out: np.ndarray) -> None:
        self._read_columns(y0, y1, out, [(0, self.width)])

    def _read_columns(self, y0: int, y1: int, out: np.ndarray, columns: Sequence[tuple[int, int]]) -> None:
        self.reads.append((y0, y1, list(columns)))
        rows = np.empty((y1 - y0, self.width, 3), np.uint8)
        super()._read(y0, y1, rows)
        out[...] = UNREAD
        for first, end in columns:
            out[:, first:end] = rows[:, first:end]


@pytest.fixture
def slides(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Slide]]:
    """Make every image a slide of the class given; the slides, as they are opened."""

    def make(kind: type[Slide] = Slide) -> list[Slide]:
        opened: list[Slide] = []
        monkeypatch.setattr(sources_module, "open_image", lambda path, _: (opened.append(kind(path)), opened[-1])[1])
        return opened

    return make


@pytest.fixture(scope="module")
def engine(tiny_plan: Plan) -> Iterator[Engine]:
    with open_engine(tiny_plan, precision="fp32", threads=1) as opened:
        yield opened


def kept_pixels(mask: np.ndarray, step: int, grid: TileGrid, fitted: bool) -> np.ndarray:
    """bool (height, width), the plain way: the cores of tiles that hold a pixel of tissue; of fitted ones all do."""
    tissue = mask.repeat(step, 0).repeat(step, 1)[: grid.height, : grid.width]
    kept = np.zeros_like(tissue)
    for row, columns in zip(grid.rows, grid.columns, strict=True):
        for column in columns:
            core = slice(row.core, row.core_end), slice(column.core, column.core_end)
            kept[core] = fitted or tissue[core].any()
    assert kept[tissue].all()
    return kept


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    tile=st.integers(20, 120),
    batch=st.integers(1, 4),
    readers=st.integers(1, 2),
    fitted=st.booleans(),
    step=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.01, 0.1, 1.0]),
    seed=st.integers(0, 99),
    more=st.sampled_from([0, 10, 60]),
)
@example(
    size=(200, 90), tile=20, batch=3, readers=1, fitted=False, step=9, density=0.0, seed=0, more=0
)  # nothing but glass
@example(
    size=(300, 20), tile=20, batch=3, readers=1, fitted=False, step=30, density=0.3, seed=3, more=0
)  # one column of tiles
@example(size=(20, 300), tile=20, batch=2, readers=1, fitted=False, step=30, density=0.3, seed=3, more=0)  # one row
@example(size=(1, 1), tile=20, batch=1, readers=1, fitted=False, step=1, density=0.0, seed=0, more=0)  # one tile, glass
@example(size=(1, 1), tile=20, batch=1, readers=1, fitted=False, step=1, density=1.0, seed=0, more=0)
@example(size=(200, 90), tile=20, batch=3, readers=1, fitted=True, step=9, density=0.0, seed=0, more=0)
@example(size=(300, 299), tile=60, batch=3, readers=2, fitted=True, step=40, density=0.1, seed=1, more=0)
@example(size=(130, 299), tile=40, batch=3, readers=1, fitted=True, step=40, density=0.6, seed=2, more=60)  # low, wide
def test_tissue_is_bit_identical_and_glass_is_background(
    tiny_plan, engine, slides, size, tile, batch, readers, fitted, step, density, seed, more
):
    height, width = size
    rng = np.random.default_rng(seed)
    mask = rng.random((-(-height // step), -(-width // step))) < density
    tiling = Tiling(tile, tile + more, tiny_plan.halo, tiny_plan.stride, fitted)
    grid = Tissue(mask, step).grid(height, width, tiling) if fitted else tiling.grid(height, width)
    kept, rgb = kept_pixels(mask, step, grid, fitted), picture(seed, height, width)
    options = {"stride": tiny_plan.stride, "halo": tiny_plan.halo, "tile": tile, "batch": batch, "readers": readers}
    options |= {"probabilities": True, "overlay": True, "fitted": fitted, "large": tile + more}
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder, plain, out = Path(name, "in"), Path(name, "plain"), Path(name, "out")
        write_png(folder / "a.png", rgb)
        slides()
        run_stream(engine, folder, plain, tissue_threshold=None, **options)
        patch.setattr(job_module, "find_tissue", lambda overview, threshold: Tissue(mask, step))
        opened = slides()
        totals = run_stream(engine, folder, out, **options)
        whole, masked = (tifffile.imread(at / "masks" / "a.ome.tif", level=0) for at in (plain, out))
        assert (masked == np.where(kept, whole, 0)).all()
        chances = [tifffile.imread(at / "probabilities" / "a.tif").reshape(3, *size) for at in (plain, out)]
        glass = np.array([255, 0, 0], np.uint8)[:, None, None]
        assert (chances[1] == np.where(kept, chances[0], glass)).all()
        entry, before = entries(out)["a.png"], entries(plain)["a.png"]
        assert (read_image(out / "tissue" / "a.png")[..., 0] == 255 * mask).all()
    ids = {name: int((masked == i).sum()) for i, name in enumerate(tiny_plan.palette.names)}
    assert entry["pixels"] == ids and entry["glass_pixels"] == totals.glass == int((~kept).sum())
    assert before["glass_pixels"] == 0 and "tissue" not in before and (entry["width"], entry["height"]) == size[::-1]
    logits = run_tiled(engine, tiny_plan, rgb).astype(np.float64)
    confidence = 1 / np.exp(logits - logits.max(0)).sum(0)
    if kept.any():
        assert entry["mean_confidence"] == pytest.approx(confidence[kept].mean(), abs=1e-4)
    else:
        assert entry["mean_confidence"] is None
    check_reads(opened[-1], kept, grid)


def check_reads(slide: Slide, kept: np.ndarray, grid: TileGrid) -> None:
    """Exactly the rows of tiles with tissue were read, and in them the columns that their tiles reach."""
    expected = []
    for row, columns in zip(grid.rows, grid.columns, strict=True):
        wanted = np.zeros(grid.width, bool)
        for column in columns:
            if kept[row.core : row.core_end, column.core : column.core_end].any():
                wanted[column.outer : column.outer_end] = True
        if wanted.any():
            expected.append((row.outer, min(row.outer_end, grid.height), wanted.tolist()))
    found = []
    for first, end, columns in slide.reads:
        read = np.zeros(grid.width, bool)
        for left, right in columns:
            assert not read[left:right].any()
            read[left:right] = True
        found.append((first, end, read.tolist()))
    assert found == expected


def patch_mask(monkeypatch: pytest.MonkeyPatch, mask: list[list[int]], step: int) -> None:
    monkeypatch.setattr(job_module, "find_tissue", lambda *_: Tissue(np.array(mask, bool), step))


@pytest.mark.parametrize("steps", ["majority_radius=2,min_island=400", "crf,crf.iterations=2,min_island=300"])
@pytest.mark.parametrize("mask", [[[1, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]])
def test_post_processing_leaves_glass_alone(tmp_path, monkeypatch, slides, steps, mask):
    write_png(tmp_path / "in" / "a.png", picture(3, 64, 96))
    patch_mask(monkeypatch, mask, 32)
    slides()
    options = {"tile": 32, "postprocess": steps, "overlay": True, "probabilities": True}
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **options)
    ids, kept = tifffile.imread(tmp_path / "out/masks/a.ome.tif", level=0), np.array(mask, bool).repeat(32, 0)
    kept = kept.repeat(32, 1)
    assert not ids[~kept].any() and (kept.any() == ids.any())
    entry = entries(tmp_path / "out")["a.png"]
    assert entry["pixels"] == {n: int((ids == i).sum()) for i, n in enumerate(("background", "cancer", "stroma"))}
    assert entry["glass_pixels"] == int((~kept).sum()) and entry["warnings"] == []


@pytest.mark.parametrize("mask", [[[0, 0, 0], [0, 1, 0], [0, 0, 0]], [[0, 0, 0]] * 3])
def test_an_overlay_is_white_on_glass(tmp_path, monkeypatch, slides, mask):
    write_png(tmp_path / "in" / "a.png", picture(3, 96, 96) // 2)
    patch_mask(monkeypatch, mask, 32)
    slides()
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", tile=32, overlay=True)
    overlay = read_image(tmp_path / "out/overlays/a.jpg")
    for row in range(3):
        for column in range(3):
            inner = overlay[32 * row + 9 : 32 * row + 23, 32 * column + 9 : 32 * column + 23]
            assert (inner.mean() > 240) == (not mask[row][column])


def test_results_of_a_slide_are_complete_and_resumed(tmp_path, slides):
    for i in range(3):
        write_png(tmp_path / "in" / f"{i}.png", picture(i, 100, 80))
    slides()
    options = {"tile": 32, "readers": 2, "writers": 2}
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **options).done == 3
    before = results(tmp_path / "out")
    names = [f"{f}/{i}" for i in range(3) for f in ("masks", "overviews", "tissue")]
    assert sorted(before) == sorted(["summary.csv"] * ("summary.csv" in before) + [
        f"{name}.ome.tif" if name.startswith("masks") else f"{name}.png" for name in names
    ])  # fmt: skip
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **options).skipped == 3
    (tmp_path / "out/tissue/0.png").unlink()
    (tmp_path / "out/overviews/1.png").write_bytes(b"damaged")
    again = run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **options)
    assert (again.done, again.skipped) == (2, 1) and results(tmp_path / "out") == before


@pytest.mark.parametrize("after", [1, 6])
def test_a_stopped_run_leaves_nothing_half_done_and_is_resumed(tmp_path, monkeypatch, slides, after):
    for i in range(4):
        write_png(tmp_path / "in" / f"{i}.png", picture(i, 200, 100))
    patch_mask(monkeypatch, [[0, 0], [1, 0], [0, 0], [0, 1]], 50)
    slides()
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", tile=25)
    manifest = Manifest(tmp_path / "out")
    engine = FakeEngine(on_wait=lambda call: stream.stop() if call == after else None)
    stream = make_stream(engine, tmp_path / "in", tmp_path / "out", manifest, tile=25)
    first = finish(stream)
    manifest.close()
    assert first.done < 4 and first.failed == 0 and not partials(tmp_path / "out")
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", tile=25)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_a_slide_without_a_small_level_is_segmented_whole_and_says_so(tmp_path, slides):
    class Flat(Slide):
        def overview(self, step: int) -> None:
            return None

    rgb = picture(3, 60, 90)
    write_png(tmp_path / "in" / "a.png", rgb)
    slides(Flat)
    for threshold, warnings in ((0.03, [NO_OVERVIEW]), (None, [])):
        out = tmp_path / str(threshold)
        run_stream(FakeEngine(), tmp_path / "in", out, tile=32, tissue_threshold=threshold)
        entry = entries(out)["a.png"]
        assert entry["warnings"] == warnings and entry["glass_pixels"] == 0
        ids = tifffile.imread(out / "masks/a.ome.tif")
        assert (ids == rgb.argmax(2)).all()
        colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)
        assert (read_image(out / "overviews/a.png") == colours[ids]).all()
    assert (read_image(tmp_path / "0.03/tissue/a.png") == 255).all()


@pytest.mark.parametrize("when", ["overview", "close"])
@pytest.mark.parametrize("density", [0, 1])
def test_a_damaged_slide_costs_itself_alone(tmp_path, monkeypatch, slides, when, density):
    class Damaged(Slide):
        def fail(self) -> None:
            if self.path.name == "1.png":
                raise ImageError("damaged", where=self.path)

        def overview(self, step: int) -> np.ndarray | None:
            self.fail() if when == "overview" else None
            return super().overview(step)

        def close(self) -> None:
            super().close()
            self.fail() if when == "close" else None

    for i in range(3):
        write_png(tmp_path / "in" / f"{i}.png", picture(i, 64, 64))
    patch_mask(monkeypatch, [[density]], 64)
    slides(Damaged)
    totals = run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", tile=32)
    assert (totals.done, totals.failed) == (2, 1) and "damaged" in entries(tmp_path / "out")["1.png"]["error"]
    assert not [name for name in results(tmp_path / "out") if "1." in name] and not partials(tmp_path / "out")


@pytest.mark.parametrize("density", [0, 1])
def test_a_full_disk_ends_the_run_and_leaves_nothing(tmp_path, monkeypatch, slides, density):
    def full(self: PyramidWriter, tile: np.ndarray) -> tuple[int, int]:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_png(tmp_path / "in" / "a.png", picture(1, 64, 64))
    patch_mask(monkeypatch, [[density]], 64)
    slides()
    monkeypatch.setattr(PyramidWriter, "_write_tile", full)
    with pytest.raises(ImageError, match=r"a\.ome\.tif: cannot be written: No space left"):
        run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", tile=32)
    assert results(tmp_path / "out") == {} and not partials(tmp_path / "out")


@pytest.mark.parametrize(
    ("mpp", "wanted"), [((1.6, 1.6), 1.0), ((0.455063, 0.456413), 0.5), ((0.455063, 0.456413), 0.24), ((0.1, 0.2), 2)]
)
def test_outlines_have_the_corners_of_level_0(tmp_path, mpp, wanted):
    """Whether the slide is enlarged or shrunk, and by whichever factors down and across."""
    (tmp_path / "in").mkdir()
    rgb = np.full((301, 403, 3), (0, 200, 0), np.uint8)  # one class
    per_cm = 1e4 / mpp[1], 1e4 / mpp[0]
    options = {"tile": (64, 64), "photometric": "rgb", "resolution": per_cm, "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(tmp_path / "in/a.tif") as file:
        file.write(rgb, **options)
        file.write(rgb[::2, ::2].copy(), subfiletype=1, **options)
    given = {"tissue_threshold": None, "geojson": OutlineOptions(), "resolution": Resolution(mpp=wanted)}
    assert run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", **given).done == 1
    (feature,) = json.loads((tmp_path / "out/geojson/a.geojson").read_text())["features"]
    (ring,) = feature["geometry"]["coordinates"]
    entry = entries(tmp_path / "out")["a.tif"]
    assert (entry["height"], entry["width"]) != rgb.shape[:2]
    assert sorted(map(tuple, ring[:-1])) == [(0, 0), (0, 301), (403, 0), (403, 301)]
