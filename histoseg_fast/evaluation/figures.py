"""Pictures of results: image | label | prediction | errors (the paper's figures 1 and 7 to 9), and training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from histoseg_fast.files import atomic_write
from histoseg_fast.labels import Palette, encode

PANEL_INCHES = 4.0
ERROR_FADE = 0.75
"""How far the image is faded to white under the error map."""


def error_map(rgb: np.ndarray, labels: np.ndarray, predicted: np.ndarray, palette: Palette) -> np.ndarray:
    """The image faded, wrong pixels in the colour of the class they were taken for (background: blue).

    rgb uint8 (H, W, 3), labels and predicted uint8 (H, W); pixels without a label (255) are never wrong.
    """
    faded = (rgb * (1 - ERROR_FADE) + 255 * ERROR_FADE).astype(np.uint8)
    colours = palette.array.copy()
    colours[0] = (0, 0, 255)
    wrong = (labels < len(palette.names)) & (labels != predicted)
    faded[wrong] = colours[predicted[wrong]]
    return faded


def save_figure(
    path: str | Path,
    rgb: np.ndarray,
    predicted: np.ndarray,
    palette: Palette,
    labels: np.ndarray | None = None,
    title: str = "",
) -> None:
    """Write a PNG with the panels image, label, prediction, errors (image and prediction where there is no label).

    rgb uint8 (H, W, 3), predicted and labels uint8 (H, W). Raises OSError.
    """
    panels = [("image", rgb), ("prediction", encode(predicted, palette))]
    if labels is not None:
        known = np.where(labels < len(palette.names), labels, 0).astype(np.uint8)
        panels.insert(1, ("label", encode(known, palette)))
        panels.append(("errors, by the class taken for", error_map(rgb, labels, predicted, palette)))
    height = PANEL_INCHES * rgb.shape[0] / rgb.shape[1]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(PANEL_INCHES * len(panels), height + 0.9), layout="constrained"
    )
    for axis, (name, picture) in zip(axes, panels, strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.axis("off")
    handles = [
        Patch(facecolor=(c[0] / 255, c[1] / 255, c[2] / 255), edgecolor="grey", label=n)
        for n, c in zip(palette.names, palette.colours, strict=True)
    ]
    if labels is not None:
        handles.append(Patch(facecolor="blue", label=f"taken for {palette.names[0]}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    _save(figure, path)


def save_curves(path: str | Path, histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a PNG with the loss (train dashed, validation solid) and the validation mIoU of each run by epoch.

    `histories` maps a run's name to the records of its history.jsonl. Raises OSError.
    """
    figure, (loss, iou) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, history in histories.items():
        epochs = [record["epoch"] for record in history]
        (line,) = loss.plot(epochs, [r["val"]["cross_entropy"] for r in history], label=name)
        loss.plot(epochs, [r["train_loss"] for r in history], linestyle="--", color=line.get_color())
        iou.plot(epochs, [r["val"]["mean_iou"] for r in history], label=name)
    loss.set(xlabel="epoch", ylabel="loss (dashed: train, solid: validation cross entropy)")
    iou.set(xlabel="epoch", ylabel="validation mIoU")
    for axis in (loss, iou):
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in (loss, iou):
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    try:
        with atomic_write(path) as stream:
            figure.savefig(stream, format="png", dpi=110, metadata={"Software": None})
    finally:
        plt.close(figure)
