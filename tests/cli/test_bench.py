"""`histoseg-fast bench`: figures that hang together, one line for what is wrong, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import PATIENCE, command, make_pictures

from histoseg_fast.benchmarking import measure
from histoseg_fast.cli import main
from histoseg_fast.images import read_image
from histoseg_fast.images.writing import MaskWriter
from histoseg_fast.machine import available_cores, cpu_precisions
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import read_plan

Bench = Callable[..., int]
KEYS = {
    "images_per_second", "megapixels_per_second", "engine_images_per_second", "stage_seconds", "peak_rss_bytes",
    "precision", "device", "latency_seconds", "agreement_with_fp32", "limit", "because", "advice", "cpu_busy_share",
}  # fmt: skip


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made; empty again behind every test."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def bench(tiny_plan_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run `bench ARGUMENTS...` with the tiny plan in this process; its exit code."""

    def run(*arguments: object, engine: object = tiny_plan_path) -> int:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        monkeypatch.setattr(sys, "argv", ["histoseg-fast", "bench", *map(str, arguments), "--engine", str(engine)])
        with pytest.raises(SystemExit) as left:
            main()
        assert list(scratch.iterdir()) == [], "the temporary folder stayed"
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return left.value.code

    return run


def fails(bench: Bench, capsys: Any, code: int, words: str, *arguments: object, **options: Any) -> None:
    """It must, with one line on stderr behind those of progress."""
    assert bench(*arguments, **options) == code
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("histoseg-fast: ")]
    assert said.out == "" and len(errors) == 1 == said.err.count("histoseg-fast: ") and words in errors[0]
    assert "Traceback" not in said.err and "unexpected" not in said.err


def check(found: dict[str, Any], images: int, pixels: int, repeats: int) -> None:
    """The figures of a row fit together."""
    assert set(found) >= KEYS
    assert found["images"] == images and found["megapixels"] == pixels / 1e6
    assert found["images_per_second"] == pytest.approx(images / found["wall_seconds"])
    ratio = found["megapixels"] / images
    assert found["megapixels_per_second"] == pytest.approx(found["images_per_second"] * ratio)
    assert found["engine_megapixels_per_second"] == pytest.approx(found["engine_images_per_second"] * ratio)
    for key in ("images_per_second", "engine_images_per_second"):
        low, high = found[f"{key}_range"]
        assert 0 < low <= found[key] <= high
    assert found["spread"] >= 0 and found["engine_spread"] >= 0
    if repeats == 1:
        assert found["spread"] == found["engine_spread"] == 0
        assert found["share_of_engine"] == pytest.approx(found["images_per_second"] / found["engine_images_per_second"])
    latency = found["latency_seconds"]
    assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
    assert set(found["stage_seconds"]) == {"read", "engine", "stitch", "write"}
    for stage, workers in found["workers"].items():
        assert 0 < found["stage_seconds"][stage] <= found["wall_seconds"] * workers * 1.01
    assert 0 < found["stage_seconds"]["engine"] <= found["wall_seconds"] * 1.01
    assert found["start_seconds"] > 0 and found["peak_rss_bytes"] > 10 << 20
    assert 0 < found["cpu_busy_share"] < 1.5
    assert (found["device"], found["gpu_busy_share"], found["peak_vram_bytes"]) == ("cpu", None, None)


def test_a_folder(bench: Bench, tmp_path: Path, tiny_plan_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 5, 60, 72)
    before = {path: path.read_bytes() for path in (tmp_path / "in").iterdir()}
    assert bench(tmp_path / "in", "--json", tmp_path / "b.json", "--repeats", 2, "--precision", "fp32") == 0
    said = capsys.readouterr()
    assert "tiny on cpu, OpenVINO" in said.out and "5 images, 0.0 megapixels; tile 128, batch 1" in said.out
    assert "fp32: limited by " in said.out and "would help: " in said.out and "100.000%" in said.out
    assert "fp32 on cpu: repeat 2 of 2" in said.err
    found = json.loads((tmp_path / "b.json").read_text())
    check(found, 5, 5 * 60 * 72, 2)
    assert found["agreement_with_fp32"] == 1.0 and found["compared_images"] == 4
    assert found["plan_sha256"] == read_plan(tiny_plan_path).sha256 and found["inputs"] == [str(tmp_path / "in")]
    assert len(found["rows"]) == 1 and found["sweep"] == [] and found["cores"] == available_cores()
    assert found["rows"][0].items() <= found.items() and found["made_up"] is False
    assert {path: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


def test_made_up_fields_as_json_on_stdout(bench: Bench, capsys) -> None:
    assert bench("--images", 2, "--repeats", 1, "--json", "-", "--batch", 2, "--tile", 600, "--threads", 1) == 0
    found = json.loads(capsys.readouterr().out)
    check(found, 2, 2 * 720 * 1128, 1)
    assert found["made_up"] is True and (found["tile"], found["batch"]) == (600, 2)
    assert found["agreement_with_fp32"] == 1.0  # of the tiny plan, `auto` is fp32


def test_every_precision_and_its_agreement(bench: Bench, tmp_path: Path, tiny_plan_path: Path, capsys) -> None:
    paths = make_pictures(tmp_path / "in", 3, 50, 60)
    assert bench(*paths, "--images", 2, "--repeats", 1, "--precision", "all", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    wanted = [precision for precision in cpu_precisions() if precision != "int8"]  # the plan has no ranges
    assert [row["precision"] for row in found["rows"]] == wanted
    assert found["precision"] == "fp32" and found["images"] == 2
    masks = {}
    for precision in wanted:
        options = InferOptions(device="cpu", precision=precision, postprocess="none")
        infer(read_plan(tiny_plan_path), [str(path) for path in paths[:2]], tmp_path / precision, options)
        masks[precision] = [read_image(path) for path in sorted((tmp_path / precision / "masks").iterdir())]
    for row in found["rows"]:
        check(row, 2, 2 * 50 * 60, 1)
        pairs = zip(masks[row["precision"]], masks["fp32"], strict=True)
        assert row["agreement_with_fp32"] == np.mean([(mine == exact).all(-1).mean() for mine, exact in pairs])
        assert row["compared_images"] == 2


def test_a_precision_alone_is_compared_all_the_same(bench: Bench, tmp_path: Path, capsys) -> None:
    if "bf16" not in cpu_precisions():
        pytest.skip("this CPU has no bf16")
    make_pictures(tmp_path / "in", 6, 50, 60)
    assert bench(tmp_path / "in", "--repeats", 1, "--precision", "bf16", "--json", "-") == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert 0.5 < found["agreement_with_fp32"] <= 1 and found["compared_images"] == 4
    assert "fp32 on 4 image(s), to compare with" in said.err


@pytest.mark.parametrize("drops", [False, True])
def test_a_cold_figure_only_where_pages_are_dropped(bench: Bench, tmp_path: Path, monkeypatch, capsys, drops) -> None:
    monkeypatch.setattr(measure, "forget_pages", lambda paths: drops)
    make_pictures(tmp_path / "in", 2)
    assert bench(tmp_path / "in", "--repeats", 2, "--precision", "fp32", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cold_images_per_second"] is not None) == drops
    assert any("cold page cache" in line for line in found["warnings"]) != drops


def test_large_images_are_not_compared(bench: Bench, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measure, "MAX_COMPARED_PIXELS", 999)
    make_pictures(tmp_path / "in", 1, 50, 60)
    assert bench(tmp_path / "in", "--repeats", 1, "--precision", "fp32") == 0
    assert "100.000%" not in capsys.readouterr().out


def test_a_grid_and_its_picture(bench: Bench, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 4, 90, 100)
    options = ("--repeats", 1, "--plot", tmp_path / "grid.png", "--json", tmp_path / "b.json")
    assert bench(tmp_path / "in", *options, "--tile", 64) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())
    assert [(point["tile"], point["batch"]) for point in found["sweep"]] == [(64, batch) for batch in (1, 2, 4, 8)]
    for point in found["sweep"]:
        assert point["images"] == 4 and point["megapixels_per_second"] == pytest.approx(
            point["images_per_second"] * 0.009
        )
        assert point["engine_seconds_per_megapixel"] == pytest.approx(1 / point["engine_megapixels_per_second"])
        assert point["computed_over_kept"] == found["sweep"][0]["computed_over_kept"] > 1
    assert "engine s a megapixel" in said
    assert read_image(tmp_path / "grid.png").shape[1] > 600


def test_the_grid_of_both(bench: Bench, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 2, 150, 160)
    assert bench(tmp_path / "in", "--repeats", 1, "--sweep", "--batch", 2, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(point["tile"], point["batch"]) for point in found["sweep"]] == [(128, 2), (256, 2)]
    assert found["sweep"][1]["computed_over_kept"] == 1 < found["sweep"][0]["computed_over_kept"]


# -- what goes wrong -----------------------------------------------------------------------------------


def test_bad_arguments(bench: Bench, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 1)
    fails(bench, capsys, 2, "no such file or folder", tmp_path / "none")
    fails(bench, capsys, 2, "unknown precision 'int4'", tmp_path / "in", "--precision", "int4")
    fails(bench, capsys, 2, "unknown device", tmp_path / "in", "--device", "tpu")
    fails(bench, capsys, 2, "has no room between its halos", tmp_path / "in", "--tile", 8)
    fails(bench, capsys, 2, "sharpen", tmp_path / "in", "--postprocess", "sharpen")
    fails(bench, capsys, 2, "no such plan", tmp_path / "in", engine=tmp_path / "none.plan")
    fails(bench, capsys, 1, "compiled without int8", tmp_path / "in", "--precision", "int8")


def test_a_bad_plan(bench: Bench, tmp_path: Path, tiny_plan_path: Path, capsys) -> None:
    (tmp_path / "torn.plan").write_bytes(tiny_plan_path.read_bytes()[:-99])
    fails(bench, capsys, 1, "torn.plan: is damaged", engine=tmp_path / "torn.plan")


def test_an_image_that_cannot_be_read(bench: Bench, tmp_path: Path, capsys) -> None:
    paths = make_pictures(tmp_path / "in", 3)
    paths[1].write_bytes(paths[1].read_bytes()[:-60])
    fails(bench, capsys, 1, "image_001.png: damaged PNG", tmp_path / "in")


@pytest.mark.parametrize("place", ["mask", "manifest"])
def test_a_full_disk(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, place: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((MaskWriter, "_complete") if place == "mask" else (Manifest, "add")), full)
    make_pictures(tmp_path / "in", 3)
    fails(bench, capsys, 1, "No space left on device; free space", tmp_path / "in")


def test_files_that_cannot_be_written(bench: Bench, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 1)
    (tmp_path / "file").write_text("")
    for option in ("--json", "--plot"):
        assert bench(tmp_path / "in", "--repeats", 1, "--tile", 64, option, tmp_path / "file" / "x") == 2
        said = capsys.readouterr()  # told before anything is measured
        assert said.out == "" and said.err.count("\n") == 1
        assert said.err.startswith("histoseg-fast: ") and "cannot be written" in said.err


def test_no_temporary_folder(tiny_plan_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    monkeypatch.setattr(sys, "argv", ["histoseg-fast", "bench", "--engine", str(tiny_plan_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and "set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("again", [False, True])
def test_interrupted(tiny_plan_path: Path, tmp_path: Path, number: int, again: bool) -> None:
    """In the middle of a run, also by an impatient user."""
    make_pictures(tmp_path / "in", 60, 200, 200)
    (tmp_path / "tmp").mkdir()
    arguments = command("bench", tmp_path / "in", "--engine", tiny_plan_path, "--repeats", 500, "--json", "b.json")
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    ) as run:
        deadline = time.monotonic() + PATIENCE
        while not list((tmp_path / "tmp").glob("*/masks0/masks/*")):
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()
            time.sleep(0.005)
        run.send_signal(number)
        if again:
            run.send_signal(number)
        out, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 128 + number
    assert out == "" and "interrupted" in said and "Traceback" not in said
    assert list((tmp_path / "tmp").iterdir()) == [] and not (tmp_path / "b.json").exists()


def test_a_gpu(bench: Bench, gpus: Any, tmp_path: Path, capsys) -> None:
    """On fake GPUs: the engine alone and the grid run there, and fp32 on the CPU is what it is compared with."""
    cuda = gpus.start(2)
    make_pictures(tmp_path / "in", 6, 60, 72)
    options = ("--device", "cuda:0,1", "--precision", "all", "--repeats", 1, "--sweep", "--json", "-")
    assert bench(tmp_path / "in", *options) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [(row["precision"], row["device"]) for row in found["rows"]] == [("fp16", "cuda:0,1"), ("fp32", "cuda:0,1")]
    assert found["batch"] == 4 and 0 <= found["agreement_with_fp32"] <= 1
    assert "fp32 on 4 image(s), to compare with" in said.err
    assert [(point["tile"], point["batch"]) for point in found["sweep"]] == [(128, batch) for batch in (1, 2, 4, 8)]
    assert all(gpu.calls["enqueue"] for gpu in cuda.gpus)
    cuda.check_nothing_left()
