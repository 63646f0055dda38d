"""What a person watches a training by: curves as a PNG, and TensorBoard logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from histoseg_fast.errors import PlanError

CURVES, TENSORBOARD = "curves.png", "tensorboard"


def draw(out: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw OUT/curves.png from the whole history; log its last epoch to OUT/tensorboard. PlanError on a full disk."""
    from torch.utils.tensorboard import SummaryWriter

    from histoseg_fast.evaluation.figures import save_curves

    try:
        save_curves(out / CURVES, {out.name: history})
        record = history[-1]
        with SummaryWriter(str(out / TENSORBOARD), purge_step=record["epoch"]) as writer:
            writer.add_scalar("loss/train", record["train_loss"], record["epoch"])
            for name in ("cross_entropy", "pixel_accuracy", "mean_iou"):
                writer.add_scalar(f"val/{name}", record["val"][name], record["epoch"])
            for name, value in record["val"]["iou"].items():
                if value is not None:
                    writer.add_scalar(f"val_iou/{name}", value, record["epoch"])
    except OSError as error:
        raise PlanError(
            f"cannot be written: {error.strerror or error}", where=out, fix="free space, run again"
        ) from error
