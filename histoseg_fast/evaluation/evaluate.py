"""Scores of a plan on a labelled data folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from histoseg_fast.data import find_pairs, load_pair
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import DataError
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.plan import Plan


def evaluate(
    plan: Plan,
    root: str | Path,
    *,
    split: str = "",
    precision: str = "auto",
    tolerance: float = 0.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Pooled scores of `plan` on the images of DATA (of one `split`, or all) as JSON values.

    Keys: those of `Scores.as_json`, and engine, precision, device, plan, plan_sha256, split. Raises DataError
    (bad folder, empty split), LabelError, ImageError, EngineError.
    """
    pairs = [pair for pair in find_pairs(root) if split in ("", pair.split)]
    if not pairs:
        raise DataError(f"has no image in split {split!r}", where=root)
    scores = Scores(plan.palette)
    with open_engine(plan, precision=precision) as engine:
        for i, pair in enumerate(pairs):
            rgb, labels = load_pair(pair, plan.palette, tolerance)
            scores.add(run_tiled(engine, plan, rgb, plan.tile), labels)
            progress(i + 1, len(pairs))
        ran = {"engine": engine.name, "precision": engine.precision, "device": engine.device}
    return {**scores.as_json(), **ran, "plan": plan.name, "plan_sha256": plan.sha256, "split": split or "all"}
