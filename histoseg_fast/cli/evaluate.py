"""`histoseg-fast eval`: scores on labelled images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from histoseg_fast.errors import UsageError

NAME = "eval"


def command(
    data: Path = typer.Argument(..., metavar="DATA", help="Folder with images/, labels/ and, if there, split.csv."),
    engine: str = typer.Option("final", help="A plan, a checkpoint (.safetensors), or a shipped plan's name."),
    split: str = typer.Option("", help="train, val or test (default: every image)."),
    precision: str = typer.Option("auto", help="auto, fp32 or bf16."),
    tolerance: float = typer.Option(0.0, min=0.0, help="How far a label colour may be from the palette's (RGB)."),
    json_file: Path = typer.Option(None, "--json", metavar="FILE", help="Also write the scores as JSON (-: stdout)."),
) -> None:
    """Score a plan or checkpoint: cross entropy, accuracy, IoU and Dice by class, confusion matrix."""
    from histoseg_fast.evaluation.evaluate import evaluate
    from histoseg_fast.files import atomic_write
    from histoseg_fast.plans import open_plan

    if engine.endswith(".safetensors"):
        from histoseg_fast.extras import need

        need("train", "torch", "onnx", "onnxscript", "safetensors")
        from histoseg_fast.compiling.compile import plan_of_checkpoint

        plan = plan_of_checkpoint(engine)
    else:
        plan = open_plan(engine)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)

    scores = evaluate(plan, data, split=split, precision=precision, tolerance=tolerance, progress=progress)
    text = json.dumps(scores, indent=1)
    if json_file is not None and str(json_file) == "-":
        print(text)
        return
    print(table(scores))
    if json_file is not None:
        try:
            with atomic_write(json_file) as stream:
                stream.write(text.encode() + b"\n")
        except OSError as error:
            raise UsageError(f"cannot be written ({error.strerror})", where=json_file) from error


def table(scores: dict[str, Any]) -> str:
    """The scores for a person."""
    names = list(scores["iou"])
    lines = [
        f"{scores['images']} images ({scores['split']}), {scores['pixels']:,} pixels; "
        f"{scores['plan']} on {scores['device']}, {scores['engine']}, {scores['precision']}",
        f"cross entropy  {_value(scores['cross_entropy'])}",
        f"pixel accuracy {_value(scores['pixel_accuracy'])}",
        f"mean IoU       {_value(scores['mean_iou'])}",
        "",
        f"{'class':<14}{'IoU':>8}{'Dice':>8}   true \\ predicted" + "".join(f"{name:>13}" for name in names),
    ]
    for i, name in enumerate(names):
        counts = "".join(f"{n:>13,}" for n in scores["confusion"][i])
        lines.append(f"{name:<14}{_value(scores['iou'][name]):>8}{_value(scores['dice'][name]):>8}{'':>19}{counts}")
    return "\n".join(lines)


def _value(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"
