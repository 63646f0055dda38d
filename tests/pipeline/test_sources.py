"""From arguments to images: what is found, what it is called, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from histoseg_fast.errors import UsageError
from histoseg_fast.images import companions as companions_module
from histoseg_fast.images import write_png
from histoseg_fast.images.sizes import PIXELS_A_BYTE
from histoseg_fast.pipeline.shards import Shard, take_share
from histoseg_fast.pipeline.sources import find_sources
from histoseg_fast.pipeline.watch import Watcher


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return folder


def names(inputs: list[str], out: Path) -> list[str]:
    return [source.name for source in find_sources(inputs, out)]


def stems(inputs: list[str], out: Path) -> list[str]:
    return [source.stem for source in find_sources(inputs, out)]


def test_folders_are_searched_for_known_suffixes_sorted_and_named_from_the_folder(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "b.PNG", "a.jpg", "deep/er/c.tif", "d.jpeg", "e.tiff", "notes.txt", ".hidden.png")
    touch(data, ".git/x.png")
    assert names([str(data)], tmp_path / "out") == ["a.jpg", "b.PNG", "d.jpeg", "deep/er/c.tif", "e.tiff"]
    assert stems([str(data)], tmp_path / "out") == ["a", "b", "d", "deep/er/c", "e"]


def test_a_file_is_taken_whatever_its_suffix_and_only_once(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "scan.svs", "a.png")
    inputs = [str(data / "scan.svs"), str(data / "a.png"), str(data), f"{data}/../data/a.png", str(data / "*.png")]
    assert names(inputs, tmp_path / "out") == ["a.png", "scan.svs"]


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_arguments_changes_nothing(tmp_path: Path, order: int) -> None:
    data = touch(tmp_path, *(f"{i}.png" for i in range(9)))
    inputs = [str(data / f"{i}.png") for i in range(9)][::order]
    assert names(inputs, tmp_path / "out") == [f"{i}.png" for i in range(9)]


def test_patterns_and_literal_names_that_look_like_one(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a1.png", "a2.png", "a3.txt", "[a1].png", "deep/a4.png")
    assert names([str(data / "a*")], tmp_path / "out") == ["a1.png", "a2.png"]
    assert names([str(data / "[a1].png")], tmp_path / "out") == ["[a1].png"]
    assert names([str(data / "**" / "a4.png")], tmp_path / "out") == ["deep/a4.png"]
    assert names([str(data / "d*")], tmp_path / "out") == ["a4.png"]


def test_patterns_that_go_up_behind_a_wildcard_would_write_elsewhere(tmp_path: Path) -> None:
    touch(tmp_path, "a/deep/x.png", "b/y.png")
    assert names([f"{tmp_path}/a/../b/*.png"], tmp_path / "out") == ["y.png"]
    with pytest.raises(UsageError, match="goes up behind a wildcard"):
        find_sources([f"{tmp_path}/a/*/../../b/*.png"], tmp_path / "out")


def test_images_that_share_a_stem_keep_their_suffix(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a.png", "a.jpg", "b.png", "A/a.png")
    assert stems([str(data)], tmp_path / "out") == ["A/a", "a.jpg", "a.png", "b"]


def test_ome_tif_is_one_suffix(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a.ome.tif", "b.OME.TIFF", "c.ome.png", "d.x.tif", "e.ome.tif", "e.tif")
    assert stems([str(data)], tmp_path / "out") == ["a", "b", "c.ome", "d.x", "e.ome.tif", "e.tif"]


def test_stems_that_differ_in_case_only_do_not_meet_on_any_file_system(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "x.png", "X.jpg")
    assert stems([str(data)], tmp_path / "out") == ["X.jpg", "x.png"]


def test_two_images_of_one_name_are_refused(tmp_path: Path) -> None:
    data = touch(tmp_path, "one/a.png", "two/a.png")
    with pytest.raises(UsageError, match="same mask"):
        find_sources([str(data / "one"), str(data / "two")], tmp_path / "out")
    assert names([str(data)], tmp_path / "out") == ["one/a.png", "two/a.png"]


@pytest.mark.parametrize("out", ["results", "deep/results", "."])
def test_results_inside_the_input_are_no_input(tmp_path: Path, out: str) -> None:
    data = touch(tmp_path / "data", "a.png", "deep/b.png")
    folder = data / out
    touch(folder, "masks/a.png", "overlays/a.jpg", "probabilities/a.tif")
    assert names([str(data)], folder) == ["a.png", "deep/b.png"]
    assert names([str(data / "**" / "*.*")], folder) == ["a.png", "deep/b.png"]
    for inside in (folder / "masks", folder / "masks" / "a.png"):
        with pytest.raises(UsageError, match="results of this"):
            find_sources([str(inside)], folder)


@pytest.mark.parametrize("text", ["missing.png", "missing/", "empty", "*.png", "x" * 5000])
def test_an_input_that_names_nothing_is_wrong_usage(tmp_path: Path, text: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no image found|no such file"):
        find_sources([str(tmp_path / text)], tmp_path / "out")


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scandir = touch(tmp_path / "data", "a.png", "locked/b.png"), os.scandir

    def refuse(path: object) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="locked: folder cannot be read: Permission denied"):
        find_sources([str(data)], tmp_path / "out")


def test_files_of_one_slide_are_one_input(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a.mrxs", "a/Data.dat", "a/label.jpg", "s.vms", "s_0.jpg", "s_1.jpg", "plain.jpg")
    touch(data, "b.svs", "c.ndpi", "d.scn", "e.bif", "f.svslide")
    (data / "s.vms").write_text("[Virtual Microscope Specimen]\nImageFile=s_0.jpg\nImageFile(1,0)=s_1.jpg\n")
    wanted = ["a.mrxs", "b.svs", "c.ndpi", "d.scn", "e.bif", "f.svslide", "plain.jpg", "s.vms"]
    assert names([str(data)], tmp_path / "out") == wanted
    assert names([str(data / "*.*")], tmp_path / "out") == wanted


def test_a_dicom_series_is_one_input(tmp_path: Path) -> None:
    pydicom = pytest.importorskip("pydicom")
    for name, series in (("x/1.dcm", "1.2.3"), ("x/2.dcm", "1.2.4"), ("x/3.dcm", "1.2.3"), ("y/1.dcm", "1.2.3")):
        file = pydicom.Dataset()
        file.SeriesInstanceUID = series
        (tmp_path / name).parent.mkdir(exist_ok=True)
        file.save_as(tmp_path / name, implicit_vr=False, little_endian=True)
        (tmp_path / name).write_bytes(bytes(128) + b"DICM" + (tmp_path / name).read_bytes())
    touch(tmp_path, "x/4.dcm")
    assert names([str(tmp_path)], tmp_path / "out") == ["x/1.dcm", "x/2.dcm", "x/4.dcm", "y/1.dcm"]
    assert names([str(tmp_path / "x" / "3.dcm")], tmp_path / "out") == ["3.dcm"]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that are listed and files whose series is asked for; a file's text is its series."""
    seen: list[str] = []
    scandir = os.scandir

    def series(path: Path) -> str:
        seen.append(str(path))
        return path.read_text()

    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(str(path)), scandir(path))[1])
    monkeypatch.setattr(companions_module, "dicom_series", series)
    return seen


@pytest.mark.parametrize("every", [1, 3, 1000])
def test_a_folder_of_many_series_is_told_apart_once(tmp_path: Path, looks: list[str], every: int) -> None:
    count, folder = 1000, tmp_path / "in"
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:04}.dcm").write_text(str(i // every))
    sources = find_sources([str(folder)], tmp_path / "out")
    assert [source.name for source in sources] == [f"{i:04}.dcm" for i in range(0, count, every)]
    assert len(looks) <= 2 * count + 2
    looks.clear()
    share = take_share(sources, Shard(1, 1))
    sizes = {name: PIXELS_A_BYTE * (folder / name).stat().st_size for name in map("{:04}.dcm".format, range(count))}
    assert share.pixels == sum(sizes.values()) and len(looks) <= 2 * count + 2
    looks.clear()
    Watcher([str(folder)], tmp_path / "out", None, print)._scan()
    assert len(looks) <= 3 * count + 2


def test_links_dangling_and_circular(tmp_path: Path) -> None:
    data = touch(tmp_path / "data", "a.png")
    (data / "gone.png").symlink_to(data / "nowhere.png")
    (data / "loop").symlink_to(data, target_is_directory=True)
    assert names([str(data)], tmp_path / "out") == ["a.png", "gone.png"]
    assert names([str(data / "gone.png")], tmp_path / "out") == ["gone.png"]


def test_names_of_any_bytes(tmp_path: Path) -> None:
    raw = [b"sp ace.png", "\u00fcml\u00e4ut.png".encode(), b'it\'s "q".png', b"new\nline.png", b"bad\xff\xfe.png"]
    for name in raw:
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    assert sorted(os.fsencode(name) for name in names([str(tmp_path)], tmp_path / "out")) == sorted(raw)


def test_a_folder_of_somebody_elses_masks_is_not_written_to(tmp_path, tiny_plan):
    from histoseg_fast.pipeline.run import InferOptions, infer

    theirs = tmp_path / "data" / "masks" / "a.png"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"hand-drawn")
    write_png(tmp_path / "data" / "images" / "a.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UsageError, match="holds masks that no run wrote"):
        infer(tiny_plan, [str(tmp_path / "data" / "images")], tmp_path / "data", InferOptions())
    assert theirs.read_bytes() == b"hand-drawn"
