"""`histoseg-fast train` from the command line: files, lines, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_folders import easy_folder, easy_pair, write_folder

from histoseg_fast import cli, extras
from histoseg_fast.images import write_png
from histoseg_fast.training.checkpoint import read_checkpoint

COMMAND = [sys.executable, "-m", "histoseg_fast", "train"]
SMALL = ["--weights", "none", "--arch", "one", "--crop", "16", "--batch", "2", "--precision", "fp32", "--no-compile"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `histoseg-fast train ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["histoseg-fast", "train", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """`histoseg-fast train ARGUMENTS` as a process that hears Ctrl-C and does not outlive the block."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell may ignore it
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_train_interrupt_resume(tmp_path: Path) -> None:
    """Ctrl-C after an epoch, then the same command again to the end."""
    root, out = easy_folder(tmp_path / "data", train=1, side=16), tmp_path / "out"
    lines = []
    with started(root, "--out", out, *SMALL, "--epochs", 10_000) as process:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("epoch 1:"):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == "interrupted; run the same command again to go on after the last whole epoch\n"
    assert lines[0] == "weights: random\n"
    done = 1 + sum(line.startswith("epoch ") for line in rest.splitlines())
    records = (out / "history.jsonl").read_text().splitlines()
    assert done <= len(records) <= done + 1  # the line comes after the files
    with started(root, "--out", out, *SMALL, "--epochs", len(records) + 1) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    assert "resuming after epoch" in output and f"{out}/last.safetensors" in output
    assert output.splitlines()[-1].endswith(f"{out}/best.safetensors")
    assert sorted(path.name for path in out.iterdir()) == [
        "best.safetensors",
        "curves.png",
        "history.jsonl",
        "last.safetensors",
        "tensorboard",
    ]
    epochs = [json.loads(line)["epoch"] for line in (out / "history.jsonl").read_text().splitlines()]
    assert epochs == list(range(1, len(records) + 2))


def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from histoseg_fast.training import loop
    from histoseg_fast.training.augment import Augmentation
    from histoseg_fast.training.options import TrainingOptions

    calls = []
    monkeypatch.setattr(loop, "train", lambda root, out, options, report: calls.append((root, out, options)))
    arguments = "--arch two --epochs 3 --batch 7 --lr 0.5 --decay 0.25 --crop 64 --weights w.pth --seed 9"
    arguments += " --average 0.75 --precision bf16 --compile --tolerance 8"
    arguments += " --loss ce,l1=0.5 --class-weights 1,1.5,2 --label-smoothing 0.1 --l2 0.01 --dropout 0.2"
    arguments += " --patience 5 --clip 1 --extra colon@0.5 --extra b@c@1"
    arguments += " --teacher t.safetensors --noise 1 --turns --scale 0.2 --stain 0.3 --colour 0.4"
    assert main(monkeypatch, "DATA", "--out", "OUT", *arguments.split()) == 0
    assert main(monkeypatch, "DATA", "--out", "OUT") == 0
    augmentation = Augmentation(noise=1, turns=True, scale=0.2, stain=0.3, colour=0.4)
    given = TrainingOptions(
        arch="two",
        epochs=3,
        batch=7,
        lr=0.5,
        decay=0.25,
        crop=64,
        weights="w.pth",
        seed=9,
        loss={"ce": 1, "l1": 0.5},
        class_weights=(1, 1.5, 2),
        label_smoothing=0.1,
        l2=0.01,
        dropout=0.2,
        average=0.75,
        patience=5,
        clip=1,
        extra=(("colon", 0.5), ("b@c", 1.0)),
        teacher="t.safetensors",
        precision="bf16",
        compile="on",
        tolerance=8,
        augmentation=augmentation,
    )
    defaults = TrainingOptions()
    assert calls == [(Path("DATA"), Path("OUT"), given), (Path("DATA"), Path("OUT"), defaults)]


def test_a_bad_folder_is_one_line_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = easy_folder(tmp_path / "data", side=16)
    write_png(root / "labels" / "val0.png", easy_pair(np.random.default_rng(0), 16, 16)[0])  # an image as label
    (root / "labels" / "train0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert main(monkeypatch, root, "--out", tmp_path / "out", *SMALL) == 1
    output, errors = capfd.readouterr()
    assert output == "" and errors.count("\n") == 1
    assert errors.startswith(f"histoseg-fast: {root}: 2 problem(s)")
    assert "train0.png" in errors and "val0.png" in errors and "off the palette" in errors
    assert not (tmp_path / "out").exists()
    assert main(monkeypatch, tmp_path / "gone", "--out", tmp_path / "out", *SMALL) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors == f"histoseg-fast: {tmp_path / 'gone'}: no such folder\n"


NEED = "--teacher and the loss term distil need each other; give both, e.g. --teacher FILE --loss ce=0.5,distil=0.5"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--arch", "five"], "unknown architecture 'five'; choose one of one, two, three, final, fast"),
        (["--crop", "17"], "--crop 17 is no multiple (2 or more) of the network's stride 2"),
        (["--arch", "fast", "--crop", "32"], "--crop 32 is no multiple (2 or more) of the network's stride 32"),
        (["--teacher", "t.safetensors"], NEED),
        (["--loss", "ce,distil"], NEED),
        (["--precision", "fp8"], "unknown precision 'fp8'; choose auto, fp32 or bf16"),
        (["--weights", "gone.pth"], "gone.pth: no such file; --weights takes imagenet, none or a file"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    root = easy_folder(tmp_path / "data", side=16)
    assert main(monkeypatch, root, "--out", tmp_path / "out", *SMALL, *arguments) == 2
    output, errors = capfd.readouterr()
    assert output == "" and errors == f"histoseg-fast: {told}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [["--epochs", "0"], ["--epochs", "many"], ["--lr", "-1"], ["--seed", str(2**32)], ["--speed", "9"]]
)
def test_options_that_do_not_parse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert main(monkeypatch, tmp_path, "--out", tmp_path / "out", *arguments) == 2
    assert arguments[0] in capfd.readouterr().err
    assert main(monkeypatch, tmp_path) == 2  # --out is required


def test_the_extra_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extras, "has", lambda *packages: "torchvision" not in packages)
    assert main(monkeypatch, tmp_path, "--out", tmp_path / "out") == 2
    assert capfd.readouterr().err == "histoseg-fast: this needs torchvision; pip install 'histoseg-fast[train]'\n"


def test_a_teacher_that_is_none_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = easy_folder(tmp_path / "data", side=16)
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    for name, told, code in (("gone", "no such checkpoint", 2), ("bad", "cannot be read as a checkpoint", 1)):
        teacher = ["--teacher", str(tmp_path / f"{name}.safetensors"), "--loss", "distil"]
        assert main(monkeypatch, root, "--out", tmp_path / "out", *SMALL, *teacher) == code
        output, errors = capfd.readouterr()
        assert output == "" and errors.count("\n") == 1 and f"{name}.safetensors: {told}" in errors
    assert not (tmp_path / "out").exists()


def test_a_training_that_diverges_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    pairs = {name: easy_pair(rng, 16, 16) for name in ("t", "v")}
    root = write_folder(tmp_path / "data", pairs, {"t": "train", "v": "val"})
    arguments = [*SMALL, "--lr", "1e30", "--epochs", "3"]
    assert main(monkeypatch, root, "--out", tmp_path / "out", *arguments) == 1
    errors = capfd.readouterr().err
    assert errors.startswith("histoseg-fast: epoch 1: ") and errors.count("\n") == 1 and "(crops of t.png)" in errors


def test_a_palette_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other names, other colours, another number of classes: into the checkpoint, and no trace of folders."""
    rng = np.random.default_rng(3)
    colours = np.array([[9, 9, 9], [0, 0, 255]], np.uint8)
    for name in ("a", "b", "c", "d", "e"):
        ids = rng.integers(0, 2, (16, 16))
        write_png(tmp_path / "data" / "images" / f"{name}.png", np.repeat(ids[..., None] * 200, 3, 2).astype(np.uint8))
        write_png(tmp_path / "data" / "labels" / f"{name}.png", colours[ids])
    palette = "glass=9,9,9;tumour=0,0,255"
    out = tmp_path / "out"
    assert main(monkeypatch, tmp_path / "data", "--out", out, *SMALL, "--palette", palette, "--loss", "ce,l1,dice") == 0
    tensors, description = read_checkpoint(out / "best.safetensors")
    assert description["classes"] == ["glass", "tumour"] and description["colours"] == colours.tolist()
    assert tensors["head.logits.weight"].shape[0] == 2
    assert str(tmp_path) not in json.dumps(description)
