"""The training loop: epochs of crops, validation on whole images, best and last checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader

from histoseg_fast.compiling.compile import load_network
from histoseg_fast.compiling.export import export_onnx
from histoseg_fast.compiling.halo import measure
from histoseg_fast.data import Pair, check_pairs, find_pairs, load_pair
from histoseg_fast.engines import over_tiles
from histoseg_fast.errors import DataError, EngineError, PlanError, UsageError
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.machine import available_cores
from histoseg_fast.models.architectures import IMAGENET_MEAN, IMAGENET_STD
from histoseg_fast.models.network import Loaded, UInt8Network, is_plan, load_features, make_network, rebuild
from histoseg_fast.models.norms import freeze_norms, settle_norms, take_statistics
from histoseg_fast.plan import MAX_TILE
from histoseg_fast.plans import open_plan
from histoseg_fast.training.checkpoint import read_checkpoint, write_checkpoint, write_whole
from histoseg_fast.training.crops import CropDataset
from histoseg_fast.training.options import TrainingOptions
from histoseg_fast.training.parallel import Processes
from histoseg_fast.training.progress import draw

MAX_WORKERS = 8
MAX_NAMED_LAYERS = 8
"""A report names the layers that were loaded up to so many; a whole checkpoint has more."""
VALIDATED_WHOLE = 1 << 22
"""Validation images of more pixels are validated in tiles: memory stays bounded."""
VALIDATION_TILE = 1536
SETTLING_CROPS = 32
"""Crops whose statistics the batch norms behind trained layers start from."""
BEST, LAST, HISTORY = "best.safetensors", "last.safetensors", "history.jsonl"


def train(root: str | Path, out: str | Path, options: TrainingOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Train on DATA's train split, validate on val after each epoch; return the best epoch's record.

    Writes OUT/best.safetensors (lowest validation cross entropy), OUT/last.safetensors (all that resuming
    needs) and OUT/history.jsonl. Where OUT holds an unfinished run of the same options it goes on from the
    last whole epoch, to the same result as without the interruption. `report` gets one line an event.
    Raises DataError (all problems of the data at once, before anything else), UsageError, EngineError (loss not
    finite: the epoch and the batch's images), PlanError (a file in OUT cannot be read or written).
    """
    processes = Processes()
    run = _Run(Path(root), Path(out), options, report if processes.first else lambda line: None, processes)
    while run.epoch < options.epochs and not run.stalled:
        run.one_epoch()
    if run.stalled:
        run.report(f"stopped: no better validation cross entropy for {options.patience} epochs")
    run.report(f"best: {describe(run.best)}; {run.out / BEST}")
    return run.best


def describe(record: dict[str, Any]) -> str:
    """One line of an epoch's record."""
    val = record["val"]
    return (
        f"epoch {record['epoch']}: train loss {record['train_loss']:.4f}, "
        f"val cross entropy {val['cross_entropy']:.4f}, "
        f"accuracy {val['pixel_accuracy']:.4f}, mIoU {val['mean_iou']:.4f}"
    )


def find_splits(root: Path, options: TrainingOptions) -> tuple[list[Pair], list[Pair]]:
    """Training pairs (of DATA and the extra folders) and validation pairs (of DATA), every one decoded and checked.

    Raises DataError, all problems of a folder at once.
    """
    pairs = find_pairs(root)
    validation = [pair for pair in pairs if pair.split == "val"]
    training = [pair for pair in pairs if pair.split == "train"]
    for split, members in (("train", training), ("val", validation)):
        if not members:
            raise DataError(f"the {split} split is empty", where=root, fix="name its images in split.csv")
    check_pairs(root, pairs, options.palette, options.tolerance)
    for folder, scale in options.extra:
        more = [replace(pair, scale=scale) for pair in find_pairs(folder) if pair.split == "train"]
        check_pairs(Path(folder), more, options.palette, options.tolerance)
        training += more
    return training, validation


class _Run:
    """The state of one training: network, optimiser, data, and what has been reached."""

    def __init__(
        self, root: Path, out: Path, options: TrainingOptions, report: Callable[[str], None], processes: Processes
    ):
        self.out, self.options, self.report, self.processes = out, options, report, processes
        torch.manual_seed(options.seed)
        self.network = make_network(options.arch, len(options.palette.names), options.dropout, options.batch_norm)
        options.check(self.network.stride)
        self.device = processes.device
        self.dtype, self.loss = options.autocast_dtype(self.device), options.make_loss()
        self.teacher = self._load_teacher() if options.teacher else None
        train_pairs, self.val = find_splits(root, options)
        self.data = CropDataset(
            train_pairs, options.crop, options.augmentation, options.seed, options.palette, options.tolerance
        )
        self.steps = 0
        self.epoch = 0
        self.best: dict[str, Any] = {"val": {"cross_entropy": float("inf")}}
        self.sources = {"images": len(train_pairs), "folder": root.resolve().name}
        if (out / LAST).exists():
            self._prepare()
            self._resume()
        else:
            loaded = load_features(self.network, options.weights)
            layers = [name.removeprefix("features.") for name in loaded.layers]
            what = ", ".join(layers) if len(layers) <= MAX_NAMED_LAYERS else f"{len(layers)} layers"
            self.report(f"weights of {what} from {options.weights}" if layers else "weights: random")
            if loaded.unsettled:
                self._settle(loaded)
            self._prepare()
            if processes.first:
                write_whole(out / HISTORY, b"")  # a folder that cannot be written is told before the first epoch
        processes.wait()
        self.step_function = self._compiled()

    def _prepare(self) -> None:
        self.network.to(memory_format=torch.channels_last).to(self.device)
        self.model = UInt8Network(self.network).to(self.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.options.lr, weight_decay=self.options.l2)
        self.average = {n: p.detach().clone() for n, p in self.network.state_dict().items()}

    def _settle(self, loaded: Loaded) -> None:
        """Batch norms behind layers that were trained without them start as what these layers give on some crops."""
        items = np.random.default_rng(self.options.seed).permutation(len(self.data))[:SETTLING_CROPS]
        rgb = torch.stack([self.data[int(item)][0] for item in items])
        settle_norms(self.network, loaded.layers, loaded.biases, UInt8Network(self.network).normalise(rgb))

    def _load_teacher(self) -> UInt8Network:
        if is_plan(self.options.teacher):
            plan = open_plan(self.options.teacher)
            network, classes = rebuild(plan).network, plan.palette.names
        else:
            network, description = load_network(self.options.teacher)
            classes = tuple(description["classes"])
        if classes != self.options.palette.names:
            raise PlanError("has other classes than the training", where=self.options.teacher)
        if self.options.crop % network.stride:
            raise UsageError(f"--crop {self.options.crop} is no multiple of the teacher's stride {network.stride}")
        return UInt8Network(network).eval().to(memory_format=torch.channels_last).to(self.device)

    def _compiled(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass, compiled where that works here; one line says which."""
        if self.options.compile == "off":
            return self.model
        statistics = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        try:
            compiled = torch.compile(self.model)
            batch, side = -(-self.options.batch // self.processes.count), self.options.crop
            with self._autocast():
                compiled(torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=self.device)).sum().backward()
        except Exception as error:  # whatever a missing compiler or backend raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.options.compile == "on":
                raise EngineError(f"torch.compile does not work here ({reason})", fix="--no-compile") from error
            self.report(f"torch.compile does not work here ({reason}); going on without")
            return self.model
        finally:  # the trial leaves no trace
            self.optimiser.zero_grad(set_to_none=True)
            self.network.load_state_dict(statistics, strict=False)
        self.report("torch.compile: on")
        return compiled

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def one_epoch(self) -> None:
        """Train one epoch, validate, and save; the state on disk is that of whole epochs only."""
        started = time.perf_counter()
        options = self.options
        torch.manual_seed((options.seed * 1_000_003 + self.epoch) * self.processes.count + self.processes.rank)
        for group in self.optimiser.param_groups:
            group["lr"] = options.lr * options.decay**self.epoch
        if self.epoch + 1 == options.freeze_norms and self.steps:
            take_statistics(self.network, self.average)
        losses = []
        for items, (rgb, ids) in self._batches():
            losses.append(self._step(rgb, ids, len(self.processes.share(items)) / len(items)))
            if not math.isfinite(losses[-1]):
                names = ", ".join(sorted({self.data.name(item) for item in items}))
                self._diverged(f"the loss of a batch is {losses[-1]} (crops of {names})")
        val = self.validate()
        if val["cross_entropy"] is None:
            self._diverged("the validation cross entropy is not finite")
        seconds = time.perf_counter() - started
        record = {
            "epoch": self.epoch + 1,
            "train_loss": round(float(np.mean(losses)), 6),
            "val": val,
            "seconds": round(seconds, 2),
            "crops_per_second": round(len(self.data) / seconds, 3),
        }
        self.epoch += 1
        better = val["cross_entropy"] < self.best["val"]["cross_entropy"]
        if better:
            self.best = record
        if self.processes.first:
            if better:
                write_checkpoint(self.out / BEST, self.average, self._description(record))
            self._save_state(record)
        self.processes.wait()
        self.report(describe(record) + f" ({seconds:.0f} s)" + (" *" if better else ""))

    @property
    def stalled(self) -> bool:
        """Whether the best epoch is longer ago than the patience lasts."""
        return bool(self.options.patience) and self.epoch - self.best.get("epoch", 0) >= self.options.patience

    def _diverged(self, what: str) -> NoReturn:
        kept = f"{self.out / LAST} holds epoch {self.epoch}" if self.epoch else "nothing was saved yet"
        raise EngineError(f"epoch {self.epoch + 1}: {what}; {kept}", fix="lower --lr, or look at the images")

    def _batches(self) -> Iterator[tuple[list[int], tuple[torch.Tensor, torch.Tensor]]]:
        """Of each batch of this epoch: its items (indices into the data), and this process's share as RGB and ids."""
        self.data.epoch = self.epoch
        order = np.random.default_rng((self.options.seed, self.epoch)).permutation(len(self.data)).tolist()
        size = self.options.batch
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        shares = [self.processes.share(batch) for batch in batches]
        # On a CPU the convolutions want every core; a GPU would wait for decoding and augmentation.
        workers = min(MAX_WORKERS, available_cores() - 1) if self.device.type == "cuda" else 0
        loader = iter(DataLoader(self.data, batch_sampler=[share for share in shares if share], num_workers=workers))
        side = self.options.crop
        nothing = (torch.empty(0, side, side, 3, dtype=torch.uint8), torch.empty(0, side, side, dtype=torch.int64))
        for items, share in zip(batches, shares, strict=True):
            rgb, ids = next(loader) if share else nothing
            yield items, (rgb.to(self.device), ids.to(self.device))

    def _step(self, rgb: torch.Tensor, ids: torch.Tensor, share: float = 1.0) -> float:
        """One step on a batch of which this process has `share`; the loss of the whole batch."""
        self.model.train()
        if 0 < self.options.freeze_norms <= self.epoch + 1:
            freeze_norms(self.network)
        self.optimiser.zero_grad(set_to_none=True)
        value = 0.0
        if share:
            with self._autocast():
                logits = self.step_function(rgb)
                teacher = self._teach(rgb)
            loss = self.loss(logits, ids, teacher) * share
            torch.autograd.backward(loss)
            value = loss.item()
        self.processes.sum_gradients(self.network.parameters())
        if self.options.clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.options.clip)
        self.optimiser.step()
        self.processes.mean_buffers(self.network)
        self._update_average()
        return float(self.processes.sum(np.array(value)))

    def _teach(self, rgb: torch.Tensor) -> torch.Tensor | None:
        """The teacher's logits, where there is one, of the batch mirrored at random and, with turns, turned.

        Over many batches the network learns the mean over these views, which is better than any one of them.
        """
        if self.teacher is None:
            return None
        rng = np.random.default_rng((self.options.seed, self.steps))  # the same in every process
        axes = [axis for axis in (1, 2) if rng.random() < 0.5]
        quarter = int(rng.integers(2)) if self.options.augmentation.turns else 0
        with torch.no_grad():
            logits: torch.Tensor = self.teacher(rgb.flip(axes).rot90(quarter, (1, 2)).contiguous())
        return logits.rot90(-quarter, (2, 3)).flip([axis + 1 for axis in axes])

    def _update_average(self) -> None:
        """Moving average of the weights; its memory grows from nothing, so that it never holds on to the start."""
        self.steps += 1
        keep = min(self.options.average, self.steps / (self.steps + 10))
        state = self.network.state_dict()
        real = [name for name, tensor in self.average.items() if tensor.is_floating_point()]
        with torch.no_grad():
            torch._foreach_lerp_([self.average[n] for n in real], [state[n] for n in real], 1 - keep)

    def validate(self) -> dict[str, Any]:
        """Scores of the averaged weights on the validation images, all of each, in the precision of the training."""
        current = {n: t.clone() for n, t in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        scores = Scores(self.options.palette)
        with torch.inference_mode(), self._autocast():
            for pair in self.processes.share(self.val):
                rgb, ids = load_pair(pair, self.options.palette, self.options.tolerance)
                scores.add(self._logits(rgb), ids)
        self.network.load_state_dict(current)
        scores.join(lambda rows: self.processes.gather(rows, len(self.val)))
        return scores.as_json()

    def _logits(self, rgb: np.ndarray) -> np.ndarray:
        """Logits float32 (C, H, W) of a whole image; a large one goes through the network in tiles, to the same end."""

        def run(tile: np.ndarray) -> np.ndarray:
            logits: torch.Tensor = self.model.eval()(torch.tensor(tile)[None].to(self.device))[0]
            result: np.ndarray = logits.float().cpu().numpy()
            return result

        whole = rgb.shape[0] * rgb.shape[1] <= VALIDATED_WHOLE
        tile, halo = (MAX_TILE, 0) if whole else (VALIDATION_TILE, self._halo)
        return over_tiles(run, rgb, len(self.options.palette.names), tile, halo, self.network.stride)

    @cached_property
    def _halo(self) -> int:
        """Of the network's tiles, in pixels; found from its graph, which takes seconds."""
        return measure(export_onnx(make_network(self.options.arch).fold())).halo

    def _description(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            "arch": self.options.arch,
            "classes": list(self.options.palette.names),
            "colours": [list(c) for c in self.options.palette.colours],
            "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
            "training": {"options": self.options.as_json(), "data": self.sources, "torch": torch.__version__},
            "scores": {"val": record["val"], "epoch": record["epoch"]},
        }

    def _save_state(self, record: dict[str, Any]) -> None:
        tensors = {f"network.{n}": t for n, t in self.network.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.items()}
        names = [n for n, _ in self.network.named_parameters()]
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{names[i]}.{key}": value for key, value in moments.items()}
        description = self._description(record) | {"epoch": self.epoch, "steps": self.steps, "best": self.best}
        history = (self.out / HISTORY).read_text().splitlines() if (self.out / HISTORY).exists() else []
        lines = [*history[: self.epoch - 1], json.dumps(record)]
        write_whole(self.out / HISTORY, ("\n".join(lines) + "\n").encode())
        # After the others: an interruption before it repeats the epoch, and no file misses anything.
        write_checkpoint(self.out / LAST, tensors, description)
        draw(self.out, [json.loads(line) for line in lines])

    def _resume(self) -> None:
        tensors, description = read_checkpoint(self.out / LAST)
        try:
            self._check_same_run(description["training"])
            self.epoch, self.steps, self.best = description["epoch"], description["steps"], description["best"]
            self._restore(tensors)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise PlanError("is no state to resume from", where=self.out / LAST, fix="choose another --out") from error
        self.report(f"resuming after epoch {self.epoch} of {self.out / LAST}")

    def _check_same_run(self, training: dict[str, Any]) -> None:
        ours = self.options.as_json()
        theirs = TrainingOptions().as_json() | training["options"]  # an option that is newer than the run was not used
        changed = [k for k in ours if k != "epochs" and ours[k] != theirs[k]]
        if training["data"] != self.sources:
            changed.append("data")
        if changed:
            raise UsageError(
                f"holds a run with other options ({', '.join(changed)})", where=self.out, fix="choose another --out"
            )

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the saved tensors into memory of the layout they had: another layout may round differently."""
        self.network.load_state_dict({n: tensors[f"network.{n}"] for n in self.average})
        for name, tensor in self.average.items():
            tensor.copy_(tensors[f"average.{name}"])
        state = self.optimiser.state_dict()
        for i, (name, parameter) in enumerate(self.network.named_parameters()):
            moments = {key: torch.empty_like(parameter).detach() for key in ("exp_avg", "exp_avg_sq")}
            for key, tensor in moments.items():
                tensor.copy_(tensors[f"adam.{name}.{key}"])
            state["state"][i] = {"step": tensors[f"adam.{name}.step"], **moments}
        self.optimiser.load_state_dict(state)
