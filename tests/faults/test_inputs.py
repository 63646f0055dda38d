"""Inputs that change or vanish while they are read: whole, or failed with one line, and right the next time."""

from __future__ import annotations

import functools
import json
import os
import threading
from pathlib import Path

import pytest
from children import run_child
from running import FakeEngine, entries, make_pictures, partials, picture, results, run_stream
from test_stages import STAGES, break_call

from histoseg_fast.images import content, write_png
from histoseg_fast.plan import read_plan


def rewrite(path: Path, seed: int, stopped: threading.Event) -> None:
    """Put one of two pictures in `path`, in place, over and over."""
    versions = [path.read_bytes(), path.with_suffix(".other").read_bytes()]
    while not stopped.wait(0.0005):
        seed += 1
        with open(path, "r+b") as stream:
            stream.write(versions[seed % 2])
            stream.truncate()


def test_an_input_that_is_rewritten_all_the_time(tmp_path: Path) -> None:
    """Each time it is one version or the other, and the manifest says which, or it fails; never a mix of both."""
    paths = make_pictures(tmp_path / "in", 3, 60, 50)
    other = paths[1].with_suffix(".other")
    write_png(other, picture(77, 110, 40))
    versions = [paths[1].read_bytes(), other.read_bytes()]
    masks = {}
    for number, data in enumerate(versions):
        paths[1].write_bytes(data)
        run_stream(FakeEngine(), tmp_path / "in", tmp_path / f"plain{number}")
        entry = entries(tmp_path / f"plain{number}")["image_001.png"]
        masks[entry["sha256"]] = results(tmp_path / f"plain{number}")
    stopped = threading.Event()
    writer = threading.Thread(target=rewrite, args=(paths[1], 0, stopped))
    writer.start()
    try:
        for i in range(30):
            out = tmp_path / f"out{i}"
            run_stream(FakeEngine(), tmp_path / "in", out, readers=2)
            entry = entries(out)["image_001.png"]
            assert not partials(out)
            if entry["status"] == "done":
                assert results(out) == masks[entry["sha256"]]
            else:
                assert "image_001.png: " in entry["error"] and not (out / "masks" / "image_001.png").exists()
    finally:
        stopped.set()
        writer.join()
    paths[1].write_bytes(versions[1])
    run_stream(FakeEngine(), tmp_path / "in", out)
    assert results(out) == results(tmp_path / "plain1")


@pytest.mark.parametrize("what", ["grows", "is rewritten", "is cut", "vanishes", "becomes a folder"])
def test_a_large_input_that_changes_between_two_bands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Too large to be held, so that it is read from the disk band by band while the engine runs."""
    import tifffile

    monkeypatch.setattr(content, "WHOLE_FILE_BYTES", 1000)
    folder, out = tmp_path / "in", tmp_path / "out"
    make_pictures(folder, 2)
    path = folder / "large.tif"
    tifffile.imwrite(path, picture(3, 800, 40), photometric="rgb", rowsperstrip=8)
    whole = path.read_bytes()

    def change(call: int) -> None:
        if call != 8 or not path.is_file():
            return
        match what:
            case "grows":
                path.write_bytes(whole + b"more")
            case "is rewritten":
                path.write_bytes(bytes(len(whole)))
                os.utime(path, ns=(1, 1))
            case "is cut":
                os.truncate(path, len(whole) // 2)
            case _:
                path.unlink()
                if what == "becomes a folder":
                    path.mkdir()

    totals = run_stream(FakeEngine(on_wait=change), folder, out, tile=64)
    assert (totals.done, totals.failed) == (2, 1) and not partials(out)
    entry = entries(out)["large.tif"]
    assert entry["status"] == "failed" and "large.tif: " in entry["error"] and "\n" not in entry["error"]
    assert not (out / "masks" / "large.png").exists()
    if path.is_dir():
        path.rmdir()
    path.write_bytes(whole)
    assert run_stream(FakeEngine(), folder, out, tile=64).skipped == 2
    run_stream(FakeEngine(), folder, tmp_path / "plain", tile=64)
    assert results(out) == results(tmp_path / "plain")


def test_the_engine_reads_no_plan_that_changed_meanwhile(tmp_path: Path, tiny_plan_path: Path) -> None:
    """A plan is read once, whole: what is put in its place during the run has no part in it."""
    make_pictures(tmp_path / "in", 3)
    path = tmp_path / "x.plan"
    path.write_bytes(tiny_plan_path.read_bytes())
    fault = functools.partial(break_call, STAGES["open"], 2, functools.partial(path.write_bytes, b"other"))
    ended = run_child(tmp_path, "infer", tmp_path / "in", "--engine", path, "--out", tmp_path / "out", fault=fault)
    assert ended.code == 0 and path.read_bytes() == b"other"
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["plan_sha256"] == read_plan(tiny_plan_path).sha256
