"""`infer` on slides: the resolution that runs, what is recorded of it, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from running import entries, results, run_command
from slide_files import SHARED_SLIDES, halves, write_philips, write_pyramid, write_svs
from tiny_plans import tiny_manifest, tiny_model

from histoseg_fast.images import Resolution, open_image, write_png
from histoseg_fast.plan import MODEL, write_plan

CLASSES = ("background", "cancer", "stroma")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny plan, trained at 1 micrometre a pixel."""
    path = tmp_path_factory.mktemp("plan") / "tiny.plan"
    write_plan(path, tiny_manifest(mpp=1.0), {MODEL: tiny_model()})
    return path


def summary(out: Path) -> dict[str, dict[str, str]]:
    return {row["image"]: row for row in csv.DictReader((out / "summary.csv").read_text().splitlines())}


def mask(path: Path) -> np.ndarray:
    """Class ids (h, w)."""
    return tifffile.imread(path) if path.suffix == ".tif" else np.asarray(Image.open(path))


def test_slides_are_read_at_the_resolution_of_the_plan(tmp_path: Path, plan: Path) -> None:
    levels = halves(301, 403, 3)
    (tmp_path / "in").mkdir()
    write_svs(tmp_path / "in" / "a.svs", levels)
    write_philips(tmp_path / "in" / "b.tiff", levels[0], mpp=0.25)
    write_pyramid(tmp_path / "in" / "unknown.tif", levels, mpp=None)
    write_png(tmp_path / "in" / "plain.png", levels[1])
    out = tmp_path / "out"
    run = run_command("infer", tmp_path / "in", "--engine", plan, "--out", out)
    assert run.returncode == 3 and "3 done, 1 failed" in run.stdout
    assert "unknown.tif: the file does not state its resolution" in run.stderr and "--level N (0 to 2)" in run.stderr
    lines, rows = entries(out), summary(out)
    assert {name: (line["level"], line["width"]) for name, line in lines.items() if line["status"] == "done"} == {
        "a.svs": (1, 201), "b.tiff": (0, 101), "plain.png": (0, 201)
    }  # fmt: skip
    assert lines["b.tiff"]["mpp"] == 1.0 and lines["plain.png"]["mpp"] is None
    assert rows["plain.png"]["mpp"] == "" == rows["plain.png"]["cancer_um2"]
    for name in ("a.svs", "b.tiff"):
        mpp, row = float(lines[name]["mpp"]), rows[name]
        assert float(row["mpp"]) == pytest.approx(mpp, abs=1e-5)
        assert float(row["cancer_um2"]) == pytest.approx(int(row["cancer_pixels"]) * mpp**2, abs=0.06)
    # The same pixels as a plain image give the same mask.
    assert (mask(out / "masks" / "a.ome.tif") == mask(out / "masks" / "plain.png")).all()
    with open_image(tmp_path / "in" / "b.tiff", Resolution(mpp=1.0)) as image:
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        image.read_rows(0, image.height, pixels)
    write_png(tmp_path / "b.png", pixels)
    assert run_command("infer", tmp_path / "b.png", "--engine", plan, "--out", tmp_path / "o").returncode == 0
    assert (mask(out / "masks" / "b.ome.tif") == mask(tmp_path / "o" / "masks" / "b.png")).all()


def test_tiles_of_a_resampled_slide_are_those_of_the_whole(tmp_path: Path, plan: Path) -> None:
    write_pyramid(tmp_path / "a.tif", halves(900, 700, 2))
    arguments = ("infer", tmp_path / "a.tif", "--engine", plan, "--mpp", 0.83, "--overlay", "--precision", "fp32")
    for tile in (64, 1024):
        assert run_command(*arguments, "--tile", tile, "--out", tmp_path / str(tile)).returncode == 0
    assert results(tmp_path / "64") == results(tmp_path / "1024")


def test_another_resolution_is_another_run(tmp_path: Path, plan: Path) -> None:
    path, out = write_pyramid(tmp_path / "a.tif", halves(301, 403, 2)), tmp_path / "out"
    arguments = ("infer", path, "--engine", plan, "--out", out)
    for options, shape in (((), (150, 201)), (("--level", 0), (301, 403)), (("--mpp", 2), (75, 101))):
        assert "1 done, 0 failed, 0 skipped" in run_command(*arguments, *options).stdout
        assert mask(out / "masks" / "a.ome.tif").shape == shape
        assert "0 done, 0 failed, 1 skipped" in run_command(*arguments, *options).stdout
    assert entries(out)["a.tif"]["level"] == 1 and entries(out)["a.tif"]["mpp"] == 2


def test_glass_is_skipped_and_another_mask_is_another_run(tmp_path: Path, plan: Path) -> None:
    rgb = np.full((1200, 1600, 3), 243, np.uint8)
    rgb[500:700, 100:400] = halves(200, 300, 1)[0]
    path, out = write_pyramid(tmp_path / "a.tif", [rgb, np.ascontiguousarray(rgb[::4, ::4])]), tmp_path / "out"
    arguments = ("infer", path, "--engine", plan, "--out", out, "--tile", 128, "--level", 0)
    names = {"masks/a.ome.tif", "overviews/a.png", "summary.csv"}
    run = run_command(*arguments)
    assert run.returncode == 0 and run.stderr.count("\n") == 1
    assert set(results(out)) == names | {"tissue/a.png"}
    masked, row, record = (
        mask(out / "masks/a.ome.tif"),
        summary(out)["a.tif"],
        json.loads((out / "run.json").read_text()),
    )
    glass = int(row["glass_pixels"])
    assert 0.5 * masked.size < glass < 0.9 * masked.size == 0.9 * sum(int(row[f"{n}_pixels"]) for n in CLASSES)
    assert record["glass_megapixels"] == pytest.approx(glass / 1e6, abs=1e-3) and record["megapixels"] == 1.92
    assert "0 done, 0 failed, 1 skipped" in run_command(*arguments).stdout
    assert "1 done, 0 failed, 0 skipped" in run_command(*arguments, "--tissue-threshold", 0.05).stdout
    (out / "tissue" / "a.png").unlink()
    assert "1 done, 0 failed, 0 skipped" in run_command(*arguments, "--no-tissue-mask").stdout
    assert set(results(out)) == names and summary(out)["a.tif"]["glass_pixels"] == "0"
    whole = mask(out / "masks/a.ome.tif")
    inner = slice(420, 780), slice(20, 480)  # within the margin, so in tiles that are kept
    assert (masked[inner] == whole[inner]).all() and whole[inner].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tissue-threshold", 0), "--tissue-threshold"),
        (("--tissue-threshold", "nan"), "--tissue-threshold"),
        (("--level", 0, "--mpp", 1), "--level and --mpp both choose"),
        (("--mpp", 0), "--mpp: 0 is not 0.01 to 20"),
        (("--mpp", "nan"), "--mpp: nan is not"),
        (("--level", -1), "--level"),
    ],
)
def test_wrong_usage(tmp_path: Path, plan: Path, options: tuple, words: str) -> None:
    path = write_pyramid(tmp_path / "a.tif", halves(80, 90, 2))
    run = run_command("infer", path, "--engine", plan, "--out", tmp_path / "out", *options)
    assert run.returncode == 2 and words in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_a_plan_without_resolution_reads_slides_where_it_is_told(tmp_path: Path, tiny_plan_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", halves(80, 90, 2))
    arguments = ("infer", path, "--engine", tiny_plan_path, "--out", tmp_path / "out")
    run = run_command(*arguments)
    assert run.returncode == 3 and "the plan does not record the resolution it was trained at; give --mpp" in run.stderr
    assert run_command(*arguments, "--mpp", 1).returncode == 0
    assert run_command(*arguments, "--level", 1).returncode == 0


@pytest.mark.skipif(not SHARED_SLIDES.is_dir(), reason="no real slides (set HISTOSEG_DATA)")
def test_a_folder_of_real_slides(tmp_path: Path, plan: Path) -> None:
    out = tmp_path / "out"
    run = run_command("infer", SHARED_SLIDES, "--engine", plan, "--out", out)
    assert run.returncode == 3 and "Traceback" not in run.stderr
    failed = {name: line["error"] for name, line in entries(out).items() if line["status"] == "failed"}
    assert set(failed) == {"boxes.tiff", "broken.svs", "tcga-cr-7395-01a-01-ts1.svs", "unopenable.tiff"}
    done = {name: line["mpp"] for name, line in entries(out).items() if line["status"] == "done"}
    assert done == {"CMU-1-Small-Region.svs": 1.0, "boxes_0.dcm": 1.0, "kidney-48-5.tif": None, "small.svs": 1.0}
