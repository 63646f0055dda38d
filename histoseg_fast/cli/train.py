"""`histoseg-fast train`: image / label pairs in, a checkpoint out."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from histoseg_fast.cli import training
from histoseg_fast.cli.checks import parse_palette
from histoseg_fast.errors import UsageError

NAME = "train"


def command(
    data: Path = typer.Argument(..., metavar="DATA", help="Folder with images/, labels/ and, if there, split.csv."),
    out: Path = typer.Option(..., help="Folder for best.safetensors, last.safetensors and history.jsonl."),
    arch: str = typer.Option("final", help="one, two, three or final (the paper's networks), or fast."),
    epochs: training.Epochs = 40,
    batch: training.Batch = 4,
    lr: training.Rate = 1e-4,
    decay: training.Decay = 0.96,
    crop: training.Crop = 224,
    weights: str = typer.Option(
        "imagenet", help="VGG16's: imagenet (downloaded), none, a local file; or a checkpoint or plan."
    ),
    seed: training.Seed = 0,
    loss: str = typer.Option("ce", help="Terms and weights, e.g. ce=1,l1=0.5,l2=0.5,smooth=0.1,dice=0.5,distil=1."),
    class_weights: str = typer.Option("", help="Of the cross entropy, one a class, e.g. 1,1.5,1."),
    label_smoothing: float = typer.Option(0.0, min=0.0, max=0.9, help="Of the cross entropy."),
    l2: float = typer.Option(0.0, min=0.0, help="L2 penalty on the weights (weight decay)."),
    dropout: float = typer.Option(0.0, min=0.0, max=0.9, help="Share of channels dropped late in the network."),
    clip: float = typer.Option(0.0, min=0.0, help="Scale the gradient's norm down to this (0: never)."),
    patience: training.Patience = 0,
    extra: list[str] = typer.Option(
        [], metavar="DIR[@SCALE]", help="Also train on this folder's train split, resized."
    ),
    teacher: str = typer.Option("", metavar="FILE", help="Checkpoint or plan to learn from (loss term distil)."),
    batch_norm: bool = typer.Option(False, "--batch-norm", help="Batch norms in training, folded when compiled."),
    freeze_norms: int = typer.Option(
        0, metavar="EPOCH", min=0, help="From this epoch on batch norms keep their statistics (0: never)."
    ),
    average: float = typer.Option(0.0, min=0.0, max=0.99999, help="Moving average of the weights: decay a step."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16 (autocast)."),
    compile_: bool = typer.Option(
        None, "--compile/--no-compile", help="torch.compile (default: where it works, and it is said where not)."
    ),
    palette: training.Palette = "",
    tolerance: training.Tolerance = 0.0,
    noise: training.Noise = 0.0,
    turns: bool = typer.Option(False, "--turns", help="Turn crops by multiples of 90 degrees."),
    scale: float = typer.Option(0.0, min=0.0, max=2.0, help="Scale crops by up to 1 + this, either way."),
    stain: float = typer.Option(0.0, min=0.0, max=1.0, help="Vary haematoxylin and eosin by up to this share."),
    colour: float = typer.Option(0.0, min=0.0, max=1.0, help="Vary brightness and contrast by up to this share."),
) -> int:
    """Train a network of the paper, or our own, on labelled images (mirrored three ways, random crops).

    Run again with the same --out to resume after an interruption, to the same result.
    """
    from histoseg_fast.extras import need
    from histoseg_fast.models.architectures import check_architecture

    check_architecture(arch)
    need("train", "torch", "torchvision", "onnx", "safetensors", "matplotlib", "tensorboard")
    from histoseg_fast.labels import PAPER_PALETTE
    from histoseg_fast.training.augment import Augmentation
    from histoseg_fast.training.loop import train
    from histoseg_fast.training.losses import parse_loss
    from histoseg_fast.training.options import TrainingOptions

    options = TrainingOptions(
        arch=arch,
        epochs=epochs,
        batch=batch,
        lr=lr,
        decay=decay,
        crop=crop,
        weights=weights,
        seed=seed,
        loss=parse_loss(loss),
        class_weights=numbers("--class-weights", class_weights),
        label_smoothing=label_smoothing,
        l2=l2,
        dropout=dropout,
        clip=clip,
        patience=patience,
        extra=tuple(map(folder_and_scale, extra)),
        teacher=teacher,
        average=average,
        batch_norm=batch_norm,
        freeze_norms=freeze_norms,
        precision=precision,
        compile={None: "auto", True: "on", False: "off"}[compile_],
        palette=parse_palette("--palette", palette) if palette else PAPER_PALETTE,
        tolerance=tolerance,
        augmentation=Augmentation(noise, turns, scale, stain, colour),
    )
    try:
        train(data, out, options, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on after the last whole epoch", file=sys.stderr)
        return 130
    return 0


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Positive numbers from "1,1.5,1". Raises UsageError."""
    try:
        values = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"{option}: {text!r} are no numbers", fix="separate them by commas") from None
    if not all(0 < value < float("inf") for value in values):
        raise UsageError(f"{option}: {text!r}: only positive numbers make sense")
    return values


def folder_and_scale(text: str) -> tuple[str, float]:
    """Folder and scale from "DIR" or "DIR@0.5". Raises UsageError."""
    folder, _, scale = text.rpartition("@")
    if not folder or Path(text).is_dir():
        return text, 1.0
    try:
        (value,) = numbers("--extra", scale)
    except ValueError:
        raise UsageError(f"--extra: {text!r} is no folder, nor a folder and a scale like DIR@0.5") from None
    return folder, value
