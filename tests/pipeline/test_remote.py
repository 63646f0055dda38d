"""Inputs and outputs behind URLs: what a local run gives, and nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import entries, make_pictures, partials, picture, results

from histoseg_fast import extras
from histoseg_fast.errors import HistosegError, ImageError, UsageError
from histoseg_fast.images import OutlineOptions, write_png
from histoseg_fast.pipeline import remote
from histoseg_fast.pipeline.remote import AHEAD, Remote
from histoseg_fast.pipeline.run import InferOptions, Progress, infer
from histoseg_fast.pipeline.shards import Shard
from histoseg_fast.pipeline.sources import find_sources, presentable
from histoseg_fast.pipeline.totals import Totals
from histoseg_fast.plan import Plan

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary files, which a run must leave empty; and an empty memory://."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with a bucket; its URL."""
    server_of = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_of.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        fsspec.filesystem("s3").mkdir("lab")
        yield "s3://lab"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def upload(folder: Path, url: str) -> None:
    fs, root = fsspec.url_to_fs(url)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        target = f"{root}/{path.relative_to(folder).as_posix()}"
        fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        fs.put_file(str(path), target)


def download(url: str, folder: Path) -> Path:
    fs, root = fsspec.url_to_fs(url)
    for path in fs.find(root):
        target = folder / path[len(root) :].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(target))
    return folder


def run(plan: Plan, source: str | list[str], out: str | Path, **options: Any) -> tuple[Totals, list[str]]:
    """A run to its end, and what it reported."""
    progress = options.pop("progress", {})
    lines: list[str] = []
    inputs = [source] if isinstance(source, str) else source
    return infer(plan, inputs, out, InferOptions(**options), Progress(report=lines.append, **progress))[0], lines


def timeless(out: Path) -> dict[str, dict[str, Any]]:
    """The manifest without times, and without where images lie."""
    return {
        name: {field: value for field, value in entry.items() if field not in ("seconds", "latency", "path", "error")}
        for name, entry in entries(out).items()
    }


def same(one: Path, other: Path) -> bool:
    return results(one) == results(other) and timeless(one) == timeless(other) and not partials(one)


@pytest.mark.parametrize("kind", ["memory", "s3", "file"])
def test_a_run_behind_urls_is_a_local_run(
    tiny_plan: Plan, tmp_path: Path, request: pytest.FixtureRequest, kind: str
) -> None:
    root = {"memory": lambda: "memory://lab", "file": lambda: (tmp_path / "lab").as_uri()}.get(
        kind, lambda: request.getfixturevalue("s3")
    )()
    folder = tmp_path / "in"
    make_pictures(folder / "deep", 2 * AHEAD)
    write_png(folder / "a ä#%20 b.png", picture(7, 300, 420))
    (folder / "bad.png").write_bytes(b"?" * 100)
    (folder / ".hidden.png").write_bytes(b"?" * 100)
    (folder / "notes.txt").write_text("no image")
    upload(folder, f"{root}/in")
    wanted: dict[str, Any] = {"overlay": True, "geojson": OutlineOptions(), "probabilities": True}
    run(tiny_plan, str(folder), tmp_path / "local", **wanted)
    failures: list[str] = []
    progress = {"failure": lambda source, error: failures.append(str(error))}
    totals, lines = run(tiny_plan, f"{root}/in", f"{root}/out", progress=progress, **wanted)
    assert (totals.done, totals.failed) == (2 * AHEAD + 1, 1)
    assert len(lines) == 1 and lines[0].endswith(
        "/out: nothing can be locked there; let no two runs write there at once"
    )
    out = download(f"{root}/out", tmp_path / "remote")
    assert same(tmp_path / "local", out)
    (told,) = failures
    assert told.endswith("/in/bad.png: is not a PNG, JPEG or TIFF file, nor a slide; convert it, or leave it out")
    assert told.startswith(root.split(":")[0]) and entries(out)["bad.png"]["error"] == told
    assert all(entry["path"].startswith(root.split(":")[0] + "://") for entry in entries(out).values())

    fs, place = fsspec.url_to_fs(f"{root}/out/masks/deep/image_003.png")
    fs.rm_file(place)
    totals, _ = run(tiny_plan, f"{root}/in", f"{root}/out/", **wanted)
    assert (totals.done, totals.failed, totals.skipped) == (1, 1, 2 * AHEAD)
    assert same(tmp_path / "local", download(f"{root}/out", tmp_path / "again"))


def test_files_patterns_and_folders_may_be_mixed(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 12)
    upload(tmp_path / "in", "memory://lab/in")
    inputs = ["memory://lab/in/image_00[01].png", "memory://lab/in/image_005.png", str(tmp_path / "in/image_007.png")]
    totals, _ = run(tiny_plan, inputs, tmp_path / "out")
    assert totals.done == 3 + 1 and sorted(entries(tmp_path / "out")) == [f"image_00{i}.png" for i in (0, 1, 5, 7)]
    totals, _ = run(tiny_plan, str(tmp_path / "in"), "memory://lab/out")
    assert totals.done == 12


def test_results_are_no_input(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 2)
    upload(tmp_path / "in", "memory://lab")
    for out in ("memory://lab/out", "memory://lab/other/out"):
        for expected in ((2, 0), (0, 2)):
            totals, _ = run(tiny_plan, "memory://lab", out)
            assert (totals.done, totals.skipped) == expected


def test_the_folder_of_inputs_may_hold_the_results(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in" / "images", 2)
    upload(tmp_path / "in", "memory://lab/study")
    for source, out in (("study", "study"), ("study/images", "study"), ("study", "")):
        totals, _ = run(tiny_plan, f"memory://lab/{source}", f"memory://lab/{out}")
        assert totals.done + totals.skipped == 2


def names(url: str) -> list[str]:
    return [image.name for image in Remote.open(url).files(None)]


def test_what_a_url_names(tmp_path: Path) -> None:
    folder = tmp_path / "in" / "stud[y]"
    make_pictures(folder / "a", 1)
    write_png(folder / "scan[1].png", picture(1, 8, 8))
    (folder / "link.png").symlink_to(folder / "scan[1].png")
    url = f"file://{tmp_path}/in"
    everything = ["a/image_000.png", "link.png", "scan[1].png"]
    assert names(f"{url}/stud[y]") == names(f"{url}/stud[y]/") == everything
    assert names(f"{url}/stud[y]/scan[1].png") == ["scan[1].png"]
    assert names(f"{url}/st*") == [f"stud[y]/{name}" for name in everything]
    assert names(f"{url}/*/*.png") == ["stud[y]/link.png", "stud[y]/scan[1].png"]
    (place,) = [image.place for image in Remote.open(f"{url}/st*").files(None) if image.name.endswith("scan[1].png")]
    assert place is not None and place.url == f"{url}/stud[y]/scan[1].png"
    assert b"".join(place.in_this_thread().read()) == (folder / "scan[1].png").read_bytes()


def test_signed_urls_and_passwords_are_not_told(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", picture(1, 8, 8))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.png"
        (image,) = Remote.open(f"{url}?X-Amz-Signature=a/b*c").files(None)
        assert image.name == "a.png" and image.place is not None and image.place.url == url
        assert b"".join(image.place.in_this_thread().read()) == (tmp_path / "a.png").read_bytes()
        server.shutdown()
    assert presentable("sftp://me:secret@host/a?b.png") == "sftp://host/a?b.png"
    assert presentable("abfs://box@account.host/a.png") == "abfs://box@account.host/a.png"
    assert presentable("a:b@c?d") == "a:b@c?d"


def test_shards_of_urls_are_disjoint_and_complete(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 7)
    upload(tmp_path / "in", "memory://lab/in")
    done: list[str] = []
    for number in (1, 2, 3):
        out = f"memory://lab/out{number}"
        run(tiny_plan, "memory://lab/in", out, shard=Shard(number, 3))
        done += entries(download(out, tmp_path / str(number)))
    assert sorted(done) == [f"image_{i:03}.png" for i in range(7)]


def test_few_copies_are_there_at_a_time(tiny_plan: Plan, tmp_path: Path, scratch: Path) -> None:
    make_pictures(tmp_path / "in", 60)
    upload(tmp_path / "in", "memory://lab/in")
    most = 0

    def count(entry: dict[str, Any]) -> None:
        nonlocal most
        most = max(most, len(list(scratch.rglob("*.png"))))

    totals, _ = run(tiny_plan, "memory://lab/in", tmp_path / "out", progress={"image": count})
    assert totals.done == 60 and 0 < most <= 2 * AHEAD + 6


class Broken(Exception):
    """What a test ends a run with."""


def test_what_a_run_that_ends_early_did_is_kept(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 40)
    upload(tmp_path / "in", "memory://lab/in")
    over: list[str] = []

    def end(entry: dict[str, Any]) -> None:
        over.append(entry["input"])
        if len(over) == 5:
            raise Broken

    with pytest.raises(Broken):
        run(tiny_plan, "memory://lab/in", "memory://lab/out", progress={"image": end})
    kept = entries(download("memory://lab/out", tmp_path / "first"))
    assert set(over) <= set(kept) and len(kept) < 40
    totals, _ = run(tiny_plan, "memory://lab/in", "memory://lab/out")
    assert (totals.done, totals.skipped) == (40 - len(kept), len(kept))
    run(tiny_plan, str(tmp_path / "in"), tmp_path / "local")
    assert same(tmp_path / "local", download("memory://lab/out", tmp_path / "second"))


def test_the_manifest_is_there_before_the_end(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SYNC_SECONDS", 0.0)
    make_pictures(tmp_path / "in", 80, 300, 300)
    upload(tmp_path / "in", "memory://lab/in")
    fs, place = fsspec.url_to_fs("memory://lab/out/manifest.jsonl")
    seen: list[int] = []

    def look() -> None:
        if fs.exists(place):
            seen.append(fs.cat_file(place).count(b"\n"))

    run(tiny_plan, "memory://lab/in", "memory://lab/out", progress={"poll": look})
    assert seen and min(seen) < 80


def test_a_manifest_that_cannot_be_sent_is_sent_later(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "SYNC_SECONDS", 0.0)
    make_pictures(tmp_path / "in", 60, 300, 300)
    upload(tmp_path / "in", "memory://lab/in")
    kind = type(fsspec.filesystem("memory"))
    put, sent = kind.put_file, []

    def fail_once(self: Any, local: str, path: str, **options: Any) -> Any:
        if path.endswith("manifest.jsonl"):
            sent.append(path)
            if len(sent) == 2:
                raise TimeoutError("a blip")
        return put(self, local, path, **options)

    monkeypatch.setattr(kind, "put_file", fail_once)
    totals, lines = run(tiny_plan, "memory://lab/in", "memory://lab/out")
    assert totals.done == 60 and len(sent) > 2
    assert [line for line in lines if "blip" in line] == [
        "memory://lab/out/manifest.jsonl: cannot be written: a blip; check address, rights and network"
    ]
    assert len(entries(download("memory://lab/out", tmp_path / "out"))) == 60


def test_a_run_that_was_killed_at_once_can_go_on(tiny_plan: Plan, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 3)
    fs, root = fsspec.url_to_fs("memory://lab/out")
    seen: list[bool] = []
    progress = {"image": lambda entry: seen.append(fs.exists(f"{root}/manifest.jsonl"))}
    run(tiny_plan, str(tmp_path / "in"), "memory://lab/out", progress=progress)
    assert seen == [True] * 3


@pytest.mark.parametrize("ending", ["stop", "failure"])
def test_no_end_waits_for_a_copy(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    make_pictures(tmp_path / "in", 3)
    upload(tmp_path / "in", "memory://lab/in")
    go, streams, polls = threading.Event(), list[Any](), list[float]()

    def read(self: Remote, name: str = "") -> Iterator[bytes]:
        go.wait(60)
        yield b"?"

    def poll() -> None:
        polls.append(time.monotonic())
        if len(polls) == 3 and ending == "failure":
            raise Broken
        if len(polls) == 3:
            streams[0].stop()

    def end(self: remote.Copies) -> None:
        self._stopped.set()
        go.set()  # the run is over; until then nothing comes
        close(self)

    close = remote.Copies.close
    monkeypatch.setattr(Remote, "read", read)
    monkeypatch.setattr(remote.Copies, "close", end)
    progress = {"poll": poll, "start": lambda engine, images, stream: streams.append(stream)}
    started = time.monotonic()
    with pytest.raises(Broken) if ending == "failure" else contextlib.nullcontext():
        totals, _ = run(tiny_plan, "memory://lab/in", tmp_path / "out", progress=progress)
        assert totals.done == totals.failed == 0
    assert time.monotonic() - started < 60 and entries(tmp_path / "out") == {}


def test_what_cannot_be_copied_costs_that_image(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "several.mrxs").write_bytes(b"?")
    upload(tmp_path / "in", "memory://lab/in")
    kind = type(fsspec.filesystem("memory"))
    opened, put = kind.open, kind.put_file

    def open_some(self: Any, path: str, mode: str = "rb", **options: Any) -> Any:
        if path.endswith("image_002.png") and "r" in mode:
            raise FileNotFoundError(path)
        if path.endswith("image_003.png") and "r" in mode:
            raise RuntimeError("no credentials\nbut much to say")
        return opened(self, path, mode, **options)

    def put_some(self: Any, local: str, path: str, **options: Any) -> Any:
        if path.endswith("masks/image_004.png"):
            raise PermissionError("you may not")
        return put(self, local, path, **options)

    monkeypatch.setattr(kind, "open", open_some)
    monkeypatch.setattr(kind, "put_file", put_some)
    totals, _ = run(tiny_plan, "memory://lab/in", "memory://lab/out")
    monkeypatch.undo()
    assert (totals.done, totals.failed) == (3, 4)
    out = download("memory://lab/out", tmp_path / "out")
    told = {name: entry["error"] for name, entry in entries(out).items() if entry["status"] == "failed"}
    assert sorted(told) == ["image_002.png", "image_003.png", "image_004.png", "several.mrxs"]
    assert "image_002.png: cannot be copied to " in told["image_002.png"] and "no such file" in told["image_002.png"]
    assert told["image_003.png"].endswith("cannot be read: no credentials; check address, rights and network")
    assert "masks/image_004.png: cannot be written: you may not; check address" in told["image_004.png"]
    assert "several.mrxs: a slide of several files is not read from a URL; copy it" in told["several.mrxs"]
    assert not (out / "masks/image_004.png").exists()


def test_what_cannot_be_published_takes_no_room(
    tiny_plan: Plan, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "in", 12)
    kind = type(fsspec.filesystem("memory"))
    put = kind.put_file

    def no_masks(self: Any, local: str, path: str, **options: Any) -> Any:
        if "/masks/" in path:
            raise PermissionError("you may not")
        return put(self, local, path, **options)

    monkeypatch.setattr(kind, "put_file", no_masks)
    left: list[int] = []
    progress = {"image": lambda entry: left.append(len([*scratch.rglob("*.png"), *scratch.rglob("*.jpg")]))}
    totals, _ = run(tiny_plan, str(tmp_path / "in"), "memory://lab/out", overlay=True, progress=progress)
    assert totals.failed == 12 and max(left) <= 4


def test_what_cannot_be_listed_or_written_ends_the_run(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pictures(tmp_path / "in", 1)
    upload(tmp_path / "in", "memory://lab/in")
    kind = type(fsspec.filesystem("memory"))

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("the line is dead")

    for name, source in (("find", "memory://lab/in"), ("rm_file", str(tmp_path / "in"))):
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, broken)
            with pytest.raises(ImageError, match=r"lab.*: cannot be \w+: the line is dead; check address, rights"):
                run(tiny_plan, source, "memory://lab/out")


def test_a_full_temporary_folder_costs_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pictures(tmp_path / "in", 1)
    upload(tmp_path / "in", "memory://lab/in")
    (source,) = find_sources(["memory://lab/in"], tmp_path / "out", lambda url: Remote.open(url).files(None))
    copies = remote.Copies(tmp_path)
    (tmp_path / "1.png").symlink_to("/dev/full")
    monkeypatch.setattr("builtins.open", lambda path, mode: os.fdopen(os.open(path, os.O_WRONLY), "wb"))
    (begun,) = copies.ahead([source])
    assert begun is not None and begun.fetched is not None
    with pytest.raises(
        ImageError, match=r"image_000.png: cannot be copied to .*: No space left on device; see whether"
    ):
        begun.fetched(lambda: False)
    copies.close()


@pytest.mark.parametrize(
    ("inputs", "out", "options", "says"),
    [
        ("foo://a/b", "out", {}, "foo://a/b: cannot be opened: Protocol not known: foo; see whether the package"),
        ("filecache://a::s3://b", "out", {}, "filecache://a::s3://b: is a chain of URLs; give one"),
        ("s3:/lab/in", "out", {}, "s3:/lab/in: is no whole URL; write it with two slashes, as s3://bucket/folder"),
        ("memory://lab/in", "memory:/out", {}, "memory:/out: is no whole URL"),
        ("memory://lab/nothing", "out", {}, "memory://lab/nothing: no image found"),
        ("memory://lab/in", "memory://lab/foreign", {}, "memory://lab/foreign: holds masks that no run wrote"),
        ("memory://lab/in", "out", {"watch": True}, "--watch takes one folder"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str, out: str, options: dict, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "in", 1)
    upload(tmp_path / "in", "memory://lab/in")
    upload(tmp_path / "in", "memory://lab/foreign/masks")
    with pytest.raises(UsageError) as caught:
        run(tiny_plan, inputs, out, **options)
    assert says in str(caught.value) and not (tmp_path / "out").exists()


def test_no_bucket_is_made(tiny_plan: Plan, tmp_path: Path, s3: str) -> None:
    make_pictures(tmp_path / "in", 1)
    with pytest.raises(ImageError, match=r"^s3://other/out/manifest.jsonl: cannot be written: .*bucket does not exist"):
        run(tiny_plan, str(tmp_path / "in"), "s3://other/out")
    assert not fsspec.filesystem("s3").exists("other")
    with pytest.raises(ImageError, match=r"^s3://other/in: cannot be listed: "):
        run(tiny_plan, "s3://other/in", tmp_path / "out")


def test_without_fsspec_the_extra_is_named(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "has", lambda *packages: False)
    with pytest.raises(UsageError, match=r"^this needs fsspec; pip install 'histoseg-fast\[cloud\]'$"):
        run(tiny_plan, "memory://lab", tmp_path / "out")


def test_only_infer_reads_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^s3://lab/in: URLs are read by infer alone; copy what is needed$"):
        find_sources(["s3://lab/in"], tmp_path)
    monkeypatch.chdir(tmp_path)
    make_pictures(tmp_path / "s3:" / "lab", 1)  # a folder that is called so
    assert [source.name for source in find_sources(["s3://lab"], tmp_path / "out")] == ["image_000.png"]


def test_an_error_names_the_url_and_not_the_copy(tmp_path: Path) -> None:
    place = Remote("s3://lab/a.png", None, "lab/a.png")
    source = remote.Source(tmp_path / "1.png", "a.png", "a", place=place)
    error = ImageError("is cut off", where=tmp_path / "1.png", fix="send it again")
    renamed: HistosegError = source.renamed(error)
    assert type(renamed) is ImageError and str(renamed) == "s3://lab/a.png: is cut off; send it again"
    other = ImageError("is cut off", where=tmp_path / "2.png")
    assert source.renamed(other) is other and source.shown == "s3://lab/a.png"
    local = remote.Source(Path("a.png"), "a.png", "a")
    assert local.shown == os.path.abspath("a.png") and local.renamed(error) is error


def test_keys_that_are_no_paths_lead_nowhere(tiny_plan: Plan, tmp_path: Path, s3: str) -> None:
    write_png(tmp_path / "a.png", picture(1, 20, 20))
    fs = fsspec.filesystem("s3")
    content = (tmp_path / "a.png").read_bytes()
    long, chain = f"{'n' * 300}.png", "a.png::x.png"
    odd = ("/a.png", "../../up.png", "b/../../up.png", "c//d.png", "./e.png")
    for key in ("in/a.png", f"in/{long}", f"in/{chain}", *(f"in/{name}" for name in odd)):
        fs.call_s3("put_object", Bucket="lab", Key=f"odd/{key}", Body=content)
    totals, _ = run(tiny_plan, f"{s3}/odd/in", tmp_path / "out")
    assert (totals.done, totals.failed) == (2, 1)
    told = entries(tmp_path / "out")
    assert sorted(told) == ["a.png", chain, long] and "name too long" in told[long]["error"].lower()
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["a.png", "a.png", chain]


def test_what_is_not_there_has_no_digest() -> None:
    folder = Remote.open("memory://lab")
    assert folder.digest("masks/a.png") is None
    folder.remove("masks/a.png")
    with pytest.raises(FileNotFoundError):
        next(folder.read("masks/a.png"))
