"""`histoseg-fast experiments`: the paper's four networks under one protocol, and its tables."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from histoseg_fast.cli import training
from histoseg_fast.cli.checks import parse_palette

NAME = "experiments"


def command(
    data: Path = typer.Argument(..., metavar="DATA", help="Folder with images/, labels/ and split.csv."),
    out: Path = typer.Option(..., help="Folder for tables.md, experiments.json, curves.png and a folder a network."),
    epochs: training.Epochs = 40,
    batch: training.Batch = 4,
    lr: training.Rate = 1e-4,
    decay: training.Decay = 0.96,
    crop: training.Crop = 224,
    weights: str = typer.Option("imagenet", help="VGG16's: imagenet (downloaded), none, or a local file."),
    palette: training.Palette = "",
    tolerance: training.Tolerance = 0.0,
    noise: training.Noise = 0.0,
    patience: training.Patience = 0,
    seed: training.Seed = 0,
) -> int:
    """Train all four networks and write the paper's tables 1 and 2 beside the paper's own figures.

    Run again with the same --out to resume; what is complete is kept.
    """
    from histoseg_fast.extras import need

    need("train", "torch", "torchvision", "onnx", "onnxscript", "safetensors", "matplotlib", "tensorboard")
    from histoseg_fast.labels import PAPER_PALETTE
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
        palette=parse_palette("--palette", palette) if palette else PAPER_PALETTE,
        tolerance=tolerance,
        augmentation=Augmentation(noise),
    )
    try:
        run_experiments(data, out, options, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on after the last whole epoch", file=sys.stderr)
        return 130
    return 0
