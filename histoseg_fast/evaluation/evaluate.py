"""Scores of a plan on a labelled data folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from histoseg_fast.data import find_pairs, load_pair
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import DataError, ImageError, one_line
from histoseg_fast.evaluation.metrics import Scores
from histoseg_fast.plan import Plan


def evaluate(
    plan: Plan,
    root: str | Path,
    *,
    split: str = "",
    precision: str = "auto",
    tolerance: float = 0.0,
    postprocess: str = "plan",
    progress: Callable[[int, int], None] = lambda done, total: None,
    figures: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Scores of `plan` on the images of DATA (of one `split`, or all) as JSON values.

    `postprocess` is a text for `Plan.choose_postprocess`; what is scored of probabilities stays the logits'.
    With `figures`, a PNG an image goes there: image, label, prediction and errors (needs matplotlib). `report` is
    `open_engine`'s.
    Keys: those of `Scores.as_json`, and engine, precision, device, postprocess, plan, plan_sha256, split, and
    postprocessed_in_part (names of images that were too large for a step). Raises
    DataError (bad folder, empty split), LabelError, ImageError, EngineError, UsageError (post-processing that is
    not known). An image that is too large for a step is scored without it, as `infer` does it; `report` says so.
    """
    steps = plan.choose_postprocess(postprocess)
    pairs = [pair for pair in find_pairs(root) if split in ("", pair.split)]
    if not pairs:
        raise DataError(f"has no image in split {split!r}", where=root)
    scores, in_part = Scores(plan.palette), []
    with open_engine(plan, precision=precision, report=report) as engine:
        for i, pair in enumerate(pairs):
            rgb, labels = load_pair(pair, plan.palette, tolerance)
            logits = run_tiled(engine, plan, rgb, plan.tile)
            taken = steps.within(labels.size)
            if taken != steps:
                in_part.append(pair.name)
                report(f"{one_line(pair.name)}: too large for post-processing {steps}; scored with {taken}")
            predicted = taken.apply(rgb, logits).ids
            scores.add(logits, labels, predicted)
            if figures is not None:
                _draw(figures / f"{pair.image.stem}.png", rgb, labels, predicted, plan)
            progress(i + 1, len(pairs))
        ran = {"engine": engine.name, "precision": engine.precision, "device": engine.device}
    known = {"plan": plan.name, "plan_sha256": plan.sha256, "postprocess": steps.as_json(), "split": split or "all"}
    return {**scores.as_json(), **ran, **known, "postprocessed_in_part": in_part}


def _draw(path: Path, rgb: np.ndarray, labels: np.ndarray, predicted: np.ndarray, plan: Plan) -> None:
    from histoseg_fast.evaluation.figures import save_figure

    right = float((predicted == labels).mean())
    try:
        save_figure(path, rgb, predicted, plan.palette, labels, f"{path.stem}: {right:.1%} of pixels right")
    except OSError as error:
        reason = error.strerror or error
        raise ImageError(f"cannot be written: {reason}", where=path, fix="choose another --figures") from error
