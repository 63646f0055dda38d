"""`histoseg-fast infer` from arguments to exit code."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from running import PATIENCE, command, entries, make_pictures, picture, results
from tiny_plans import tiny_manifest, tiny_model

from histoseg_fast import postprocess
from histoseg_fast.cli import main
from histoseg_fast.images import OutlineOptions, read_image, write_png
from histoseg_fast.pipeline.records import Manifest
from histoseg_fast.plan import MODEL, read_plan, write_plan
from histoseg_fast.postprocess import NO_STEPS, PostProcessing

Infer = Callable[..., int]


@pytest.fixture
def infer(tiny_plan_path: Path, monkeypatch: pytest.MonkeyPatch) -> Infer:
    """Run `infer ARGUMENTS... --out OUT` with the tiny plan in this process; its exit code."""

    def run(*arguments: object, out: Path, engine: Path = tiny_plan_path) -> int:
        line = ["histoseg-fast", "infer", *map(str, arguments), "--engine", str(engine), "--out", str(out)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    return run


def test_a_run_and_all_that_it_leaves(infer: Infer, tmp_path: Path, tiny_plan_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 3)
    out = tmp_path / "out"
    arguments = ("--overlay", "--geojson", "--probabilities", "--threads", 1, "--batch", 2, "--precision", "fp32")
    assert infer(tmp_path / "in", *arguments, out=out) == 0
    said = capsys.readouterr()
    assert "3 done, 0 failed, 0 skipped" in said.out and said.out.count("\n") == 1
    assert "3 image(s) on cpu: OpenVINO" in said.err
    names = [f"image_{i:03}" for i in range(3)]
    wanted = {f"masks/{n}.png" for n in names} | {f"overlays/{n}.jpg" for n in names}
    wanted |= {f"geojson/{n}.geojson" for n in names}
    assert set(results(out)) == wanted | {f"probabilities/{n}.tif" for n in names} | {"summary.csv"}
    record = json.loads((out / "run.json").read_text())
    assert record["arguments"]["inputs"] == [str(tmp_path / "in")]
    assert record["arguments"]["batch"] == 2 and record["arguments"]["overlay"] is True
    assert record["arguments"]["geojson"] == asdict(OutlineOptions())
    assert record["plan_sha256"] == read_plan(tiny_plan_path).sha256
    assert (record["device"], record["precision"]) == ("cpu", "fp32") and record["engine"].startswith("OpenVINO")
    assert (record["images_done"], record["images_failed"], record["images_skipped"]) == (3, 0, 0)
    assert record["wall_seconds"] > 0 and record["peak_rss_bytes"] > 10 << 20
    assert {"histoseg-fast", "python", "numpy"} <= set(record["versions"]) and record["interrupted"] is False
    for name, entry in entries(out).items():
        assert entry["status"] == "done" and sum(entry["pixels"].values()) == 40 * 50
        assert read_image(out / entry["mask"]).shape == read_image(tmp_path / "in" / name).shape


def test_options_of_speed_change_no_byte(infer: Infer, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 2, 150, 170)
    variants = [(), ("--tile", 40, "--batch", 3), ("--threads", 1, "--tile", 64)]
    outs = [tmp_path / f"out{i}" for i in range(len(variants))]
    for out, variant in zip(outs, variants, strict=True):
        assert infer(tmp_path / "in", "--precision", "fp32", "--overlay", "--geojson", *variant, out=out) == 0
    assert results(outs[0]) == results(outs[1]) == results(outs[2])


def test_a_second_run_does_only_what_must_be_done(infer: Infer, tmp_path: Path, capsys) -> None:
    paths, out = make_pictures(tmp_path / "in", 4), tmp_path / "out"

    def counts(*arguments: object, **options: Path) -> tuple[int, int]:
        assert infer(tmp_path / "in", *arguments, out=out, **options) == 0
        record = json.loads((out / "run.json").read_text())
        return record["images_done"], record["images_skipped"]

    assert counts() == (4, 0)
    first = results(out)
    assert counts() == (0, 4) and results(out) == first
    os.utime(paths[0])
    assert counts("--tile", 64, "--threads", 1) == (0, 4)  # neither decides what the outputs are
    assert counts("--postprocess", "min_island=9") == (4, 0)
    assert counts("--postprocess", " min_island=9") == (0, 4)
    assert counts("--postprocess", "none") == (4, 0)
    assert counts() == (0, 4) and results(out) == first  # this plan records none
    assert counts("--overlay") == (4, 0)
    assert counts("--overlay") == (0, 4)
    assert counts("--geojson", "--min-area", 9) == (4, 0)
    assert counts("--geojson", "--min-area", 9) == (0, 4)
    (out / "geojson" / "image_001.geojson").unlink()
    assert counts("--geojson", "--min-area", 9) == (1, 3)
    assert counts("--geojson", "--min-area", 9, "--exact-outlines") == (4, 0)
    assert counts("--overlay") == (4, 0)
    shutil.rmtree(out / "geojson")  # of options that are no longer asked for
    (out / "overlays" / "image_001.jpg").write_bytes(b"")
    (out / "masks" / "image_002.png").unlink()
    write_png(paths[3], picture(9, 20, 20))
    assert counts("--overlay") == (3, 1)
    other = tmp_path / "other.plan"
    write_plan(other, tiny_manifest(), {MODEL: tiny_model(seed=1)})
    assert counts("--overlay", engine=other) == (4, 0)
    assert infer(tmp_path / "in", "--overlay", out=tmp_path / "fresh", engine=other) == 0
    assert results(out) == results(tmp_path / "fresh")
    assert "0 done, 0 failed, 4 skipped" in capsys.readouterr().out


def test_post_processing_of_the_plan_and_of_the_option(infer: Infer, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 2)
    plan, steps = tmp_path / "steps.plan", PostProcessing(min_island=40, majority_radius=1)
    write_plan(plan, tiny_manifest(postprocess=steps.as_json()), {MODEL: tiny_model()})
    runs = {
        "plan": ((), {"engine": plan}, steps),
        "option": (("--postprocess", steps), {}, steps),
        "none": (("--postprocess", "none"), {"engine": plan}, NO_STEPS),
        "bare": ((), {}, NO_STEPS),
    }
    found = {}
    for name, (arguments, engine, used) in runs.items():
        out = tmp_path / name
        assert infer(tmp_path / "in", *arguments, out=out, **engine) == 0
        found[name] = results(out)
        assert json.loads((out / "run.json").read_text())["postprocess"] == used.as_json()
        assert f"post-processing {used}\n" in capsys.readouterr().err
    assert found["plan"] == found["option"] != found["none"] == found["bare"]
    rows = list(csv.DictReader((tmp_path / "plan" / "summary.csv").read_text().splitlines()))
    for row in rows:
        mask = read_image(tmp_path / "plan" / "masks" / row["image"])
        assert int(row["cancer_pixels"]) == (mask == (255, 0, 0)).all(-1).sum()
        assert int(row["stroma_pixels"]) == (mask == (0, 255, 0)).all(-1).sum()
    plain = csv.DictReader((tmp_path / "none" / "summary.csv").read_text().splitlines())
    assert [row["mean_confidence"] for row in rows] == [row["mean_confidence"] for row in plain]


def test_probabilities_stay_the_networks_own(infer: Infer, tmp_path: Path) -> None:
    make_pictures(tmp_path / "in", 1, 70, 90)
    masks, probabilities = set(), set()
    for i, steps in enumerate(("none", "majority_radius=1", "crf,crf.smooth_weight=0.5,crf.appearance_weight=1")):
        out = tmp_path / str(i)
        assert infer(tmp_path / "in", "--postprocess", steps, "--probabilities", "--tile", 40, out=out) == 0
        masks.add((out / "masks" / "image_000.png").read_bytes())
        probabilities.add((out / "probabilities" / "image_000.tif").read_bytes())
    assert len(masks) == 3 and len(probabilities) == 1


def test_an_image_too_large_for_the_steps_is_warned_of(infer: Infer, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(postprocess, "MAX_CRF_PIXELS", 1999)
    make_pictures(tmp_path / "in", 1)
    assert infer(tmp_path / "in", "--postprocess", "crf", out=tmp_path / "out") == 0
    assert "image_000.png: post-processed with none, not crf: it has 2000 pixels" in capsys.readouterr().err


def test_names_of_any_kind_come_out_as_they_went_in(infer: Infer, tmp_path: Path, capsys) -> None:
    raw = [b"sp ace", "\u00fcml\u00e4ut".encode(), b'it\'s "q", x', b"new\nline", b"bad\xff\xfe"]
    raw += ["deep/er/\U0001f52c".encode()]
    data, out = tmp_path / "d\u00e4ta \udcff", tmp_path / "\u00f6ut\n\udcfe"
    for i, name in enumerate(raw):
        path = data / (os.fsdecode(name) + ".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(path, picture(i, 20, 30))
    (data / "bro\nken\udcff.png").write_bytes(b"PNG?")
    assert infer(data, "--overlay", out=out) == 3
    masks = {os.fsencode(p.relative_to(out / "masks")) for p in (out / "masks").rglob("*.png")}
    assert masks == {name + b".png" for name in raw}
    assert infer(data, "--overlay", out=out) == 3
    assert (json.loads((out / "run.json").read_text())["images_skipped"]) == len(raw)
    said = capsys.readouterr()
    assert said.out.count("\n") == 2 and "bro\\nken\\udcff.png: is not a PNG" in said.err
    assert b"bad\xff\xfe.png," in (out / "summary.csv").read_bytes()


def test_overlapping_inputs_and_results_inside_the_input(infer: Infer, tmp_path: Path) -> None:
    data = tmp_path / "in"
    make_pictures(data, 2)
    write_png(data / "image_000.jpg", picture(5, 10, 10))
    out = data / "out"
    inputs = (data, data / "image_001.png", data / "*.png", data)
    for expected in ((3, 0), (0, 3)):
        assert infer(*inputs, out=out) == 0
        record = json.loads((out / "run.json").read_text())
        assert (record["images_done"], record["images_skipped"]) == expected
    masks = sorted(path.name for path in (out / "masks").iterdir())
    assert masks == ["image_000.jpg.png", "image_000.png.png", "image_001.png"]


def test_the_input_folder_itself_may_take_the_results(infer: Infer, tmp_path: Path) -> None:
    make_pictures(tmp_path, 2)
    for _ in range(2):
        assert infer(tmp_path, "--overlay", out=tmp_path) == 0
    assert json.loads((tmp_path / "run.json").read_text())["images_found"] == 2


@pytest.mark.parametrize("arguments", [("missing.png",), ("empty",), ("*.tif",), ("a.png", "--tile", "19"),
                                       ("a.png", "--no-such-option"), ("a.png", "--device", "tpu"), (),
                                       ("a.png", "--precision", "fp7"), ("a.png", "--batch", "-1"),
                                       ("a.png", "--tile", "many"), ("a.png", "--postprocess", "median=3"),
                                       ("a.png", "--postprocess", "min_island=-1"),
                                       ("a.png", "--min-area", "9"), ("a.png", "--exact-outlines"),
                                       ("a.png", "--postprocess", "")])  # fmt: skip
def test_wrong_usage_is_exit_code_2_and_one_reason(
    infer: Infer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_png(tmp_path / "a.png", picture(0, 40, 40))
    assert infer(*arguments, out=tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.strip() and "Traceback" not in said and "unexpected" not in said
    assert not (tmp_path / "out" / "masks").exists()


def test_a_device_that_is_not_here_is_an_error_and_never_replaced(infer: Infer, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 1)
    assert infer(tmp_path / "in", "--device", "cuda", out=tmp_path / "out") in (1, 2)
    said = capsys.readouterr().err
    assert ("NVIDIA" in said or "GPU" in said) and said.count("\n") == 1
    assert not (tmp_path / "out" / "masks").exists()


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 but no more", b"text"])
def test_a_plan_that_is_none(infer: Infer, tmp_path: Path, capsys, content: bytes | None) -> None:
    make_pictures(tmp_path / "in", 1)
    plan = tmp_path / "no.plan"
    if content is not None:
        plan.write_bytes(content)
    assert infer(tmp_path / "in", out=tmp_path / "out", engine=plan) == (2 if content is None else 1)
    said = capsys.readouterr().err
    assert said.startswith(f"histoseg-fast: {plan}: ") and said.count("\n") == 1


def test_a_folder_in_use_is_refused(infer: Infer, tmp_path: Path, capsys) -> None:
    make_pictures(tmp_path / "in", 1)
    other = Manifest(tmp_path / "out")
    assert infer(tmp_path / "in", out=tmp_path / "out") == 2
    assert "another run is writing here" in capsys.readouterr().err
    other.close()
    assert infer(tmp_path / "in", out=tmp_path / "out") == 0


@pytest.mark.parametrize("blocked", ["out", "out/manifest.jsonl", "out/summary.csv", "out/masks"])
def test_an_output_that_cannot_be_made_is_told_in_one_line(infer: Infer, tmp_path: Path, capsys, blocked: str) -> None:
    """A file where a folder should be, or a folder where a file should be."""
    make_pictures(tmp_path / "in", 1)
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if path.suffix else path.write_bytes(b"")
    code = infer(tmp_path / "in", out=tmp_path / "out")
    said = capsys.readouterr().err
    assert code == (3 if blocked == "out/masks" else 1)
    assert "cannot be written" in said and "Traceback" not in said and "unexpected" not in said


def test_sixteen_bits_are_warned_of(infer: Infer, tmp_path: Path, capsys) -> None:
    import imagecodecs

    (tmp_path / "in").mkdir()
    deep = imagecodecs.png_encode(np.full((20, 20, 3), 40000, np.uint16))
    (tmp_path / "in" / "deep.png").write_bytes(deep)
    assert infer(tmp_path / "in", out=tmp_path / "out") == 0
    assert "deep.png: 16-bit samples" in capsys.readouterr().err
    assert "16-bit" in entries(tmp_path / "out")["deep.png"]["warnings"][0]


def test_a_terminal_gets_a_bar_and_failures_above_it(tmp_path: Path, tiny_plan_path: Path) -> None:
    pty = pytest.importorskip("pty")
    make_pictures(tmp_path / "in", 5)
    (tmp_path / "in" / "[bold]bad[red].png").write_bytes(b"")  # no markup of a file name may reach the screen
    shown, screen = pty.openpty()
    line = command("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "out")
    with subprocess.Popen(line, stderr=screen, stdout=subprocess.PIPE, text=True) as run:
        os.close(screen)
        text = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while block := os.read(shown, 4096):
                text += block
        said, _ = run.communicate(timeout=PATIENCE)
    os.close(shown)
    assert run.returncode == 3 and said.startswith("5 done, 1 failed, 0 skipped")
    assert b"[bold]bad[red].png: the file is empty" in text and b"6/6" in text and b"images/s" in text
