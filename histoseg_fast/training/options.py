"""How a training goes: everything that the command line can say, with the paper's values as defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.labels import PAPER_PALETTE, Palette
from histoseg_fast.models.architectures import PAPER_ARCHITECTURES
from histoseg_fast.training.augment import Augmentation
from histoseg_fast.training.losses import Loss

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The defaults are the paper's (section 5): Adam 1e-4, batch 4, the rate times 0.96 an epoch.

    loss : weight of each term (see `losses.TERMS`). class_weights, label_smoothing : of the cross entropy.
    l2 : weight decay (L2 penalty on the weights). dropout : share of channels dropped before the last layer.
    average : decay a step of the exponential moving average of the weights that is validated and kept (0: none).
    patience : stop after this many epochs without a better validation cross entropy (0: never).
    clip : the gradient's norm is scaled down to this (0: never).
    extra : more data folders whose train splits are trained on, each with the scale its images are resized by.
    batch_norm : train the paper's networks with batch norms, which compiling folds away.
    freeze_norms : from this epoch on batch norms keep the averaged statistics they have, in training as in evaluation,
        so that nothing is learned from what else is in a batch (0: never).
    teacher : checkpoint or plan of the network whose logits the loss term "distil" compares with ("": none).
    palette : classes and the colours they have in label images.
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
    loss: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0
    average: float = 0.0
    batch_norm: bool = False
    freeze_norms: int = 0
    patience: int = 0
    clip: float = 0.0
    extra: tuple[tuple[str, float], ...] = ()
    teacher: str = ""
    palette: Palette = PAPER_PALETTE
    precision: str = "auto"
    compile: str = "auto"
    tolerance: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def check(self, stride: int) -> None:
        """Raise UsageError for values that make no sense, before any work; `stride` is the network's."""
        if self.crop % stride or self.crop < 2 * stride:
            raise UsageError(f"--crop {self.crop} is no multiple (2 or more) of the network's stride {stride}")
        if bool(self.teacher) != ("distil" in self.loss):
            fix = "give both, e.g. --teacher FILE --loss ce=0.5,distil=0.5"
            raise UsageError("--teacher and the loss term distil need each other", fix=fix)
        if "ce" not in self.loss and (self.class_weights or self.label_smoothing):
            raise UsageError("--class-weights and --label-smoothing are of the loss term ce", fix="add ce to --loss")
        if self.freeze_norms and not self.batch_norm and self.arch in PAPER_ARCHITECTURES:
            raise UsageError(f"--freeze-norms: the network {self.arch!r} has no batch norms", fix="add --batch-norm")
        if self.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {self.precision!r}", fix="choose auto, fp32 or bf16")
        if self.class_weights and len(self.class_weights) != len(self.palette.names):
            raise UsageError(f"--class-weights needs {len(self.palette.names)} numbers, not {len(self.class_weights)}")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON values for checkpoints and plans; of files and folders only the names."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        values["weights"], values["teacher"] = Path(self.weights).name, Path(self.teacher).name
        values["extra"] = [[Path(folder).name, scale] for folder, scale in self.extra]
        return values

    def make_loss(self) -> Loss:
        """The loss function."""
        return Loss(self.loss, self.palette, self.class_weights, self.label_smoothing)

    def autocast_dtype(self, device: torch.device) -> torch.dtype:
        """What the convolutions run in on `device`. Raises EngineError if bf16 is wanted and slow there."""
        if self.precision == "fp32":
            return torch.float32
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(False)
        else:
            fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if self.precision == "bf16" and not fast:
            raise EngineError("this machine has no fast bf16", fix="--precision fp32")
        return torch.bfloat16 if fast else torch.float32
