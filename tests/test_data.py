"""Folders of pairs: how images, labels and split.csv are matched, and one line for all that is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from data_folders import easy_pair, write_folder

from histoseg_fast.data import PROBLEMS_SHOWN, Pair, check_pairs, find_pairs, load_pair
from histoseg_fast.errors import DataError, ImageError, LabelError, UsageError
from histoseg_fast.images import write_png
from histoseg_fast.labels import Palette, encode

RNG = np.random.default_rng(3)


def folder(root: Path, *names: str, splits: dict[str, str] | None = None) -> Path:
    return write_folder(root, {name: easy_pair(RNG, 6, 9) for name in names}, splits)


def refused(root: Path) -> str:
    """The message of the DataError, checked to be one line that names the folder."""
    with pytest.raises(DataError) as caught:
        find_pairs(root)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(root))
    return message


def test_pairs_are_matched_by_stem_whatever_the_suffix(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b.1", "b.2")
    (tmp_path / "labels" / "a.png").unlink()
    tifffile.imwrite(tmp_path / "labels" / "a.TIF", np.zeros((6, 9, 3), np.uint8), photometric="rgb")
    pairs = find_pairs(tmp_path)
    assert [pair.name for pair in pairs] == ["a.png", "b.1.png", "b.2.png"]
    assert pairs[0].image == tmp_path / "images" / "a.png"
    assert pairs[0].label == tmp_path / "labels" / "a.TIF"


def test_without_split_csv_every_fifth_by_name_validates(tmp_path: Path) -> None:
    folder(tmp_path, *(f"{i:02d}" for i in reversed(range(12))))
    splits = [pair.split for pair in find_pairs(tmp_path)]
    assert splits == ["val" if i in (4, 9) else "train" for i in range(12)]


def test_split_csv_assigns_and_leaves_out_what_it_does_not_name(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b", "c", "d")
    text = "width,split,name\n9,test,c.png\n9,train,a\n9,val,b.tif\n"
    (tmp_path / "split.csv").write_text(text, encoding="utf-8-sig")
    assert [(pair.name, pair.split) for pair in find_pairs(tmp_path)] == [
        ("a.png", "train"),
        ("b.png", "val"),
        ("c.png", "test"),
    ]


def test_names_with_dots_are_found_with_and_without_their_suffix(tmp_path: Path) -> None:
    folder(tmp_path, "case.1", "case.2")
    (tmp_path / "split.csv").write_text("name,split\ncase.1,train\ncase.2.png,val\n")
    assert [pair.split for pair in find_pairs(tmp_path)] == ["train", "val"]


def test_hidden_and_other_files_are_ignored(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / ".b.png")
    (tmp_path / "images" / "._a.png").write_bytes(b"resource fork")
    (tmp_path / "labels" / "notes.txt").write_text("not an image")
    assert [pair.name for pair in find_pairs(tmp_path)] == ["a.png"]


def test_every_problem_is_in_one_line(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b", "c", splits={"a": "train", "b": "training", "z": "val", "c": "val"})
    with open(tmp_path / "split.csv", "a") as stream:
        stream.write("a.png,test\n")
    (tmp_path / "labels" / "b.png").unlink()
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "d.png")
    shutil.copy(tmp_path / "images" / "a.png", tmp_path / "images" / "a.jpg")
    message = refused(tmp_path)
    for problem in (
        "images/: two files with one name: a.jpg, a.png",
        "b: image without label",
        "d: image without label",
        "c: label without image",
        "split.csv: b.png has split 'training', not one of train, val, test",
        "split.csv: z.png has no image",
        "split.csv: c.png has no image",
        "split.csv: a.png stands twice",
    ):
        assert problem in message
    assert "8 problem(s)" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no rows with the columns name and split"),
        (b"name,split\n", "no rows with the columns name and split"),
        (b"file,split\na.png,train\n", "no rows with the columns name and split"),
        (b"name;split\na.png;train\n", "no rows with the columns name and split"),
        (b"name,split\n\xe9.png,train\n", "cannot be read ('utf-8' codec"),
        (b"name,split\na.png\n", "a.png has split None"),
        (b"name,split\n,train\n", "has no image"),
        (b"split,name\ntrain\n", "has no image"),
    ],
)
def test_bad_split_files(tmp_path: Path, content: bytes, told: str) -> None:
    folder(tmp_path, "a", "b")
    (tmp_path / "split.csv").write_bytes(content)
    (tmp_path / "labels" / "b.png").unlink()
    message = refused(tmp_path)
    assert told in message and "b: image without label" in message


def test_many_problems_are_counted_and_cut(tmp_path: Path) -> None:
    folder(tmp_path, *(f"{i:03d}" for i in range(PROBLEMS_SHOWN + 7)))
    shutil.rmtree(tmp_path / "labels")
    (tmp_path / "labels").mkdir()
    message = refused(tmp_path)
    assert f"{PROBLEMS_SHOWN + 7} problem(s)" in message and message.endswith("and 7 more")
    assert message.count("image without label") == PROBLEMS_SHOWN


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere: no such folder$"):
        find_pairs(tmp_path / "nowhere")
    message = refused(tmp_path)
    assert "images/: no such folder" in message and "labels/: no such folder" in message
    (tmp_path / "labels").mkdir()
    assert "1 problem(s) in this data folder: images/: no such folder" in refused(tmp_path)
    (tmp_path / "images").write_text("a file")
    assert "images/: no such folder" in refused(tmp_path)
    (tmp_path / "images").unlink()
    (tmp_path / "images").mkdir()
    assert "images/ and labels/ hold no image (.jpeg, .jpg, .png" in refused(tmp_path)


def test_load_pair_gives_the_pixels_and_the_classes(tmp_path: Path) -> None:
    rgb, ids = easy_pair(RNG, 13, 21)
    write_folder(tmp_path, {"a": (rgb, ids)})
    loaded = load_pair(find_pairs(tmp_path)[0])
    np.testing.assert_array_equal(loaded[0], rgb)
    np.testing.assert_array_equal(loaded[1], ids)
    assert loaded[0].dtype == loaded[1].dtype == np.uint8


def test_sizes_that_differ(tmp_path: Path) -> None:
    rgb, ids = easy_pair(RNG, 6, 9)
    write_folder(tmp_path, {"a": (rgb, ids.T)})
    with pytest.raises(DataError, match=r"a\.png: label is 6x9 but its image is 9x6$"):
        load_pair(find_pairs(tmp_path)[0])


def test_colours_off_the_palette_are_told_with_file_and_place(tmp_path: Path) -> None:
    rgb, ids = easy_pair(RNG, 6, 9)
    write_folder(tmp_path, {"a": (rgb, ids)})
    label = encode(np.zeros_like(ids))
    label[4, 7] = (250, 3, 0)
    write_png(tmp_path / "labels" / "a.png", label)
    pair = find_pairs(tmp_path)[0]
    with pytest.raises(LabelError) as caught:
        load_pair(pair)
    message = str(caught.value)
    assert message.startswith(str(pair.label)) and "x=7, y=4 is 250,3,0" in message
    assert message.count("\n") == 0 and "raise the tolerance" in message
    with pytest.raises(LabelError, match="x=7, y=4"):
        load_pair(pair, tolerance=5.8)  # sqrt(25 + 9) = 5.83
    assert load_pair(pair, tolerance=5.9)[1][4, 7] == 1


def test_another_palette(tmp_path: Path) -> None:
    palette = Palette(("glass", "gland"), ((255, 255, 255), (0, 0, 255)))
    rgb, ids = easy_pair(RNG, 6, 9)
    write_folder(tmp_path, {"a": (rgb, ids)})
    write_png(tmp_path / "labels" / "a.png", encode(ids % 2, palette))
    np.testing.assert_array_equal(load_pair(find_pairs(tmp_path)[0], palette)[1], ids % 2)


def test_unreadable_files_are_image_errors(tmp_path: Path) -> None:
    folder(tmp_path, "a")
    pair = find_pairs(tmp_path)[0]
    pair.label.write_bytes(b"")
    with pytest.raises(ImageError, match=r"labels/a\.png"):
        load_pair(pair)
    with pytest.raises(ImageError, match=r"gone\.png"):
        load_pair(Pair("gone", tmp_path / "gone.png", pair.label, "train"))


def test_check_pairs_names_every_file_that_cannot_be_used(tmp_path: Path) -> None:
    folder(tmp_path, "a", "b", "c", "d")
    pairs = find_pairs(tmp_path)
    check_pairs(tmp_path, pairs)
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    write_png(tmp_path / "labels" / "c.png", np.zeros((5, 5, 3), np.uint8))
    write_png(tmp_path / "labels" / "d.png", np.full((6, 9, 3), 77, np.uint8))
    with pytest.raises(DataError) as caught:
        check_pairs(tmp_path, pairs)
    message = str(caught.value)
    assert "3 problem(s)" in message and "\n" not in message and "a.png" not in message
    assert "images/b.png" in message and "label is 5x5 but its image is 9x6" in message
    assert "labels/d.png: 54 of 54 label pixels are off the palette (x=0, y=0 is 77,77,77" in message
