"""Interruptions, divergence and full disks: the state on disk is always that of a whole epoch, and goes on exactly."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import easy_folder, easy_pair, write_folder
from random_networks import checkpoint as random_checkpoint
from tiny_training import OPTIONS, TinyNetwork

from histoseg_fast.compiling.compile import load_network
from histoseg_fast.errors import EngineError, PlanError, UsageError
from histoseg_fast.training import checkpoint, loop
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.checkpoint import read_checkpoint, write_checkpoint
from histoseg_fast.training.loop import BEST, HISTORY, LAST, train
from histoseg_fast.training.progress import CURVES, TENSORBOARD

Fit = Callable[..., dict[str, Any]]
EVERYTHING = Augmentation(noise=4, turns=True, scale=0.25, stain=0.2, colour=0.1)


def result(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]], list[dict[str, Any]]]:
    """All that a run leaves: the tensors' bytes, the history and the descriptions, without times and --epochs."""
    tensors, descriptions = {}, []
    for name in (BEST, LAST):
        loaded, description = read_checkpoint(out / name)
        tensors |= {f"{name} {key}": tensor.numpy().tobytes() for key, tensor in loaded.items()}
        del description["training"]["options"]["epochs"]
        description.get("best", {}).pop("seconds", None)
        description.get("best", {}).pop("crops_per_second", None)
        descriptions.append(description)
    records = [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]
    for record in records:
        del record["seconds"], record["crops_per_second"]
    return tensors, records, descriptions


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What three epochs of `fit` without interruption give."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(loop, "make_network", TinyNetwork)
        train(folder, out, replace(OPTIONS, epochs=3, augmentation=EVERYTHING), lambda line: None)
    return result(out)


def test_same_seed_same_numbers(fit: Fit, tmp_path: Path, whole: Any) -> None:
    fit(tmp_path / "again", epochs=3, augmentation=EVERYTHING)
    assert result(tmp_path / "again") == whole
    fit(tmp_path / "other", epochs=3, augmentation=EVERYTHING, seed=6)
    assert result(tmp_path / "other")[0] != whole[0]


@pytest.mark.parametrize("stops", [(1,), (2,), (1, 2)])
def test_more_epochs_go_on_to_the_same_result(fit: Fit, tmp_path: Path, whole: Any, stops: tuple[int, ...]) -> None:
    out, lines = tmp_path / "out", []
    for epochs in (*stops, 3):
        fit(out, epochs=epochs, augmentation=EVERYTHING, lines=lines)
    assert result(out) == whole
    for epochs in stops:
        assert f"resuming after epoch {epochs} of {out / LAST}" in lines
    before = (out / LAST).read_bytes()
    assert fit(out, epochs=3, augmentation=EVERYTHING)["epoch"] == whole[2][0]["scores"]["epoch"]
    assert (out / LAST).read_bytes() == before  # nothing was left to do


@pytest.mark.parametrize("step", [1, 6, 7, 15])
def test_interrupted_within_an_epoch(
    fit: Fit, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Six steps an epoch."""
    count, original = 0, loop._Run._step

    def interrupted(run: Any, *batch: torch.Tensor) -> float:
        nonlocal count
        count += 1
        if count == step:
            raise KeyboardInterrupt
        return original(run, *batch)

    monkeypatch.setattr(loop._Run, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", epochs=3, augmentation=EVERYTHING)
    assert (tmp_path / "out" / LAST).exists() == (step > 6)
    assert not list((tmp_path / "out").glob(".*"))
    fit(tmp_path / "out", epochs=3, augmentation=EVERYTHING)
    assert result(tmp_path / "out") == whole


@pytest.mark.parametrize("write", range(2, 11))
def test_interrupted_between_any_two_files(
    fit: Fit, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """The first write is the empty history; then best (where better), history and last, an epoch."""
    count, original = 0, checkpoint.write_whole

    def interrupted(path: Path, payload: bytes) -> None:
        nonlocal count
        count += 1
        if count == write:
            raise KeyboardInterrupt
        original(path, payload)

    for module in (checkpoint, loop):
        monkeypatch.setattr(module, "write_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "out", epochs=3, augmentation=EVERYTHING)
    fit(tmp_path / "out", epochs=3, augmentation=EVERYTHING)
    assert result(tmp_path / "out") == whole


def test_a_real_network_resumes_exactly(tmp_path: Path) -> None:
    """The paper's final network, whose weights lie in memory by channels last."""
    root = easy_folder(tmp_path / "data", side=16)
    options = replace(OPTIONS, lr=1e-4)
    for epochs in (1, 2):
        train(root, tmp_path / "parts", replace(options, epochs=epochs), lambda line: None)
    train(root, tmp_path / "whole", replace(options, epochs=2), lambda line: None)
    assert result(tmp_path / "parts") == result(tmp_path / "whole")


def test_batch_norms_and_a_teacher_resume_exactly(tmp_path: Path) -> None:
    """Running statistics are state too, and so is their average."""
    root = easy_folder(tmp_path / "data", side=64)
    teacher = random_checkpoint(tmp_path / "teacher.safetensors", "one")
    options = replace(OPTIONS, arch="fast", crop=64, teacher=str(teacher), loss={"ce": 0.5, "distil": 0.5}, dropout=0.1)
    for epochs in (1, 2):
        train(root, tmp_path / "parts", replace(options, epochs=epochs), lambda line: None)
    train(root, tmp_path / "whole", replace(options, epochs=2), lambda line: None)
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    tensors, description = read_checkpoint(tmp_path / "whole" / LAST)
    assert description["training"]["options"]["teacher"] == "teacher.safetensors"
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("average.")}
    assert any(name.endswith("running_var") and not torch.equal(tensor, torch.ones_like(tensor))
               for name, tensor in averages.items())  # fmt: skip
    steps = [t for n, t in tensors.items() if n.startswith("network.") and n.endswith("num_batches_tracked")]
    assert steps and all(int(tensor) == description["steps"] for tensor in steps)
    network, _ = load_network(tmp_path / "whole" / BEST)  # what `compile` makes of it
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    with pytest.raises(UsageError, match=r"other options \(loss, teacher\)"):
        train(root, tmp_path / "parts", replace(options, teacher="", loss={"ce": 1.0}), lambda line: None)


def test_frozen_norms_resume_exactly_and_train_with_the_statistics_they_are_judged_by(tmp_path: Path) -> None:
    root = easy_folder(tmp_path / "data", side=64)
    options = replace(OPTIONS, arch="fast", crop=64, freeze_norms=2)
    states = []
    for epochs in (1, 2, 3):
        train(root, tmp_path / "parts", replace(options, epochs=epochs), lambda line: None)
        states.append(read_checkpoint(tmp_path / "parts" / LAST)[0])
    train(root, tmp_path / "whole", replace(options, epochs=3), lambda line: None)
    assert result(tmp_path / "parts") == result(tmp_path / "whole")
    first, second, third = ({n: t for n, t in state.items() if "running_" in n} for state in states)
    taken = {n: first[n.replace("network.", "average.")] for n in first if n.startswith("network.")}
    assert taken and any(not torch.equal(tensor, first[name]) for name, tensor in taken.items())
    for later in (second, third):
        assert all(torch.equal(later[name], tensor) for name, tensor in taken.items())
    assert any(not torch.equal(states[1][n], states[2][n]) for n in states[1] if n.endswith("weight"))


def test_norms_frozen_from_the_start_keep_what_was_loaded(tmp_path: Path) -> None:
    root = easy_folder(tmp_path / "data", side=64)
    train(root, tmp_path / "first", replace(OPTIONS, arch="fast", crop=64), lambda line: None)
    best = tmp_path / "first" / BEST
    options = replace(OPTIONS, arch="fast", crop=64, weights=str(best), freeze_norms=1, seed=6)
    train(root, tmp_path / "second", options, lambda line: None)
    before, after = read_checkpoint(best)[0], read_checkpoint(tmp_path / "second" / LAST)[0]
    assert all(torch.equal(after[f"network.{n}"], t) for n, t in before.items() if "running_" in n)


def test_a_run_from_before_an_option_goes_on(fit: Fit, tmp_path: Path) -> None:
    fit(tmp_path / "out")
    tensors, description = read_checkpoint(tmp_path / "out" / LAST)
    del description["training"]["options"]["freeze_norms"]
    write_checkpoint(tmp_path / "out" / LAST, tensors, description)
    with pytest.raises(UsageError, match=r"other options \(batch_norm, freeze_norms\)"):
        fit(tmp_path / "out", epochs=3, batch_norm=True, freeze_norms=2)
    fit(tmp_path / "out", epochs=3)
    assert read_checkpoint(tmp_path / "out" / LAST)[1]["epoch"] == 3


def test_another_run_is_not_gone_on_with(fit: Fit, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "out"
    fit(out)
    before = result(out)
    with pytest.raises(UsageError) as caught:
        fit(out, epochs=5, lr=0.5, crop=8, augmentation=Augmentation(noise=1))
    assert str(caught.value) == f"{out}: holds a run with other options (lr, crop, augmentation); choose another --out"
    with pytest.raises(UsageError, match=r"other options \(data\)"):
        fit(out, easy_folder(tmp_path / "other", train=3, side=24))
    assert result(out) == before
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    fit(out, moved, epochs=3)  # the same data in another place is the same data


@pytest.mark.parametrize("damage", ["truncated", "best", "missing tensor", "other shape"])
def test_a_state_that_cannot_be_resumed(fit: Fit, tmp_path: Path, damage: str) -> None:
    fit(tmp_path)
    last = tmp_path / LAST
    tensors, description = read_checkpoint(last)
    if damage == "truncated":
        last.write_bytes(last.read_bytes()[:-1])
    elif damage == "best":
        shutil.copy(tmp_path / BEST, last)
    else:
        name = "adam.logits.weight.exp_avg" if damage == "missing tensor" else "network.logits.weight"
        del tensors[name]
        if damage == "other shape":
            tensors[name] = torch.zeros(7)
        checkpoint.write_checkpoint(last, tensors, description)
    before = last.read_bytes()
    with pytest.raises(PlanError) as caught:
        fit(tmp_path, epochs=3)
    assert str(caught.value).startswith(str(last)) and "\n" not in str(caught.value)
    assert last.read_bytes() == before


@pytest.fixture
def dark(tmp_path: Path) -> Path:
    """A folder whose image dark.png, and no other, is black."""
    rng = np.random.default_rng(0)
    pairs = {name: easy_pair(rng, 24, 24) for name in ("a", "b", "dark", "v")}
    pairs["dark"] = np.zeros_like(pairs["dark"][0]), pairs["dark"][1]
    return write_folder(tmp_path / "data", pairs, {"a": "train", "b": "train", "dark": "train", "v": "val"})


def is_dark(x: torch.Tensor, training: bool) -> bool:
    return training and bool((x.amax((1, 2, 3)) < -1.5).any())


def test_a_loss_that_is_not_finite_stops_with_its_images(fit: Fit, tiny: Any, dark: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.poison = is_dark
    with pytest.raises(EngineError, match=r"epoch 1: the loss of a batch is nan \(crops of dark.png\); nothing was s"):
        fit(out, dark, epochs=3, batch=1)
    assert [path.name for path in out.iterdir()] == [HISTORY]
    tiny.poison = None
    fit(out, dark, epochs=1, batch=1)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    tiny.poison = is_dark
    with pytest.raises(EngineError) as caught:
        fit(out, dark, epochs=3, batch=1)
    message = str(caught.value)
    assert message.startswith("epoch 2: the loss of a batch is nan (crops of dark.png)") and "\n" not in message
    assert f"{out / LAST} holds epoch 1" in message and "--lr" in message
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    tiny.poison = None
    fit(out, dark, epochs=3, batch=1)
    fit(tmp_path / "whole", dark, epochs=3, batch=1)
    assert result(out) == result(tmp_path / "whole")


def test_all_images_of_the_batch_are_named(fit: Fit, tiny: Any, dark: Path, tmp_path: Path) -> None:
    tiny.poison = is_dark
    with pytest.raises(EngineError, match=r"\(crops of a.png, b.png, dark.png\)"):
        fit(tmp_path / "out", dark, batch=64)


def test_a_validation_that_is_not_finite_stops(fit: Fit, tiny: Any, tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    tiny.poison = lambda x, training: not training
    with pytest.raises(EngineError, match=r"epoch 2: the validation cross entropy is not finite; .* holds epoch 1"):
        fit(tmp_path, epochs=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", [BEST, HISTORY, LAST])
def test_a_full_disk_loses_no_epoch(
    fit: Fit, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    out = tmp_path / "out"
    fit(out, epochs=1, augmentation=EVERYTHING)
    before = read_checkpoint(out / LAST)[0]
    replace_file = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(source, target)

    with monkeypatch.context() as context:
        context.setattr(os, "replace", full)
        with pytest.raises(PlanError, match=f"{name}: cannot be written: No space left on device; free space"):
            fit(out, epochs=3, augmentation=EVERYTHING)
    assert sorted(path.name for path in out.iterdir()) == sorted([BEST, HISTORY, LAST, CURVES, TENSORBOARD])
    after = read_checkpoint(out / LAST)[0]
    assert all(torch.equal(after[key], before[key]) for key in before)
    fit(out, epochs=3, augmentation=EVERYTHING)
    assert result(out) == whole
