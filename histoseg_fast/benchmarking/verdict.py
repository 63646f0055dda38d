"""What limits a run, which option would help, and what a reader of the figures must know: from the figures alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from histoseg_fast.engines import choose_precision
from histoseg_fast.machine import available_cores
from histoseg_fast.pipeline.run import InferOptions
from histoseg_fast.plan import Plan

NOISY = 0.1
"""A spread (slowest less quickest, over the median) above this is warned of."""
OTHERS = 0.05
"""So are other programs that keep more than this share of the processors busy."""
NEAR = 0.95
"""A run this near to the bare engine is limited by the engine."""
BUSY = 0.9
"""Threads that work for this share of the time are what the rest waits for."""
GAIN = 0.03
"""A point of the grid that is quicker by less is not named."""
SHORT_SECONDS = 2.0
"""A run shorter than this is mostly filling and emptying the pipeline."""
LIGHTER_FILES = "files that decode faster, such as uncompressed TIFF"
NO_STEPS = "--postprocess none: the steps after the network count as writing"
STAGES = {"read": "decode", "stitch": "stitch", "write": "write"}


def judge(
    row: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    grid: Sequence[dict[str, Any]],
    plan: Plan,
    options: InferOptions,
) -> dict[str, Any]:
    """`limit` ("engine", "decode", "stitch", "write", "cores" or "waiting"), `because` and `advice`, in words."""
    busy = {stage: row["stage_seconds"][stage] / (row["wall_seconds"] * row["workers"][stage]) for stage in STAGES}
    slowest = max(busy, key=lambda stage: busy[stage])
    idle = f"the engine waits {max(0.0, 1 - row['stage_seconds']['engine'] / row['wall_seconds']):.0%} of the time"
    share, others = row["share_of_engine"], (row["other_processors"] or 0) / available_cores()
    if share >= NEAR:
        limit, because = "engine", f"end to end runs at {share:.0%} of the bare engine's speed"
        advice = _quicker_engine(row, rows, plan)
    elif busy[slowest] >= BUSY:
        limit = STAGES[slowest]
        because = f"its {row['workers'][slowest]} thread(s) work {busy[slowest]:.0%} of the time, {idle}"
        advice = _quicker_stage(slowest, options)
    elif row["device"] == "cpu" and row["cpu_busy_share"] + others >= BUSY:
        spent = ", ".join(
            f"{STAGES[stage]} {1e3 * row['stage_seconds'][stage] / row['images']:.1f} ms" for stage in STAGES
        )
        limit, because = "cores", f"the other stages share them with the engine, for each image {spent}"
        advice = _fewer_seconds(row, options)
        if others >= 1 - share:
            because, advice = f"other programs keep {row['other_processors']:.1f} of them busy", []
    else:
        limit = "waiting"
        because = f"no stage works throughout: {idle}, the cores are {row['cpu_busy_share']:.0%} busy"
        advice = _less_waiting(row)
    if others > OTHERS:
        advice = ["a machine without other work", *advice]
    return {"limit": limit, "because": because, "advice": [*advice, *_better_point(row, grid)]}


def _quicker_engine(row: dict[str, Any], rows: Sequence[dict[str, Any]], plan: Plan) -> list[str]:
    best = max(rows, key=lambda other: other["images_per_second"])
    gain = best["images_per_second"] / row["images_per_second"]
    if gain > 1 + GAIN:
        kept = best["agreement_with_fp32"]
        agrees = "" if kept is None else f", {kept:.2%} of pixels as fp32"
        return [f"--precision {best['precision']} (ran {gain:.2f} times as fast{agrees})"]
    advice = []
    if row["device"] == "cpu" and len(rows) == 1 and (auto := choose_precision(plan, "auto")) != row["precision"]:
        advice.append(f"--precision {auto}, which passes the plan's gate (--precision all compares them)")
    if plan.name == "final":
        advice.append("--engine fast, a smaller network")
    return [
        *advice,
        "a GPU (--device cuda), or more cores" if row["device"] == "cpu" else "several GPUs (--device cuda:0,1)",
    ]


def _quicker_stage(stage: str, options: InferOptions) -> list[str]:
    if stage == "read":
        return [LIGHTER_FILES, "more cores: every two bring a reader"]
    if stage == "write" and options.postprocess != "none":
        return [NO_STEPS]
    return ["a faster disk for the results, or more cores"]


def _fewer_seconds(row: dict[str, Any], options: InferOptions) -> list[str]:
    advice = []
    if options.threads and options.threads < available_cores():
        advice.append(f"--threads {available_cores()}: the engine has but {options.threads} of the cores")
    worst = max(STAGES, key=lambda stage: row["stage_seconds"][stage])
    if worst == "write" and options.postprocess != "none":
        return [*advice, NO_STEPS]
    return [*advice, LIGHTER_FILES if worst == "read" else "more cores"]


def _less_waiting(row: dict[str, Any]) -> list[str]:
    if row["wall_seconds"] < SHORT_SECONDS:
        count = math.ceil(5 * SHORT_SECONDS * row["images_per_second"])
        return [
            f"a longer run (--images {count}): of {row['wall_seconds']:.2f} s much is filling and emptying the pipeline"
        ]
    return [f"--batch {2 * row['batch']}, so that the engine is handed more tiles at a time (--sweep measures it)"]


def _better_point(row: dict[str, Any], grid: Sequence[dict[str, Any]]) -> list[str]:
    same = [point for point in grid if point["batch"] == row["batch"]]
    if not same:
        return []
    # A tile that cuts nothing stands for all that are larger.
    here = next((point for point in same if point["tile"] >= row["tile"]), same[-1])
    best = max(grid, key=lambda point: point["images_per_second"])
    gain = best["images_per_second"] / here["images_per_second"]
    if gain <= 1 + max(GAIN, best["spread"], here["spread"]):
        return []
    return [f"--tile {best['tile']} --batch {best['batch']} (ran {gain:.2f} times as fast)"]


def warn(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What makes the figures less than they seem, a sentence each."""
    found = []
    for row in rows:
        noise = max(row["spread"], row["engine_spread"])
        if noise > NOISY:
            found.append(f"{row['precision']}: noisy, the repeats lie {noise:.0%} apart")
        cores = row["other_processors"]
        if cores is not None and cores > OTHERS * available_cores():
            found.append(
                f"{row['precision']}: other programs kept {cores:.1f} processor(s) busy; the figures are too low"
            )
        if row["wall_seconds"] < SHORT_SECONDS:
            found.append(f"{row['precision']}: a run took {row['wall_seconds']:.2f} s; measure longer (--images)")
        if row["cold_images_per_second"] is None:
            found.append(f"{row['precision']}: no figure for a cold page cache, the system does not drop these files")
    return found
