"""The training loop: epochs of crops, validation on whole images, best and last checkpoints, exact resume."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from histoseg_fast.data import check_pairs, find_pairs, load_pair
from histoseg_fast.errors import DataError, EngineError, PlanError, UsageError
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.labels import PAPER_PALETTE, UNMATCHED
from histoseg_fast.models.architectures import IMAGENET_MEAN, IMAGENET_STD
from histoseg_fast.models.network import SegmentationNetwork, UInt8Network, load_features
from histoseg_fast.tiling import pad_to_stride
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.checkpoint import read_checkpoint, write_checkpoint, write_whole
from histoseg_fast.training.crops import CropDataset

BEST, LAST, HISTORY = "best.safetensors", "last.safetensors", "history.jsonl"


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the paper's (section 5): Adam 1e-4, batch 4, the rate times 0.96 an epoch.

    average : decay a step of the exponential moving average of the weights that is validated and kept (0: none).
    precision : "bf16" runs the convolutions under autocast; "auto" takes it where the device is fast at it.
    compile : torch.compile the network; "auto" tries and says so when it does not work.
    """

    arch: str = "final"
    epochs: int = 40
    batch: int = 4
    lr: float = 1e-4
    decay: float = 0.96
    crop: int = 224
    weights: str = "imagenet"
    seed: int = 0
    average: float = 0.0
    precision: str = "auto"
    compile: str = "auto"
    tolerance: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)


def train(root: str | Path, out: str | Path, options: TrainingOptions, report: Callable[[str], None]) -> dict[str, Any]:
    """Train on DATA's train split, validate on val after each epoch; return the best epoch's record.

    Writes OUT/best.safetensors (lowest validation cross entropy), OUT/last.safetensors (all that resuming
    needs) and OUT/history.jsonl. Where OUT holds an unfinished run of the same options it goes on from the
    last whole epoch, to the same result as without the interruption. `report` gets one line an event.
    Raises DataError (all problems of the data at once, before anything else), UsageError, EngineError (loss not
    finite: the epoch and the batch's images), PlanError (a file in OUT cannot be read or written).
    """
    run = _Run(Path(root), Path(out), options, report)
    while run.epoch < options.epochs:
        run.one_epoch()
    report(f"best: {describe(run.best)}; {run.out / BEST}")
    return run.best


def describe(record: dict[str, Any]) -> str:
    """One line of an epoch's record."""
    val = record["val"]
    return (
        f"epoch {record['epoch']}: train loss {record['train_loss']:.4f}, "
        f"val cross entropy {val['cross_entropy']:.4f}, "
        f"accuracy {val['pixel_accuracy']:.4f}, mIoU {val['mean_iou']:.4f}"
    )


class _Run:
    """The state of one training: network, optimiser, data, and what has been reached."""

    def __init__(self, root: Path, out: Path, options: TrainingOptions, report: Callable[[str], None]):
        self.out, self.options, self.report = out, options, report
        torch.manual_seed(options.seed)
        self.network = SegmentationNetwork(options.arch, len(PAPER_PALETTE.names))
        if options.crop % self.network.stride:
            raise UsageError(f"--crop {options.crop} is no multiple of the network's stride {self.network.stride}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = _autocast_dtype(options.precision, self.device)
        pairs = find_pairs(root)
        self.val = [p for p in pairs if p.split == "val"]
        train_pairs = [p for p in pairs if p.split == "train"]
        for split, members in (("train", train_pairs), ("val", self.val)):
            if not members:
                raise DataError(f"the {split} split is empty", where=root, fix="name its images in split.csv")
        check_pairs(root, [*train_pairs, *self.val], tolerance=options.tolerance)
        self.data = CropDataset(train_pairs, options.crop, options.augmentation, options.seed, options.tolerance)
        self.steps = 0
        self.epoch = 0
        self.best: dict[str, Any] = {"val": {"cross_entropy": float("inf")}}
        self.sources = {"images": len(train_pairs), "folder": root.resolve().name}
        if (out / LAST).exists():
            self._prepare()
            self._resume()
        else:
            layers = load_features(self.network, options.weights)
            report(f"features: {', '.join(layers) or 'none'} from {options.weights}" if layers else "features: random")
            self._prepare()
            write_whole(out / HISTORY, b"")  # a folder that cannot be written is told before the first epoch
        self.step_function = self._compiled()

    def _prepare(self) -> None:
        self.network.to(self.device, memory_format=torch.channels_last)
        self.model = UInt8Network(self.network).to(self.device)
        self.optimiser = torch.optim.Adam(self.network.parameters(), lr=self.options.lr)
        self.average = {n: p.detach().clone() for n, p in self.network.state_dict().items()}

    def _compiled(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The forward pass, compiled where that works here; one line says which."""
        if self.options.compile == "off":
            return self.model
        try:
            compiled = torch.compile(self.model)
            batch, side = self.options.batch, self.options.crop
            with self._autocast():
                compiled(torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=self.device)).sum().backward()
        except Exception as error:  # whatever a missing compiler or backend raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self.options.compile == "on":
                raise EngineError(f"torch.compile does not work here ({reason})", fix="--no-compile") from error
            self.report(f"torch.compile does not work here ({reason}); going on without")
            return self.model
        finally:
            self.optimiser.zero_grad(set_to_none=True)
        self.report("torch.compile: on")
        return compiled

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def one_epoch(self) -> None:
        """Train one epoch, validate, and save; the state on disk is that of whole epochs only."""
        started = time.perf_counter()
        options = self.options
        torch.manual_seed(options.seed * 1_000_003 + self.epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = options.lr * options.decay**self.epoch
        losses = []
        for items, rgb, ids in self._batches():
            losses.append(self._step(rgb, ids))
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
            write_checkpoint(self.out / BEST, self.average, self._description(record))
        self._save_state(record)
        self.report(describe(record) + f" ({seconds:.0f} s)" + (" *" if better else ""))

    def _diverged(self, what: str) -> NoReturn:
        kept = f"{self.out / LAST} holds epoch {self.epoch}" if self.epoch else "nothing was saved yet"
        raise EngineError(f"epoch {self.epoch + 1}: {what}; {kept}", fix="lower --lr, or look at the images")

    def _batches(self) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Items (indices into the data), RGB and ids of each batch of this epoch."""
        self.data.epoch = self.epoch
        order = np.random.default_rng((self.options.seed, self.epoch)).permutation(len(self.data)).tolist()
        size = self.options.batch
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        for items, (rgb, ids) in zip(batches, DataLoader(self.data, batch_sampler=batches), strict=True):
            yield items, rgb.to(self.device), ids.to(self.device)

    def _step(self, rgb: torch.Tensor, ids: torch.Tensor) -> float:
        self.model.train()
        with self._autocast():
            logits = self.step_function(rgb)
        loss = F.cross_entropy(logits, ids, ignore_index=UNMATCHED)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self._update_average()
        return loss.item()

    def _update_average(self) -> None:
        """Moving average of the weights; its memory grows from nothing, so that it never holds on to the start."""
        self.steps += 1
        keep = min(self.options.average, self.steps / (self.steps + 10))
        state = self.network.state_dict()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(state.values()), 1 - keep)

    def validate(self) -> dict[str, Any]:
        """Scores of the averaged weights on the whole validation images, in fp32 logits."""
        current = {n: t.clone() for n, t in self.network.state_dict().items()}
        self.network.load_state_dict(self.average)
        scores = Scores(PAPER_PALETTE.names)
        with torch.inference_mode(), self._autocast():
            for pair in self.val:
                rgb, ids = load_pair(pair, tolerance=self.options.tolerance)
                padded = torch.from_numpy(pad_to_stride(rgb, self.network.stride))
                logits = self.model.eval()(padded[None].to(self.device))
                scores.add(logits[0, :, : ids.shape[0], : ids.shape[1]].float().cpu().numpy(), ids)
        self.network.load_state_dict(current)
        return scores.as_json()

    def _description(self, record: dict[str, Any]) -> dict[str, Any]:
        return {
            "arch": self.options.arch,
            "classes": list(PAPER_PALETTE.names),
            "colours": [list(c) for c in PAPER_PALETTE.colours],
            "normalisation": {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)},
            "training": {"options": asdict(self.options), "data": self.sources, "torch": torch.__version__},
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
        # Last of all: an interruption before it repeats the epoch, and no file misses anything.
        write_checkpoint(self.out / LAST, tensors, description)

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
        theirs, ours = training["options"], json.loads(json.dumps(asdict(self.options)))
        changed = [k for k in ours if k != "epochs" and ours[k] != theirs.get(k)]
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


def _autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"unknown precision {precision!r}", fix="choose auto, fp32 or bf16")
    if precision == "fp32":
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(False)
    else:
        fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if precision == "bf16" and not fast:
        raise EngineError("this machine has no fast bf16", fix="--precision fp32")
    return torch.bfloat16 if fast else torch.float32
