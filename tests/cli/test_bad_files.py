"""Bad inputs among good ones, and disks that fill up: each costs what it must and no more."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
from disks import small_disk
from running import FakeEngine, entries, make_pictures, partials, results, run_command, run_stream

from histoseg_fast.images import write_png


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb() -> bytes:
    """A PNG of a few hundred bytes that claims 60000 x 60000 pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100_000))) + chunk(b"IEND", b"")


def add_bad_files(folder: Path) -> dict[str, str]:
    """Ten bad files among the good; a part of the reason that each must get."""
    good = (folder / "image_000.png").read_bytes()
    contents = {
        "cut.png": (good[: len(good) // 2], "damaged PNG"),
        "head.png": (good[:20], "header is incomplete"),
        "zero.png": (b"", "the file is empty"),
        "text.png": (b"not an image at all\n", "is not a PNG, JPEG or TIFF file"),
        "three.jpg": (b"\xff\xd8\xff", "damaged JPEG"),
        "bomb.png": (bomb(), "60000 x 60000 pixels"),
        "cut.tif": (b"II*\0\x08\0\0\0\xff\xff", "damaged TIFF"),
        "flipped.png": (good[:-40] + bytes(20) + good[-20:], "damaged PNG"),
    }
    for name, (data, _) in contents.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    return {name: reason for name, (_, reason) in contents.items()} | {
        "dangling.png": "No such file",
        "pipe.png": "is not a regular file",
    }


def test_bad_files_among_a_hundred_cost_themselves_alone(tmp_path: Path, tiny_plan_path: Path) -> None:
    make_pictures(tmp_path / "in", 100, 20, 30)
    arguments = (tmp_path / "in", "--engine", tiny_plan_path, "--batch", 3)
    assert run_command("infer", *arguments, "--out", tmp_path / "plain").returncode == 0
    bad = add_bad_files(tmp_path / "in")
    (tmp_path / "in" / "folder.png").mkdir()  # a folder whatever its name, and an empty one
    run = run_command("infer", *arguments, "--out", tmp_path / "out")
    assert run.returncode == 3 and "Traceback" not in run.stderr
    assert f"100 done, {len(bad)} failed, 0 skipped" in run.stdout
    told = [line for line in run.stderr.splitlines() if line.startswith("failed: ")]
    lines = {name: line for name, line in entries(tmp_path / "out").items() if line["status"] == "failed"}
    assert len(told) == len(bad) and set(lines) == set(bad)
    for name, reason in bad.items():
        assert reason in lines[name]["error"] and name in lines[name]["error"]
        assert sum(f"/{name}: " in line and reason in line for line in told) == 1
    assert len(run.stderr.splitlines()) == len(bad) + 1  # nor does any library speak up
    assert results(tmp_path / "out") == results(tmp_path / "plain") and not partials(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["images_done"], record["images_failed"]) == (100, len(bad))


def test_a_mended_file_is_all_that_the_next_run_does(tmp_path: Path, tiny_plan_path: Path) -> None:
    paths = make_pictures(tmp_path / "in", 3)
    good = paths[1].read_bytes()
    paths[1].write_bytes(good[:100])
    arguments = ("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out")
    assert run_command(*arguments).returncode == 3
    paths[1].write_bytes(good)
    run = run_command(*arguments)
    assert run.returncode == 0 and "1 done, 0 failed, 2 skipped" in run.stdout


def test_a_file_that_vanishes_during_the_run(tmp_path: Path) -> None:
    paths = make_pictures(tmp_path / "in", 60, 8, 8)
    failed = []

    def on_image(entry: dict) -> None:
        paths[-1].unlink(missing_ok=True)
        if entry["status"] == "failed":
            failed.append(entry["input"])

    totals = run_stream(FakeEngine(), tmp_path / "in", tmp_path / "out", on_image=on_image)
    assert (totals.done, totals.failed, failed) == (59, 1, ["image_059.png"])
    assert "No such file" in entries(tmp_path / "out")["image_059.png"]["error"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(tmp_path: Path, tiny_plan_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        write_png(tmp_path / "in" / f"{i:02}.png", rng.integers(0, 256, (130, 150, 3), np.uint8))
    arguments = (
        "infer",
        tmp_path / "in",
        "--engine",
        tiny_plan_path,
        "--overlay",
        "--geojson",
        "--probabilities",
        "--out",
    )
    with small_disk(tmp_path / "disk", 160 << 10):
        out = tmp_path / "disk" / "out"
        run = run_command(*arguments, out)
        assert run.returncode == 1
        errors = [line for line in run.stderr.splitlines() if "image(s) on cpu" not in line]
        assert len(errors) == 1 and errors[0].startswith("histoseg-fast: ") and "No space left" in errors[0]
        assert not partials(out)
        subprocess.run(["mount", "-o", "remount,size=64m", tmp_path / "disk"], check=True)
        run = run_command(*arguments, out)
        assert run.returncode == 0 and " 0 skipped" not in run.stdout
        assert run_command(*arguments, tmp_path / "plain").returncode == 0
        assert results(out) == results(tmp_path / "plain")
