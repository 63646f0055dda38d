"""What each training option does: dropout, L2, clipping, patience, more folders, pre-training, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import easy_pair, write_folder
from random_networks import checkpoint
from tiny_training import OPTIONS

from histoseg_fast.compiling.compile import load_network
from histoseg_fast.errors import DataError, PlanError, UsageError
from histoseg_fast.images import read_image
from histoseg_fast.models.network import UInt8Network, make_network, rebuild
from histoseg_fast.plans import open_plan
from histoseg_fast.training import loop, parallel
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.checkpoint import read_checkpoint
from histoseg_fast.training.crops import CropDataset
from histoseg_fast.training.loop import BEST, HISTORY, LAST, find_splits

Fit = Callable[..., dict[str, Any]]


def test_patience_stops_after_epochs_without_improvement(fit: Fit, tmp_path: Path, monkeypatch) -> None:
    answers = iter([0.9, 0.5, 0.6, 0.5, 0.4, 0.3])

    def validate(_: Any) -> dict[str, Any]:
        return {"cross_entropy": next(answers), "pixel_accuracy": 0.5, "mean_iou": 0.4, "iou": {}}

    monkeypatch.setattr(loop._Run, "validate", validate)
    lines: list[str] = []
    assert fit(tmp_path, epochs=6, patience=2, lines=lines)["epoch"] == 2
    assert len((tmp_path / HISTORY).read_text().splitlines()) == 4
    assert any(line.startswith("stopped: no better validation cross entropy for 2 epochs") for line in lines)


def test_clipping_bounds_the_step(fit: Fit, tmp_path: Path, monkeypatch) -> None:
    norms: list[float] = []
    step = torch.optim.Adam.step

    def watched(optimiser: torch.optim.Adam, *arguments: Any) -> Any:
        grads = [p.grad for group in optimiser.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in grads]).norm()))
        return step(optimiser, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    fit(tmp_path / "free", epochs=1)
    assert max(norms) > 0.05
    norms.clear()
    fit(tmp_path / "clipped", epochs=1, clip=0.01)
    assert max(norms) <= 0.0101


def test_l2_pulls_weights_to_zero(fit: Fit, tmp_path: Path) -> None:
    fit(tmp_path / "free", epochs=4)
    fit(tmp_path / "pulled", epochs=4, l2=1.0)
    tensors = [read_checkpoint(tmp_path / run / LAST)[0] for run in ("free", "pulled")]
    norms = [sum(float(t.norm()) for n, t in ts.items() if n.startswith("network.")) for ts in tensors]
    assert norms[1] < norms[0]


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    network, image = make_network("one", dropout=0.5), torch.randn(1, 3, 16, 16)
    assert network.state_dict().keys() == make_network("one").state_dict().keys()
    assert not torch.equal(network.train()(image), network(image))
    assert torch.equal(network.eval()(image), network(image))


def folder_of(root: Path, splits: dict[str, str], seed: int, side: int = 24) -> Path:
    rng = np.random.default_rng(seed)
    return write_folder(root, {name: easy_pair(rng, side, side) for name in splits}, splits)


def test_extra_folders_train_at_their_scale_and_do_not_validate(tmp_path: Path) -> None:
    from dataclasses import replace

    main = folder_of(tmp_path / "main", {"a": "train", "b": "val"}, 1)
    other = folder_of(tmp_path / "other", {"c": "train", "d": "val", "e": "test"}, 2, side=64)
    training, validation = find_splits(main, replace(OPTIONS, extra=((str(other), 0.5),)))
    assert [pair.name for pair in training] == ["a.png", "c.png"] and [p.name for p in validation] == ["b.png"]
    data = CropDataset(training, 16, OPTIONS.augmentation, 0)
    assert data.load(0)[0].shape == (24, 24, 3)
    rgb, ids = data.load(1)
    assert rgb.shape == (32, 32, 3) and ids.shape == (32, 32) and set(np.unique(ids)) <= {0, 1, 2}


def test_one_image_in_two_splits_is_told_by_content(tmp_path: Path) -> None:
    root = folder_of(tmp_path, {"a": "train", "b": "val", "c": "test"}, 3)
    for kind in ("images", "labels"):
        (root / kind / "c.png").write_bytes((root / kind / "a.png").read_bytes())
    with pytest.raises(DataError, match=r"a.png \(train\) and c.png \(test\) are the same image"):
        find_splits(root, OPTIONS)


def test_a_checkpoint_as_weights_starts_from_all_of_it(fit: Fit, folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.undo()  # the real network
    options = loop.TrainingOptions(**{**vars(OPTIONS), "arch": "one", "epochs": 1, "average": 0.0})
    loop.train(folder, tmp_path / "first", options, lambda line: None)
    second = loop.TrainingOptions(**{**vars(options), "weights": str(tmp_path / "first" / BEST), "lr": 0.0})
    loop.train(folder, tmp_path / "second", second, lambda line: None)
    before, after = (read_checkpoint(tmp_path / run / BEST)[0] for run in ("first", "second"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = loop.TrainingOptions(**{**vars(second), "arch": "two"})
    with pytest.raises(PlanError, match=r"checkpoint of another architecture|no VGG convolutions"):
        loop.train(folder, tmp_path / "third", other, lambda line: None)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "teacher.safetensors", "one")


TURNS = [(up, left, transposed) for transposed in (False, True) for up in (False, True) for left in (False, True)]
"""The eight views of a square; the first four are mirrorings alone."""


def view(network: torch.nn.Module, rgb: torch.Tensor, up: bool, left: bool, transposed: bool) -> torch.Tensor:
    """What the network says of the batch mirrored and transposed, put back in place."""

    def turned(batch: torch.Tensor, axis: int) -> torch.Tensor:
        axes = [axis] * up + [axis + 1] * left
        return batch.flip(axes)

    rgb = turned(rgb, 1)
    with torch.inference_mode():
        logits = UInt8Network(network)((rgb.transpose(1, 2) if transposed else rgb).contiguous())
    return turned(logits.transpose(2, 3) if transposed else logits, 2)


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(turns=True)], ids=["mirrored", "turned"])
def test_a_teacher_is_learnt_from(
    fit: Fit, tmp_path: Path, teacher: Path, monkeypatch, augmentation: Augmentation
) -> None:
    """Its logits, of a view of the very crops, go into the loss; it stays as it is, and in evaluation mode."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    before = read_checkpoint(teacher)[0]
    network, _ = load_network(teacher)
    teach = loop._Run._teach

    def watched(run: Any, rgb: torch.Tensor) -> torch.Tensor:
        logits = teach(run, rgb)
        assert not logits.requires_grad and not run.teacher.training
        seen.append((rgb.clone(), logits.clone()))
        return logits

    monkeypatch.setattr(loop._Run, "_teach", watched)
    best = fit(
        tmp_path / "out", epochs=1, teacher=str(teacher), loss={"ce": 0.5, "distil": 0.5}, augmentation=augmentation
    )
    assert len(seen) == 6 and best["train_loss"] > 0
    views = set()
    for rgb, logits in seen:
        near = [torch.allclose(logits, view(network, rgb, *turn), rtol=1e-4, atol=1e-4) for turn in TURNS]
        assert sum(near) == 1
        views.add(near.index(True))
    assert len(views) > 2 and (augmentation.turns or max(views) < 4)
    assert all(torch.equal(before[name], tensor) for name, tensor in read_checkpoint(teacher)[0].items())


def test_a_student_of_labels_alone_differs_from_one_with_a_teacher(fit: Fit, tmp_path: Path, teacher: Path) -> None:
    """And a teacher alone is enough: no label is looked at."""
    fit(tmp_path / "alone", epochs=1)
    fit(tmp_path / "both", epochs=1, teacher=str(teacher), loss={"ce": 1.0, "distil": 1.0})
    alone, both = (read_checkpoint(tmp_path / run / LAST)[0] for run in ("alone", "both"))
    assert not torch.equal(alone["network.logits.weight"], both["network.logits.weight"])
    assert fit(tmp_path / "only", epochs=1, teacher=str(teacher), loss={"distil": 1.0})["train_loss"] > 0


def test_teachers_that_do_not_fit(fit: Fit, tmp_path: Path, teacher: Path, monkeypatch) -> None:
    """All are told before any image is read."""
    monkeypatch.setattr(loop, "find_pairs", lambda root: pytest.fail("this should not have been reached"))
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "gone.safetensors", UsageError, "gone.safetensors: no such checkpoint"),
        (checkpoint(tmp_path / "other.safetensors", "one", classes=["a", "b", "c"]), PlanError, "has other classes"),
        (checkpoint(tmp_path / "fast.safetensors", "fast"), UsageError, "--crop 16 is no multiple of the teacher's"),
        (tmp_path, PlanError, "cannot be read as a checkpoint"),
    ]
    (tmp_path / "cut.safetensors").write_bytes(teacher.read_bytes()[:-9])
    cases.append((tmp_path / "cut.safetensors", PlanError, "cannot be read as a checkpoint"))
    for path, error, told in cases:
        with pytest.raises(error, match=told) as caught:
            fit(tmp_path / "out", teacher=str(path), loss={"ce": 0.5, "distil": 0.5})
        assert str(caught.value).isprintable()
    assert not (tmp_path / "out").exists()


def test_running_statistics_become_the_mean_of_all_processes(monkeypatch) -> None:
    """Of three, of which two stand still here; counters are left alone."""
    module = torch.nn.BatchNorm2d(2)
    module.running_mean.copy_(torch.tensor([3.0, 6.0]))
    others = {2: [torch.tensor([0.0, 3.0]), torch.tensor([6.0, 0.0])]}
    reduced: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor) -> None:
        reduced.append(tensor)
        for other in others[len(tensor)]:
            tensor += other

    monkeypatch.setattr(parallel.dist, "all_reduce", all_reduce)
    processes = parallel.Processes()
    processes.mean_buffers(module)
    assert not reduced and module.running_mean.tolist() == [3.0, 6.0]
    processes.count = 3
    processes.mean_buffers(module)
    assert module.running_mean.tolist() == [3.0, 3.0]
    assert len(reduced) == 2 and int(module.num_batches_tracked) == 0


def test_class_weights_must_fit_the_classes(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--class-weights needs 3 numbers, not 2"):
        fit(tmp_path, class_weights=(1.0, 2.0))


def test_two_processes_train_as_one(folder: Path, tmp_path: Path) -> None:
    command = ["-m", "histoseg_fast", "train", folder, "--weights", "none", "--arch", "one", "--crop", "16"]
    command += ["--precision", "fp32", "--no-compile", "--epochs", "2", "--batch", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    for start, out in (([sys.executable], "one"), ([*launch, "--standalone"], "two")):
        arguments = [*start, *map(str, command), "--out", str(tmp_path / out)]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\nepoch 2:") == 1  # one process talks
    one, two = (read_checkpoint(tmp_path / out / LAST)[0] for out in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=2e-2, atol=2e-4)
    texts = [(tmp_path / out / HISTORY).read_text() for out in ("one", "two")]
    records = [[json.loads(line) for line in text.splitlines()] for text in texts]
    for a, b in zip(*records, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
        assert a["val"]["cross_entropy"] == pytest.approx(b["val"]["cross_entropy"], rel=1e-3)
        assert a["val"]["pixels"] == b["val"]["pixels"]


def test_training_goes_on_from_a_plan_and_learns_from_one(folder: Path, tmp_path: Path) -> None:
    """Batch norms are put behind the plan's layers, and settled: a rate of 0 leaves what the plan computes."""
    options = loop.TrainingOptions(
        **{**vars(OPTIONS), "arch": "fast", "weights": "fast", "crop": 64, "epochs": 1, "lr": 0.0, "average": 0.0},
    )
    loop.train(folder, tmp_path / "first", options, lambda line: None)
    network, description = load_network(tmp_path / "first" / BEST)
    rgb = torch.from_numpy(read_image(folder / "images" / "train0.png"))[None].repeat(1, 4, 4, 1)[:, :64, :64]
    with torch.no_grad():
        logits, expected = UInt8Network(network)(rgb), rebuild(open_plan("fast"))(rgb)
    assert description["training"]["options"]["weights"] == "fast"
    assert float((logits - expected).abs().mean()) < 0.2 * float(expected.std())
    learning = loop.TrainingOptions(
        **{**vars(OPTIONS), "arch": "one", "crop": 64, "epochs": 1, "teacher": "fast", "loss": {"distil": 1.0}}
    )
    assert loop.train(folder, tmp_path / "second", learning, lambda line: None)["train_loss"] > 0
