"""The training loop: it learns, its scores are right, the best is kept, and bad arguments cost no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import easy_folder, easy_pair, write_folder
from tiny_training import OPTIONS

from histoseg_fast.errors import DataError, EngineError, PlanError, UsageError
from histoseg_fast.images import write_png
from histoseg_fast.models.network import UInt8Network
from histoseg_fast.training import loop
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.checkpoint import read_checkpoint
from histoseg_fast.training.loop import BEST, HISTORY, LAST, train

Fit = Callable[..., dict[str, Any]]


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / HISTORY).read_text().splitlines()]


def test_it_learns_an_easy_task(fit: Fit, tmp_path: Path) -> None:
    lines: list[str] = []
    best = fit(tmp_path, epochs=15, lines=lines, decay=1.0, lr=2e-2)
    records = history(tmp_path)
    assert [record["epoch"] for record in records] == list(range(1, 16))
    assert records[-1]["train_loss"] < 0.3 * records[0]["train_loss"]
    assert best["val"]["pixel_accuracy"] > 0.95 and best["val"]["mean_iou"] > 0.9
    assert best == min(records, key=lambda record: record["val"]["cross_entropy"])
    assert lines[0] == "weights: random"
    assert sum(line.startswith("epoch ") for line in lines) == 15
    assert lines[-1].startswith(f"best: epoch {best['epoch']}: ") and lines[-1].endswith(str(tmp_path / BEST))


def test_the_best_checkpoint_says_all_that_using_it_needs(fit: Fit, tmp_path: Path) -> None:
    best = fit(tmp_path, augmentation=Augmentation(noise=2, turns=True))
    tensors, description = read_checkpoint(tmp_path / BEST)
    assert tensors.keys() == loop.make_network("final").state_dict().keys()
    assert description["arch"] == "final"
    assert description["classes"] == ["background", "cancer", "stroma"]
    assert description["colours"] == [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    assert description["normalisation"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert description["scores"] == {"val": best["val"], "epoch": best["epoch"]}
    assert description["training"]["options"]["augmentation"]["noise"] == 2
    assert description["training"]["data"] == {"images": 2, "folder": "easy"}


@pytest.mark.parametrize("tile", [None, 24])
def test_validation_scores_are_those_of_whole_images(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tile: int | None
) -> None:
    """Against plain NumPy, on images whose sides are no multiples of the stride; in tiles, too."""
    tiles: list[int] = []
    if tile is not None:
        monkeypatch.setattr(loop, "VALIDATED_WHOLE", 0)
        monkeypatch.setattr(loop, "VALIDATION_TILE", tile)
        forward = loop.over_tiles
        monkeypatch.setattr(loop, "over_tiles", lambda run, *a: forward(lambda x: tiles.append(1) or run(x), *a))
    rng = np.random.default_rng(2)
    pairs = {"t": easy_pair(rng, 24, 24), "v": easy_pair(rng, 30, 23), "w": easy_pair(rng, 9, 41)}
    root = write_folder(tmp_path / "data", pairs, {"t": "train", "v": "val", "w": "val"})
    best = fit(tmp_path / "out", root, epochs=1)
    network = loop.make_network("final")
    network.load_state_dict(read_checkpoint(tmp_path / "out" / BEST)[0])
    confusion, loss, pixels = np.zeros((3, 3), int), 0.0, 0
    for name in ("v", "w"):
        rgb, ids = pairs[name]
        height, width = ids.shape
        padded = np.pad(rgb, ((0, -height % 4), (0, -width % 4), (0, 0)), mode="reflect")
        with torch.no_grad():
            logits = UInt8Network(network).eval()(torch.from_numpy(padded)[None])[0].double().numpy()
        logits = logits[:, :height, :width]
        log_softmax = logits - np.log(np.exp(logits).sum(0))
        loss -= np.take_along_axis(log_softmax, ids[None].astype(int), 0).sum()
        np.add.at(confusion, (ids.ravel(), logits.argmax(0).ravel()), 1)
        pixels += ids.size
    hit = np.diag(confusion)
    assert best["val"]["cross_entropy"] == pytest.approx(loss / pixels, abs=2e-5)
    assert best["val"]["confusion"] == confusion.tolist()
    assert best["val"]["pixel_accuracy"] == pytest.approx(hit.sum() / pixels, abs=1e-6)
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    assert best["val"]["mean_iou"] == pytest.approx(iou.mean(), abs=1e-6)
    assert best["val"]["images"] == 2 and best["val"]["pixels"] == pixels == 30 * 23 + 9 * 41
    assert tile is None or len(tiles) > 4


@pytest.mark.parametrize("average", [0.0, 0.3, 0.9])
def test_the_moving_average(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: float) -> None:
    states: list[dict[str, torch.Tensor]] = []
    update = loop._Run._update_average

    def recorded(run: Any) -> None:
        states.append({n: t.double().clone() for n, t in run.network.state_dict().items()})
        update(run)

    monkeypatch.setattr(loop._Run, "_update_average", recorded)
    fit(tmp_path, average=average)
    tensors, description = read_checkpoint(tmp_path / LAST)
    assert description["steps"] == len(states) == 12
    torch.manual_seed(OPTIONS.seed)
    expected = {n: t.double() for n, t in loop.make_network("final").state_dict().items()}
    for step, state in enumerate(states, 1):
        keep = min(average, step / (step + 10))
        expected = {n: keep * expected[n] + (1 - keep) * state[n] for n in expected}
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[f"average.{name}"].double(), tensor, rtol=1e-5, atol=1e-6)
        assert torch.equal(tensors[f"average.{name}"], tensors[f"network.{name}"]) == (average == 0)


def scripted(monkeypatch: pytest.MonkeyPatch, *cross_entropies: float) -> None:
    """Let validation answer these, one an epoch."""
    answers = iter(cross_entropies)

    def validate(_: Any) -> dict[str, Any]:
        return {"cross_entropy": next(answers), "pixel_accuracy": 0.5, "mean_iou": 0.4, "iou": {}}

    monkeypatch.setattr(loop._Run, "validate", validate)


def test_the_best_is_by_validation_cross_entropy_also_after_resuming(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 0.9, 0.5)
    fit(tmp_path / "two", epochs=2)
    scripted(monkeypatch, 0.9, 0.5, 0.7)
    lines: list[str] = []
    assert fit(tmp_path / "out", epochs=3, lines=lines)["epoch"] == 2
    assert [line.endswith(" *") for line in lines if line.startswith("epoch")] == [True, True, False]
    kept = read_checkpoint(tmp_path / "two" / BEST)[0]
    for epochs, answer, best in ((4, 0.5, 2), (5, 0.49, 5)):  # an equal score is not better
        scripted(monkeypatch, answer)
        assert fit(tmp_path / "out", epochs=epochs)["epoch"] == best
        tensors, description = read_checkpoint(tmp_path / "out" / BEST)
        assert description["scores"]["epoch"] == best
        assert all(torch.equal(tensors[name], kept[name]) for name in kept) == (best == 2)


def test_every_crop_is_seen_once_an_epoch_and_the_rate_decays(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []
    batches = loop._Run._batches

    def recorded(run: Any) -> Any:
        for items, (rgb, ids) in batches(run):
            seen.append((run.epoch, run.optimiser.param_groups[0]["lr"], tuple(items)))
            assert len(items) == len(rgb) == len(ids)
            for item, crop in zip(items, rgb, strict=True):
                assert torch.equal(run.data[item][0], crop)
            yield items, (rgb, ids)

    monkeypatch.setattr(loop._Run, "_batches", recorded)
    fit(tmp_path, epochs=2, batch=5, lr=0.01, decay=0.5)
    fit(tmp_path, epochs=3, batch=5, lr=0.01, decay=0.5)
    orders = []
    for epoch in range(3):
        mine = [entry for entry in seen if entry[0] == epoch]
        assert {rate for _, rate, _ in mine} == {0.01 * 0.5**epoch}
        orders.append([item for _, _, items in mine for item in items])
        assert sorted(orders[-1]) == list(range(12))  # two images of 24x24, crops of 16x16, three mirrorings
        assert [len(items) for _, _, items in mine] == [5, 5, 2]
    assert orders[0] != orders[1] != orders[2]


def fail(*_: Any, **__: Any) -> None:
    raise AssertionError("this should not have been reached")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"crop": 18}, r"--crop 18 is no multiple \(2 or more\) of the network's stride 4"),
        ({"crop": 4}, r"--crop 4 is no multiple \(2 or more\) of the network's stride 4"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose auto, fp32 or bf16"),
        ({"teacher": "t.safetensors"}, "--teacher and the loss term distil need each other; give both"),
        ({"loss": {"ce": 1.0, "distil": 1.0}}, "--teacher and the loss term distil need each other; give both"),
    ],
)
def test_bad_options_are_told_before_any_work(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(loop, "find_pairs", fail)
    with pytest.raises(UsageError, match=told):
        fit(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_unknown_architecture(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown architecture 'five'"):
        train(folder, tmp_path / "out", loop.TrainingOptions(arch="five"), fail)


@pytest.mark.parametrize(("train_images", "val_images", "told"), [(2, 0, "val"), (0, 2, "train")])
def test_empty_splits(fit: Fit, tmp_path: Path, train_images: int, val_images: int, told: str) -> None:
    root = easy_folder(tmp_path / "data", train_images, val_images, side=8)
    with pytest.raises(DataError, match=f"the {told} split is empty; name its images in split.csv"):
        fit(tmp_path / "out", root)
    assert not (tmp_path / "out").exists()


def test_all_bad_labels_are_told_before_training(
    fit: Fit, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = shutil.copytree(folder, tmp_path / "data")
    write_png(root / "labels" / "train1.png", np.full((24, 24, 3), 9, np.uint8))
    write_png(root / "labels" / "val0.png", np.zeros((24, 25, 3), np.uint8))
    monkeypatch.setattr(loop._Run, "_step", fail)
    with pytest.raises(DataError) as caught:
        fit(tmp_path / "out", root)
    assert "2 problem(s)" in str(caught.value)
    assert "train1.png: 576 of 576 label pixels are off the palette" in str(caught.value)
    assert "val0.png: label is 25x24 but its image is 24x24" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_cannot_be_written(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop._Run, "_step", fail)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(PlanError, match="cannot be written"):
        fit(tmp_path / "file")


class Compiled:
    """What torch.compile returns here: the module itself, its calls counted."""

    def __init__(self, module: torch.nn.Module):
        self.module, self.batches = module, []

    def __call__(self, rgb: torch.Tensor) -> torch.Tensor:
        self.batches.append((len(rgb), self.module.training))
        return self.module(rgb)


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_compiled_training(fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    made: list[Compiled] = []
    monkeypatch.setattr(torch, "compile", lambda module: made.append(Compiled(module)) or made[-1])
    lines: list[str] = []
    fit(tmp_path / "on", compile=wanted, lines=lines)
    assert "torch.compile: on" in lines
    (compiled,) = made
    assert compiled.batches[0][0] == 2  # tried at the size of the batches to come
    assert len(compiled.batches) == 1 + 2 * 6 and all(training for _, training in compiled.batches)
    fit(tmp_path / "off")
    ours, theirs = (read_checkpoint(tmp_path / run / LAST)[0] for run in ("on", "off"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_trial_of_torch_compile_leaves_no_trace(folder: Path, tmp_path: Path, monkeypatch) -> None:
    """A batch of zeros goes through the network in training: its running statistics must not see it."""
    from dataclasses import replace

    monkeypatch.setattr(torch, "compile", Compiled)
    root, options = easy_folder(tmp_path / "data", side=64), replace(OPTIONS, arch="fast", crop=64, epochs=1)
    for compile_ in ("on", "off"):
        train(root, tmp_path / compile_, replace(options, compile=compile_), lambda line: None)
    ours, theirs = (read_checkpoint(tmp_path / run / LAST)[0] for run in ("on", "off"))
    assert any(name.endswith("running_mean") for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("error", "reason"),
    [(RuntimeError("no compiler\n  found in PATH"), "no compiler"), (AssertionError(), "AssertionError")],
)
@pytest.mark.parametrize("where", ["compile", "first call"])
def test_compile_that_does_not_work(
    fit: Fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, where: str
) -> None:
    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", broken if where == "compile" else lambda module: broken)
    lines: list[str] = []
    fit(tmp_path / "auto", compile="auto", epochs=1, lines=lines)
    assert f"torch.compile does not work here ({reason}); going on without" in lines
    assert (tmp_path / "auto" / BEST).exists()
    with pytest.raises(EngineError) as caught:
        fit(tmp_path / "on", compile="on")
    assert str(caught.value) == f"torch.compile does not work here ({reason}); --no-compile"
