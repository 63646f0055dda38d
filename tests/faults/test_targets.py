"""Targets that are no regular files: no command replaces them, none writes through a link."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from children import fake_engine, run_child
from running import make_pictures, partials, picture, results
from tiny_plans import tiny_model

from histoseg_fast.engines.choice import FILE, fastest
from histoseg_fast.images import write_png
from histoseg_fast.plan import Plan


def test_no_command_writes_through_a_link_or_over_a_folder(tmp_path: Path, tiny_plan_path: Path, capsys) -> None:
    """One line, exit code 1 or 2, and what was there is still there."""
    make_pictures(tmp_path / "in", 1, 40, 40)
    for kind in ("images", "labels"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    write_png(tmp_path / "data" / "images" / "a.png", picture(0, 40, 40))
    write_png(tmp_path / "data" / "labels" / "a.png", np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "x.onnx").write_bytes(tiny_model())
    assert (
        run_child(tmp_path, "infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", tmp_path / "run").code == 0
    )
    kept = tmp_path / "kept"
    kept.write_bytes(b"kept")
    link, folder = tmp_path / "link", tmp_path / "folder"
    link.symlink_to(kept)
    folder.mkdir()
    engine = ("--engine", tiny_plan_path, "--precision", "fp32")
    palette = "background=0,0,0;cancer=255,0,0;stroma=0,255,0"
    commands = [
        ("compile", tmp_path / "x.onnx", "--classes", palette, "-o"),
        ("eval", tmp_path / "data", *engine, "--json"),
        ("report", tmp_path / "run", "-o"),
        ("export", tiny_plan_path, "--format", "onnx", "-o"),
        ("bench", tmp_path / "in", *engine, "--repeats", 1, "--json"),
    ]
    for arguments in commands:
        for target in (link, folder) if arguments[0] in ("report", "export") else (link,):
            ended = run_child(tmp_path, *arguments, target)
            told = [line for line in ended.errors if line.startswith("histoseg-fast: ")]
            assert ended.code in (1, 2) and len(told) == 1, (arguments, ended)
            assert f"{target}: cannot be written" in told[0] and "is no regular file" in told[0]
    assert kept.read_bytes() == b"kept" and link.is_symlink() and not list(folder.iterdir())
    assert not partials(tmp_path)


@pytest.mark.parametrize("name", ["masks/image_000.png", "summary.csv", "manifest.jsonl", "run.json"])
def test_infer_writes_through_no_link(tmp_path: Path, tiny_plan_path: Path, name: str) -> None:
    make_pictures(tmp_path / "in", 2)
    out, kept = tmp_path / "out", tmp_path / "kept"
    kept.write_bytes(b"kept")
    arguments = ("infer", tmp_path / "in", "--engine", tiny_plan_path, "--out", out)
    assert run_child(tmp_path, *arguments, fault=fake_engine).code == 0
    whole, before = results(out), (out / name).read_bytes()
    (out / name).unlink()
    (out / name).symlink_to(kept)
    ended = run_child(tmp_path, *arguments, fault=fake_engine)
    expected = {"masks/image_000.png": 3, "run.json": 0}.get(name, 1)  # an old run.json is removed, and so is its link
    assert ended.code == expected and kept.read_bytes() == b"kept"
    if expected:
        assert len(ended.errors) == 1 and f"{name}: cannot be written: it exists and is no" in ended.errors[0]
        (out / name).unlink()
        (out / name).write_bytes(before)
    assert run_child(tmp_path, *arguments, fault=fake_engine).code == 0
    assert results(out) == whole


def test_a_link_in_the_cache_is_left_alone(tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HISTOSEG_CACHE", str(tmp_path))
    (tmp_path / "kept").write_text("{}")
    (tmp_path / FILE).symlink_to(tmp_path / "kept")
    assert fastest(tiny_plan, ["fp32", "bf16"], lambda plan, precision: 1.0) == "fp32"
    assert (tmp_path / FILE).is_symlink() and (tmp_path / "kept").read_text() == "{}"
