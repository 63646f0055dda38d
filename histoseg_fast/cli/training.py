"""Options that `train` and `experiments` share."""

from __future__ import annotations

from typing import Annotated

import typer

Epochs = Annotated[int, typer.Option(min=1, help="Epochs of a network in all; a resumed run goes on up to it.")]
Batch = Annotated[int, typer.Option(min=1, help="Crops a step.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Adam's learning rate in the first epoch.")]
Decay = Annotated[float, typer.Option(min=0.0, max=1.0, help="The rate is multiplied by this each epoch.")]
Crop = Annotated[int, typer.Option(min=16, help="Side of the random crops, in pixels.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Same seed, same machine: same result.")]
Patience = Annotated[int, typer.Option(min=0, help="Stop after this many epochs without improvement (0: never).")]
Palette = Annotated[
    str, typer.Option(help='Classes and label colours: "background=0,0,0;tumour=255,0,0;..." (the paper\'s).')
]
Tolerance = Annotated[
    float, typer.Option(min=0.0, help="How far label colours may be from the palette (RGB distance).")
]
Noise = Annotated[float, typer.Option(min=0.0, help="Gaussian noise: standard deviation up to this many grey levels.")]
