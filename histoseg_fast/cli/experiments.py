"""`histoseg-fast experiments`: the paper's four networks under one protocol, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

NAME = "experiments"


def command(
    data: Path = typer.Argument(..., metavar="DATA", help="Folder with images/, labels/ and split.csv."),
    out: Path = typer.Option(..., help="Folder for tables.md, experiments.json, curves.png and a folder a network."),
    epochs: int = typer.Option(40, min=1, help="Epochs of each network."),
    batch: int = typer.Option(4, min=1, help="Crops a step."),
    lr: float = typer.Option(1e-4, min=0.0, help="Adam's learning rate in the first epoch."),
    decay: float = typer.Option(0.96, min=0.0, max=1.0, help="The rate is multiplied by this each epoch."),
    crop: int = typer.Option(224, min=16, help="Side of the random crops, in pixels."),
    weights: str = typer.Option("imagenet", help="VGG16's: imagenet (downloaded), none, or a local file."),
    noise: float = typer.Option(0.0, min=0.0, help="Gaussian noise: standard deviation up to this many grey levels."),
    patience: int = typer.Option(0, min=0, help="Stop after this many epochs without improvement (0: never)."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, help="Same seed, same machine: same result."),
) -> int:
    """Train all four networks and write the paper's tables 1 and 2 beside the paper's own figures.

    Run again with the same --out to resume; what is complete is kept.
    """
    from histoseg_fast.extras import need

    need("train", "torch", "torchvision", "onnx", "onnxscript", "safetensors", "matplotlib", "tensorboard")
    from histoseg_fast.training.augment import Augmentation
    from histoseg_fast.training.experiments import run_experiments
    from histoseg_fast.training.options import TrainingOptions

    options = TrainingOptions(
        epochs=epochs,
        batch=batch,
        lr=lr,
        decay=decay,
        crop=crop,
        weights=weights,
        seed=seed,
        patience=patience,
        augmentation=Augmentation(noise),
    )
    try:
        run_experiments(data, out, options, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on after the last whole epoch", file=sys.stderr)
        return 130
    return 0
