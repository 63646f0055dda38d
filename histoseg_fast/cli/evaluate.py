"""`histoseg-fast eval`: scores on labelled images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer

from histoseg_fast.cli.checks import check_target
from histoseg_fast.errors import UsageError

NAME = "eval"


def command(
    data: Path = typer.Argument(..., metavar="DATA", help="Folder with images/, labels/ and, if there, split.csv."),
    engine: str = typer.Option("fast", help="A plan, a checkpoint (.safetensors), or a shipped plan's name."),
    split: str = typer.Option("", help="train, val or test (default: every image)."),
    precision: str = typer.Option("auto", help="auto; on the CPU fp32, bf16 or int8; on GPUs fp16, fp32, int8, fp8."),
    tolerance: float = typer.Option(0.0, min=0.0, help="How far a label colour may be from the palette's (RGB)."),
    postprocess: str = typer.Option(
        "plan",
        metavar="SPEC",
        help='Steps after the network, e.g. "min_island=64" or "crf" (plan: what the plan records; none).',
    ),
    figures: Path = typer.Option(None, metavar="DIR", help="Also draw image, label, prediction and errors."),
    json_file: Path = typer.Option(None, "--json", metavar="FILE", help="Also write the scores as JSON (-: stdout)."),
) -> None:
    """Score a plan or checkpoint: cross entropy, accuracy, IoU and Dice by class, confusion matrix."""
    from histoseg_fast.data import SPLITS
    from histoseg_fast.evaluation.evaluate import evaluate
    from histoseg_fast.extras import need
    from histoseg_fast.files import atomic_write
    from histoseg_fast.plans import open_plan

    if split and split not in SPLITS:
        raise UsageError(f"{split!r} is no split", where="--split", fix="choose one of " + ", ".join(SPLITS))
    if figures is not None:
        need("train", "matplotlib")
    if json_file is not None and str(json_file) != "-":
        check_target(json_file)
    if engine.endswith(".safetensors"):
        need("train", "torch", "onnx", "onnxscript", "safetensors")
        from histoseg_fast.compiling.compile import plan_of_checkpoint

        plan = plan_of_checkpoint(engine)
    else:
        plan = open_plan(engine)

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} images", end="\n" if done == total else "", file=sys.stderr, flush=True)

    scores = evaluate(
        plan,
        data,
        split=split,
        precision=precision,
        tolerance=tolerance,
        postprocess=postprocess,
        progress=progress,
        figures=figures,
        report=lambda line: print(line, file=sys.stderr, flush=True),
    )
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


ROWS = {
    "cross_entropy": "cross entropy",
    "pixel_accuracy": "pixel accuracy",
    "mean_iou": "mean IoU",
    "mean_dice": "mean Dice",
    "l1": "L1",
    "l2": "L2",
}


def table(scores: dict[str, Any]) -> str:
    """The scores for a person."""
    from histoseg_fast.postprocess import PostProcessing

    names = list(scores["iou"])
    lines = [
        f"{scores['images']} images ({scores['split']}), {scores['pixels']:,} pixels; "
        f"{scores['plan']} on {scores['device']}, {scores['engine']}, {scores['precision']}; "
        f"post-processing {PostProcessing.from_json(scores['postprocess'])}",
        f"{'':<16}{'pooled':>8}{'95 % interval':>20}{'mean of images':>18}",
    ]
    for key, title in ROWS.items():
        interval = " to ".join(map(_value, scores["ci95"].get(key, ())))
        lines.append(f"{title:<16}{_value(scores[key]):>8}{interval:>20}{_value(scores['per_image'][key]):>18}")
    lines.append(f"expected calibration error {_value(scores['calibration_error'])}")
    lines.append(f"tumour-stroma ratio: mean error {_value(scores['tumour_stroma_ratio_error'])} an image")
    columns = ("iou", "dice", "class_precision", "class_recall")
    lines += ["", f"{'class':<14}" + "".join(f"{c:>10}" for c in ("IoU", "Dice", "precision", "recall"))]
    lines[-1] += "   true \\ predicted" + "".join(f"{name:>13}" for name in names)
    for i, name in enumerate(names):
        counts = "".join(f"{n:>13,}" for n in scores["confusion"][i])
        lines.append(f"{name:<14}" + "".join(f"{_value(scores[c][name]):>10}" for c in columns) + f"{'':>19}{counts}")
    return "\n".join(lines)


def _value(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"
