"""The paper's experiments: all four networks under one protocol, its tables 1 and 2, and the curves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from histoseg_fast.compiling.compile import plan_of_checkpoint
from histoseg_fast.data import SPLITS, find_pairs
from histoseg_fast.errors import DataError, PlanError
from histoseg_fast.evaluation.evaluate import evaluate
from histoseg_fast.evaluation.figures import save_curves
from histoseg_fast.models.architectures import PAPER_ARCHITECTURES
from histoseg_fast.training.checkpoint import write_whole
from histoseg_fast.training.loop import BEST, HISTORY, train
from histoseg_fast.training.options import TrainingOptions

PAPER_TABLE_1 = {"one": 0.849, "two": 0.774, "three": 0.748, "final": 0.697}
"""Validation loss of the four networks in the paper."""
PAPER_TABLE_2 = {"train": 0.563, "val": 0.697, "test": 0.685}
"""Loss of the paper's final network by split."""
TABLES, RECORD, CURVES = "tables.md", "experiments.json", "curves.png"


def run_experiments(
    root: str | Path, out: str | Path, options: TrainingOptions, report: Callable[[str], None]
) -> dict[str, Any]:
    """Train the four networks on DATA with `options` (their `arch` aside) and write tables 1 and 2 beside the paper's.

    Each network trains in OUT/<arch>; what an earlier call completed is kept, what it left unfinished goes on. Writes
    OUT/tables.md, OUT/experiments.json (all scores) and OUT/curves.png, and returns the content of the JSON. Scores are
    those of the best epoch's weights on whole images in fp32. Raises what `train` and `evaluate` raise.
    """
    root, out = Path(root), Path(out)
    if missing := sorted(set(SPLITS) - {pair.split for pair in find_pairs(root)}):
        raise DataError(f"the {missing[0]} split is empty", where=root, fix="name its images in split.csv")
    table_1: dict[str, Any] = {}
    for arch in PAPER_ARCHITECTURES:
        report(f"== experiment {arch}")
        train(root, out / arch, dataclasses.replace(options, arch=arch), report)
        table_1[arch] = _score(root, out / arch, "val", options.tolerance)
        report(f"{arch}: validation cross entropy {table_1[arch]['cross_entropy']:.4f}")
    table_2 = {split: _score(root, out / "final", split, options.tolerance) for split in SPLITS}
    record = {
        "data": root.resolve().name,
        "options": options.as_json(),
        "table_1": table_1,
        "table_2": table_2,
    }
    write_whole(out / RECORD, json.dumps(record, indent=1).encode())
    write_whole(out / TABLES, tables(record).encode())
    try:
        save_curves(out / CURVES, {arch: _history(out / arch) for arch in PAPER_ARCHITECTURES})
    except OSError as error:
        raise PlanError(f"cannot be written: {error.strerror or error}", where=out / CURVES) from error
    report(f"tables: {out / TABLES}; curves: {out / CURVES}")
    return record


def tables(record: Mapping[str, Any]) -> str:
    """Tables 1 and 2 as Markdown, the paper's figures beside ours."""
    data = record["data"]
    lines = [f"Table 1: validation loss of the four networks (softmax cross entropy), trained on `{data}`.", ""]
    lines += ["| network | paper | here | accuracy | mIoU |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(arch, PAPER_TABLE_1[arch], scores) for arch, scores in record["table_1"].items()]
    lines += ["", f"Table 2: the final network on the splits of `{data}`.", ""]
    lines += ["| split | paper | here | accuracy | mIoU |", "| --- | --- | --- | --- | --- |"]
    lines += [_row(split, PAPER_TABLE_2[split], scores) for split, scores in record["table_2"].items()]
    lines += [
        "",
        f"The paper's figures are of its own breast images; `{data}` is other tissue, so only the order compares.",
    ]
    return "\n".join(lines) + "\n"


def _row(name: str, paper: float, scores: Mapping[str, Any]) -> str:
    ours = " | ".join(f"{scores[key]:.3f}" for key in ("cross_entropy", "pixel_accuracy", "mean_iou"))
    return f"| {name} | {paper:.3f} | {ours} |"


def _score(root: Path, run: Path, split: str, tolerance: float) -> dict[str, Any]:
    return evaluate(plan_of_checkpoint(run / BEST), root, split=split, precision="fp32", tolerance=tolerance)


def _history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]
