"""Shards: disjoint, complete, balanced, the same for any order; and what `--shard` takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import make_pictures, picture

from histoseg_fast.errors import UsageError
from histoseg_fast.images import write_png
from histoseg_fast.pipeline.shards import MAX_SHARDS, Shard, deal, take_share
from histoseg_fast.pipeline.sources import find_sources

names = st.text(st.characters(min_codepoint=1, max_codepoint=0xDFFF), min_size=1, max_size=8)
weights = st.dictionaries(names, st.one_of(st.integers(0, 5), st.integers(0, 2**37)), max_size=40)
many = settings(max_examples=300, deadline=None)


@many
@given(weights, st.integers(1, 60))
def test_every_image_is_in_one_shard_and_none_is_far_heavier(weighed: dict[str, int], of: int) -> None:
    dealt = deal(weighed.items(), of)
    assert dealt.keys() == weighed.keys() and set(dealt.values()) <= set(range(1, of + 1))
    loads = [sum(weighed[name] for name, part in dealt.items() if part == number) for number in range(1, of + 1)]
    assert sum(loads) == sum(weighed.values())
    assert max(loads) - min(loads) <= max(weighed.values(), default=0)
    assert max(loads) * of <= sum(loads) + (of - 1) * max(weighed.values(), default=0)


@many
@given(weights, st.integers(1, 20), st.randoms())
def test_the_order_of_the_images_changes_nothing(weighed: dict[str, int], of: int, random) -> None:
    shuffled = list(weighed.items())
    random.shuffle(shuffled)
    assert deal(shuffled, of) == deal(weighed.items(), of)


@many
@given(st.sets(names, max_size=40), st.integers(0, 9), st.integers(1, 50))
def test_images_of_one_size_are_dealt_out_evenly(equal: set[str], weight: int, of: int) -> None:
    dealt = list(deal(((name, weight) for name in equal), of).values())
    counts = [dealt.count(number) for number in range(1, of + 1)]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(9)), st.integers(1, 12))
def test_shares_of_files_whatever_the_order_of_arguments(shard_folder: Path, order: list[int], of: int) -> None:
    files = [str(path) for path in sorted(shard_folder.iterdir())]
    shares = []
    for number in range(1, of + 1):
        sources = find_sources([files[i] for i in order], shard_folder / "out")
        shares.append(take_share(sources, Shard(number, of)))
    listed = find_sources([str(shard_folder)], shard_folder / "out")
    assert sorted(source.name for share in shares for source in share.sources) == [source.name for source in listed]
    assert [share.sources for share in shares] == [
        [source for source in listed if source in share.sources] for share in shares
    ]
    assert sum(share.pixels for share in shares) == shares[0].found_pixels and shares[0].found == len(listed)
    alone = take_share(listed, Shard(1, of))
    assert [source.name for source in alone.sources] == [source.name for source in shares[0].sources]


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine images of different sizes, one of them damaged."""
    folder = tmp_path_factory.mktemp("shards")
    for i in range(8):
        write_png(folder / f"{i}.png", picture(i, 10 + 7 * i, 20))
    (folder / "bad.png").write_bytes(b"?" * 100)
    return folder


def test_what_is_told_of_a_share(shard_folder: Path) -> None:
    share = take_share(find_sources([str(shard_folder)], shard_folder / "out"), Shard(1, 1))
    pixels = sum((10 + 7 * i) * 20 for i in range(8)) + 400
    assert (share.found, share.pixels, share.found_pixels) == (9, pixels, pixels)
    assert str(share).endswith("; 1 by bytes, as no header tells their size: bad.png")
    assert share.as_json() == {
        "number": 1, "of": 1, "images": 9, "megapixels": round(pixels / 1e6, 3), "sized_by_bytes": ["bad.png"]
    }  # fmt: skip


def test_a_share_is_cheap_to_work_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is digested or decoded."""
    make_pictures(tmp_path, 5)

    def refuse(*_: object) -> None:
        raise AssertionError("the whole file was read")

    monkeypatch.setattr("histoseg_fast.images.content.Content.__init__", refuse)
    monkeypatch.setattr("histoseg_fast.files.sha256_of", refuse)
    assert len(take_share(find_sources([str(tmp_path)], tmp_path / "out"), Shard(1, 1)).sources) == 5


def test_a_file_that_vanishes_while_shards_are_dealt_stays_an_input(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path, 4)
    sources = find_sources([str(tmp_path)], tmp_path / "out")
    os.unlink(paths[2])
    assert [source.name for source in take_share(sources, Shard(1, 1)).sources] == [path.name for path in paths]


def test_shards_on_the_command_line() -> None:
    assert Shard.parse("2/8") == Shard(2, 8) and str(Shard.parse("02/008")) == "2/8"
    assert Shard.parse(f"{MAX_SHARDS}/{MAX_SHARDS}") == Shard(MAX_SHARDS, MAX_SHARDS)


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "/3", "1/", "a/b", "1/2/3", "-1/3", "1.0/3", "1 / 3", "²/3",
                                  f"1/{MAX_SHARDS + 1}", "1/0", "9" * 5000 + "/9", "1/3\n"])  # fmt: skip
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UsageError, match=r"no share of the images; write I/N"):
        Shard.parse(text)
