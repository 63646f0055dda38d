"""The manifest, the summary and the files that appear whole or not at all."""

from __future__ import annotations

import csv
import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import FakeEngine, entries, make_pictures, partials, results, run_stream

from histoseg_fast.errors import ImageError, UsageError
from histoseg_fast.files import atomic_write
from histoseg_fast.pipeline.records import (
    Manifest,
    clear_partials,
    digest_of,
    read_entries,
    run_key,
    tumour_stroma_ratio,
    write_summary,
)

CLASSES = ("background", "cancer", "stroma")
MASK = {"mask": "masks/a.png"}
needs_dev_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


def done(name: str, background: int, cancer: int, stroma: int) -> dict[str, object]:
    pixels = dict(zip(CLASSES, (background, cancer, stroma), strict=True))
    total = background + cancer + stroma
    size = {"width": total, "height": 1, "glass_pixels": 0}
    return {"input": name, "status": "done", "pixels": pixels, **size, "mean_confidence": 0.5}


@pytest.mark.parametrize("torn", [b'{"input": "image_003.png", "sta', b"\0\0\0\0", b'{"input": "x"'])
def test_a_torn_last_line_is_cut_off_and_its_image_done_again(tmp_path: Path, torn: bytes) -> None:
    make_pictures(tmp_path / "in", 4)
    out = tmp_path / "out"
    run_stream(FakeEngine(), tmp_path / "in", out)
    before, path = results(out), out / "manifest.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + torn)
    totals = run_stream(FakeEngine(), tmp_path / "in", out)
    assert (totals.done, totals.skipped) == (1, 3)
    assert results(out) == before and len(entries(out)) == 4  # every line parses again


def test_lines_that_are_no_entries_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(b'nonsense\n[1, 2]\n{"no": "input"}\n{"input": 5}\n\xff\xfe\n{"input": "a", "status": "done"}\n')
    manifest = Manifest(tmp_path)
    assert list(manifest.entries) == ["a"]
    manifest.add({"input": "b\udcff\n", "status": "failed"})
    manifest.close()
    again = Manifest(tmp_path)
    assert list(again.entries) == ["a", "b\udcff\n"]
    again.close()


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(
        st.tuples(st.sampled_from(["a", "b\udcff\n", "\u00fc" * 9000]), st.integers(0, 99)) | st.binary(max_size=9)
    )
)
def test_entries_are_what_reading_all_of_them_gives(tmp_path_factory, lines: list) -> None:
    """Lines kept on the disk, of this run and of the one before, against a dictionary of them."""
    folder = tmp_path_factory.mktemp("entries")
    cut = len(lines) // 2
    texts = [
        line.replace(b"\n", b"") if isinstance(line, bytes) else json.dumps({"input": line[0], "x": line[1]}).encode()
        for line in lines[:cut]
    ]
    (folder / "manifest.jsonl").write_bytes(b"".join(text + b"\n" for text in texts) + b'{"input": "torn')
    manifest = Manifest(folder)
    for line in lines[cut:]:
        if not isinstance(line, bytes):
            manifest.add({"input": line[0], "x": line[1]})
    whole, size = read_entries(folder / "manifest.jsonl")
    assert list(manifest.entries.items()) == list(whole.items())
    assert manifest.entries.size == size == (folder / "manifest.jsonl").stat().st_size
    assert manifest.entries.get("none") is None and len(manifest.entries) == len(whole)
    manifest.close()


def test_the_last_line_of_an_image_counts(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for status in ("done", "failed"):
        manifest.add({"input": "a", "status": status})
    manifest.close()
    again = Manifest(tmp_path)
    assert again.entries["a"]["status"] == "failed"
    again.close()


def test_complete_asks_for_everything(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    with atomic_write(tmp_path / "masks" / "a.png") as stream:
        stream.write(b"mask")
    sha256 = hashlib.sha256(b"mask").hexdigest()
    entry = {"input": "a", "status": "done", "sha256": "s", "key": "k", "mask": "masks/a.png", "mask_sha256": sha256}

    def digest(path: str) -> str | None:
        return digest_of(tmp_path / path)

    manifest.add(entry)
    assert manifest.complete("a", "s", "k", MASK, digest)
    assert not manifest.complete("b", "s", "k", MASK, digest)
    assert not manifest.complete("a", "other", "k", MASK, digest)
    assert not manifest.complete("a", "s", "other", MASK, digest)
    assert not manifest.complete("a", "s", "k", {"mask": "masks/a.png.png"}, digest)
    assert not manifest.complete("a", "s", "k", MASK | {"overlay": "overlays/a.jpg"}, digest)
    for change in ({"status": "failed"}, {"mask_sha256": "0" * 64}, {"mask": 5}):
        manifest.add(entry | change)
        assert not manifest.complete("a", "s", "k", MASK, digest)
    manifest.add({key: value for key, value in entry.items() if key != "mask_sha256"})
    (tmp_path / "masks" / "a.png").unlink()
    assert not manifest.complete("a", "s", "k", MASK, digest)
    manifest.close()


def test_a_folder_serves_one_run_at_a_time(tmp_path: Path) -> None:
    first = Manifest(tmp_path)
    with pytest.raises(UsageError, match="another run is writing here"):
        Manifest(tmp_path)
    first.close()
    Manifest(tmp_path).close()


def test_the_key_covers_plan_and_options() -> None:
    keys = {run_key(plan, {"overlay": overlay}) for plan in ("a", "b") for overlay in (True, False)}
    assert len(keys) == 4
    assert run_key("a", {"x": 1, "y": 2}) == run_key("a", {"y": 2, "x": 1})


@needs_dev_full
def test_the_manifest_closes_on_a_full_disk(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest._stream.close()
    manifest._stream = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        manifest.add({"input": "a", "status": "done"})
    manifest.close()
    Manifest(tmp_path).close()  # the lock is free again


def test_summary_rows_are_sorted_and_add_up(tmp_path: Path) -> None:
    lines = [done('b "q"\n.png', 1, 1, 2), {"input": "0", "status": "failed"}, done("a,\udcff.png", 3, 0, 0)]
    write_summary(tmp_path, lines, CLASSES)
    text = (tmp_path / "summary.csv").read_bytes().decode("utf-8", "surrogateescape")
    first, second = csv.DictReader(text.splitlines(keepends=True))
    assert (first["image"], second["image"]) == ("a,\udcff.png", 'b "q"\n.png')
    assert first["tumour_stroma_ratio"] == "" and second["tumour_stroma_ratio"] == "0.333333"
    assert [second[f"{name}_share"] for name in CLASSES] == ["0.250000", "0.250000", "0.500000"]
    assert [second[f"{name}_pixels"] for name in CLASSES] == ["1", "1", "2"]
    write_summary(tmp_path / "turned", lines[::-1], CLASSES)
    assert (tmp_path / "turned" / "summary.csv").read_bytes() == (tmp_path / "summary.csv").read_bytes()


def test_tumour_stroma_ratio() -> None:
    assert tumour_stroma_ratio({"cancer": 3, "stroma": 1, "background": 9}) == 0.75
    assert tumour_stroma_ratio({"background": 9}) is None


@pytest.mark.parametrize("name", ["a.png", "x" * 251 + ".png", "\u00fc" * 125 + ".png"])
def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, name: str) -> None:
    target = tmp_path / "deep" / name
    with pytest.raises(KeyError), atomic_write(target) as stream:
        stream.write(b"half")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with atomic_write(target) as one, atomic_write(target) as other:
        assert one.name != other.name and len(partials(tmp_path)) == 2 and not target.exists()
        one.write(b"one")
        other.write(b"other")
    assert target.read_bytes() == b"one" and not partials(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "link", "dangling", "link to a folder"])
def test_what_is_no_regular_file_is_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """As root a rename would put a file in the place of a device; through a link bytes would land elsewhere."""
    target, other = tmp_path / "target", tmp_path / "other"
    other.write_bytes(b"before")
    with socket.socket(socket.AF_UNIX) as unix:
        match kind:
            case "folder":
                target.mkdir()
            case "pipe":
                os.mkfifo(target)
            case "socket":
                monkeypatch.chdir(tmp_path)  # the whole path may be too long for a socket's name
                unix.bind("target")
            case _:
                leads = {"link": other, "dangling": tmp_path / "gone", "link to a folder": tmp_path}
                target.symlink_to(leads[kind])
    kept = os.lstat(target)
    with pytest.raises(FileExistsError, match="is no regular file") as raised, atomic_write(target) as stream:
        stream.write(b"after")
    assert raised.value.strerror and raised.value.filename == str(target)
    assert os.path.samestat(os.lstat(target), kept) and other.read_bytes() == b"before"
    assert sorted(tmp_path.iterdir()) == [other, target] and not (tmp_path / "gone").exists()


@pytest.mark.skipif(not hasattr(os, "mknod") or os.geteuid() != 0, reason="only root can make a device")
def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    device = tmp_path / "null"
    try:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container may make no device")
    with pytest.raises(FileExistsError, match="is no regular file"), atomic_write(device) as stream:
        stream.write(b"x")
    assert stat.S_ISCHR(device.lstat().st_mode)


@pytest.mark.parametrize("name", [".lock", "manifest.jsonl"])
def test_a_link_or_pipe_in_the_place_of_a_record_is_refused(tmp_path: Path, name: str) -> None:
    """Appending to a link would cut off the file that it leads to; opening a pipe would wait for ever."""
    other = tmp_path / "other"
    other.write_bytes(b"{ half a line")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / name).symlink_to(other)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / name)
    for folder in ("link", "pipe"):
        with pytest.raises(FileExistsError, match="is no regular file"):
            Manifest(tmp_path / folder)
    assert other.read_bytes() == b"{ half a line"


@needs_dev_full
def test_a_full_disk_at_the_last_flush_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "a.png"
    target.write_bytes(b"before")
    with pytest.raises(OSError, match="No space left"), atomic_write(target) as stream:
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, stream.fileno())
        os.close(full)
        stream.write(b"after")
    assert target.read_bytes() == b"before" and list(tmp_path.iterdir()) == [target]


def test_clear_partials_takes_its_own_files_only(tmp_path: Path) -> None:
    """Names are those that `atomic_write` gives; an upload beside the results may end in .partial, too."""
    digits = "0123456789abcdef"
    keep = [tmp_path / "masks" / name for name in ("a.png", "b.partial", ".hidden", ".a.png.12-3.partial")]
    keep += [tmp_path / ".slide.svs.partial", tmp_path / "study" / f".a.png.{digits}.partial"]
    lost = [tmp_path / "masks" / "deep" / f".a.png.{digits}.partial", tmp_path / f".summary.csv.{digits}.partial"]
    for folder in ("masks/deep", "study"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (*keep, *lost):
        path.write_bytes(b"")
    clear_partials(tmp_path)
    assert all(path.exists() for path in keep) and not any(path.exists() for path in lost)


def test_every_manifest_line_says_what_ran(tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "broken.png").write_bytes(b"")
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out")
    for entry in map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()):
        assert (entry["engine"], entry["device"], entry["precision"]) == ("fake 1", "cpu", "fp32")
        assert bool(entry["error"]) == (entry["status"] == "failed")
        if entry["status"] == "done":
            assert set(entry["seconds"]) == {"read", "engine", "stitch", "write"} and len(entry["sha256"]) == 64


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_where_nothing_can_be_locked_it_is_said_and_nothing_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some network file systems; the half-written files may be those of a run that goes on."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".summary.csv.0123456789abcdef.partial").write_bytes(b"")
    told: list[str] = []
    Manifest(tmp_path, told.append).close()
    assert len(told) == 1 and "cannot lock" in told[0]
    assert (tmp_path / ".summary.csv.0123456789abcdef.partial").exists()


def test_a_pipe_in_a_masks_place_is_no_intact_output(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    assert digest_of(tmp_path / "a.png") is None


def test_a_line_that_could_not_be_written_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes half a line, then there is room again."""
    manifest = Manifest(tmp_path)
    manifest.add({"input": "a"})
    stream = manifest._stream

    class Full:
        def write(self, data: memoryview) -> int:
            stream.write(data[:5])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name: str) -> object:
            return getattr(stream, name)

    with monkeypatch.context() as patch, pytest.raises(ImageError, match="No space left"):
        patch.setattr(manifest, "_stream", Full())
        manifest.add({"input": "lost"})
    manifest.add({"input": "b", "x": 1})
    assert manifest.entries["b"] == {"input": "b", "x": 1} and list(manifest.entries) == ["a", "b"]
    manifest.close()
    assert (tmp_path / "manifest.jsonl").read_text() == '{"input": "a"}\n{"input": "b", "x": 1}\n'
