"""The report's small pictures: what they show, and that their bytes and numbers are bounded."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from made_up_runs import MadeUpRun, made_up_ids
from PIL import Image
from running import FakeEngine, run_stream
from running import picture as random_rgb
from slide_files import write_pyramid

from histoseg_fast.images import Resolution, open_image, write_png
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.reporting import pictures
from histoseg_fast.reporting.cohort import read_cohort
from histoseg_fast.reporting.pictures import majority, make_pictures, palette_png, shrink

sizes = st.integers(1, 40)


@settings(deadline=None)
@given(ids=arrays.arrays(np.uint8, st.tuples(sizes, sizes), elements=st.integers(0, 4)), factor=st.integers(1, 9))
def test_majority_is_the_most_frequent_id_of_every_block(ids: np.ndarray, factor: int) -> None:
    made = majority(ids, factor, 5)
    height, width = ids.shape
    assert made.shape == (-(-height // factor), -(-width // factor))
    for y, x in np.ndindex(made.shape):
        block = ids[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
        assert made[y, x] == np.bincount(block.ravel()).argmax()


@settings(deadline=None)
@given(rgb=arrays.arrays(np.uint8, st.tuples(sizes, sizes, st.just(3))), factor=st.integers(1, 9))
def test_means_are_rounded_means_of_every_block(rgb: np.ndarray, factor: int) -> None:
    made = pictures._mean(rgb, factor)
    for y, x in np.ndindex(made.shape[:2]):
        block = rgb[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].reshape(-1, 3)
        assert np.array_equal(made[y, x], (2 * block.sum(0, np.int64) + len(block)) // (2 * len(block)))


def test_bands_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "a.png", random_rgb(1, 100, 50))
    with open_image(tmp_path / "a.png") as image:
        whole = shrink(image, 7, pictures._mean)
    monkeypatch.setattr(pictures, "BAND_BYTES", 1)
    with open_image(tmp_path / "a.png") as image:
        assert np.array_equal(shrink(image, 7, pictures._mean), whole)


def test_the_class_map_is_a_palette_png_with_a_clear_background() -> None:
    ids = made_up_ids(0, 20, 30)
    with Image.open(io.BytesIO(palette_png(ids, PAPER_PALETTE.colours))) as read:
        assert read.mode == "P" and np.array_equal(np.asarray(read), ids)
        rgba = np.asarray(read.convert("RGBA"))
    assert np.array_equal(rgba[..., :3], PAPER_PALETTE.array[ids])
    assert np.array_equal(rgba[..., 3] == 0, ids == 0)


def test_pictures_show_what_lies_on_disk(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    run.done("a", seed=3, height=200, width=300)
    run.end()
    ((_, made),) = make_pictures(read_cohort(run.out))
    with Image.open(io.BytesIO(made.mask)) as mask, Image.open(io.BytesIO(made.image)) as image:
        assert np.array_equal(np.asarray(mask), made_up_ids(3, 200, 300))
        assert image.format == "JPEG" and image.size == (300, 200)
    assert made.notes == ()


@pytest.mark.parametrize("most", [10**9, 120_000, 30_000, 12_000, 10])
def test_all_pictures_together_stay_under_the_limit(tmp_path: Path, most: int) -> None:
    run = MadeUpRun(tmp_path)
    for i in range(6):
        run.done(f"{i}", seed=i, height=180 + i, width=240)
    run.failed("bad", "broken")
    run.end()
    made = list(make_pictures(read_cohort(run.out), most))
    assert [row.name for row, _ in made] == [*map(str, range(6)), "bad"]
    assert sum(len(p.image) + len(p.mask) for _, p in made) <= most
    shown = [p for row, p in made if row.done]
    if most >= 12_000:
        assert all(p.image and p.mask and not p.notes for p in shown)
    else:
        assert all(p.notes == (pictures.NO_ROOM,) for p in shown)


def test_few_pictures_wait_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MadeUpRun(tmp_path)
    for i in range(40):
        run.done(f"{i:02}", seed=i)
    lock, begun, taken, ahead = threading.Lock(), [0], 0, []
    made = pictures.picture

    def counted(*arguments) -> pictures.Picture:
        with lock:
            begun[0] += 1
            ahead.append(begun[0] - taken)
        return made(*arguments)

    monkeypatch.setattr(pictures, "picture", counted)
    for _ in make_pictures(read_cohort(run.out)):
        taken += 1
    assert taken == 40 and max(ahead) <= 3 * pictures.MAX_WORKERS + 1


def test_images_that_vanished_or_changed_are_shown_by_their_mask(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path)
    for i, name in enumerate("abcdefg"):
        run.done(name, seed=i)
    run.done("h", {"path": None})
    run.done("i", {"path": "/x\0y"})
    run.done("j", {"path": "/" + "x" * 5000})
    (run.images / "b.png").unlink()
    write_png(run.images / "c.png", random_rgb(99, 30, 40))
    (run.images / "d.png").unlink()
    (run.images / "d.png").mkdir()
    (run.out / "masks" / "e.png").unlink()
    (run.out / "masks" / "f.png").write_bytes((run.out / "masks" / "a.png").read_bytes())
    (run.out / "masks" / "g.png").unlink()
    (run.images / "g.png").unlink()
    made = {row.name: p for row, p in make_pictures(read_cohort(run.out))}
    told = {name: p.notes for name, p in made.items()}
    assert told["a"] == () and told["b"] == (pictures.VANISHED,) and told["c"] == (pictures.CHANGED,)
    assert told["d"] == (pictures.UNREADABLE,) and told["e"] == told["f"] == (pictures.NO_MASK,)
    assert told["g"] == (pictures.NO_MASK, pictures.VANISHED)
    assert told["h"] == told["i"] == told["j"] == (pictures.VANISHED,)
    assert all(made[name].mask and not made[name].image for name in "bcdhij")
    assert all(made[name].image and not made[name].mask for name in "ef")


@pytest.mark.parametrize("share", [10**6, 20_000])
def test_slides_are_shown_from_their_pyramids(tmp_path: Path, share: int) -> None:
    """The slide is read at half its resolution, so that sizes differ from those of its finest level."""
    (tmp_path / "in").mkdir()
    flat = np.zeros((3000, 2100, 3), np.uint8)
    flat[:1500], flat[1500:] = (200, 120, 180), (90, 40, 130)
    slide = write_pyramid(tmp_path / "in" / "a.tif", [flat, flat[::2, ::2].copy(), flat[::4, ::4].copy()], 0.5)
    engine = FakeEngine()
    totals = run_stream(engine, tmp_path / "in", tmp_path / "out", resolution=Resolution(mpp=1.0))
    assert totals.done == 1
    cohort = read_cohort(tmp_path / "out")
    (row,) = cohort.rows
    assert (row.width, row.height) == (1050, 1500) and row.mask == "masks/a.ome.tif"
    ((_, made),) = make_pictures(cohort, share)
    assert made.notes == ()
    with Image.open(io.BytesIO(made.mask)) as mask, Image.open(io.BytesIO(made.image)) as image:
        for shown in (mask, image):
            assert abs(shown.height / shown.width - 1500 / 1050) < 0.02 and max(shown.size) <= pictures.MAX_SIDE
        height, width = image.height, image.width
        got = np.asarray(image.convert("RGB"), int)
        assert abs(got[height // 4, width // 2] - (200, 120, 180)).max() < 12
        assert abs(got[height * 3 // 4, width // 2] - (90, 40, 130)).max() < 12
        ids = np.asarray(mask)
    whole = tifffile.imread(tmp_path / "out" / row.mask, level=0)
    where = np.linspace(0.05, 0.95, 7)
    grid = [[(int(y * a.shape[0]), int(x * a.shape[1])) for y in where for x in where] for a in (ids, whole)]
    assert [ids[p] for p in grid[0]] == [whole[p] for p in grid[1]]
    assert slide.exists()
