"""What each post-processing does to the scores on labelled images, and what it costs: a Markdown table.

    python benchmarks/measure_postprocess.py DATA [SPEC ...] [--split val] [--engine final] [--precision auto]

The network runs once an image; every SPEC (as `--postprocess` takes it; default: a grid) works on the same logits.
Choose on the validation split: what was chosen on the test split has no test score.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from histoseg_fast.data import find_pairs, load_pair
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import DataError, HistosegError
from histoseg_fast.evaluation.metrics import BOOTSTRAPS, Scores, pooled
from histoseg_fast.machine import available_cores, cpu_name
from histoseg_fast.plans import open_plan
from histoseg_fast.postprocess import NO_STEPS, PostProcessing

WEAK = "crf,crf.smooth_weight=1,crf.appearance_weight=2,crf.appearance_sigma_rgb="
GRID = [
    *(f"min_island={area}" for area in (64, 256, 1024)),
    *(f"majority_radius={radius}" for radius in (2, 4, 8)),
    "majority_radius=2,min_island=64",
    "majority_radius=4,min_island=256",
    *(f"crf,crf.appearance_sigma_rgb={sigma}" for sigma in (10, 13, 20)),
    *(f"{WEAK}{sigma}" for sigma in (10, 13, 20)),
    *(
        f"crf,crf.smooth_weight={smooth},crf.appearance_weight={appearance},crf.appearance_sigma_rgb=13"
        for smooth, appearance in ((0, 2), (0.5, 1), (1, 0), (1, 1), (1, 3), (2, 2))
    ),
    f"{WEAK}13,min_island=64",
    f"{WEAK}13,min_island=256",
    f"{WEAK}13,majority_radius=2,min_island=64",
]


def measure(arguments: argparse.Namespace, specs: list[PostProcessing]) -> tuple[list[Scores], list[float], str]:
    """Scores and seconds of CPU time a megapixel of each of `specs`, and a line on what ran."""
    plan = open_plan(arguments.engine)
    pairs = [pair for pair in find_pairs(arguments.data) if pair.split == arguments.split]
    if not pairs:
        raise DataError(f"has no image in split {arguments.split!r}", where=arguments.data)
    scores, seconds, pixels = [Scores(plan.palette) for _ in specs], [0.0] * len(specs), 0
    with open_engine(plan, precision=arguments.precision) as engine:
        for number, pair in enumerate(pairs, 1):
            rgb, labels = load_pair(pair, plan.palette)
            logits = run_tiled(engine, plan, rgb, plan.tile)
            pixels += labels.size
            for i, steps in enumerate(specs):
                started = time.process_time()
                ids = steps.apply(rgb, logits).ids
                seconds[i] += time.process_time() - started
                scores[i].add(logits, labels, ids)
            print(f"{number} of {len(pairs)} images", file=sys.stderr, flush=True)
        ran = f"{cpu_name()}, {available_cores()} cores; {plan.name}, {engine.name}, {engine.precision}"
    megapixels = pixels / 1e6
    what = f"{len(pairs)} images ({arguments.split}), {megapixels:.1f} megapixels; {ran}"
    return scores, [s / megapixels for s in seconds], what


def gain_interval(scores: Scores, plain: Scores) -> tuple[float, float]:
    """95 % bootstrap interval of the gain in mean IoU; both have the same images, and draw the same of them."""
    images = scores.images
    draws = np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), BOOTSTRAPS)
    after, before = (
        pooled(np.einsum("bi,icd->bcd", draws, s.confusions), draws @ s.sums)["mean_iou"] for s in (scores, plain)
    )
    low, high = np.nanquantile(after - before, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("specs", nargs="*", metavar="SPEC")
    parser.add_argument("--split", default="val")
    parser.add_argument("--engine", default="final")
    parser.add_argument("--precision", default="auto")
    arguments = parser.parse_args()
    try:
        specs = [NO_STEPS, *map(PostProcessing.parse, arguments.specs or GRID)]
        scores, seconds, what = measure(arguments, specs)
    except HistosegError as error:
        parser.error(str(error))
    print("| steps | accuracy | mean IoU | mean Dice | CPU s a megapixel | gain in mean IoU (95 % interval) |")
    print("| --- | --- | --- | --- | --- | --- |")
    plain = scores[0]
    for steps, found, cost in zip(specs, scores, seconds, strict=True):
        dice = float(np.nanmean(found.dice))
        gain, (low, high) = found.mean_iou - plain.mean_iou, gain_interval(found, plain)
        print(
            f"| `{steps}` | {found.pixel_accuracy:.4f} | {found.mean_iou:.4f} | {dice:.4f} | {cost:.3f} | "
            f"{gain:+.4f} ({low:+.4f} to {high:+.4f}) |"
        )
    print(f"\n{what}")


if __name__ == "__main__":
    main()
