"""End to end against the bare engine: `infer` from PNG files to mask files, and the engine alone on the same pixels.

    python benchmarks/bench_infer.py [--engine final] [--precision auto] [--images 20] [--repeats 3] [--json FILE]

Both run in this process in turn (engine, infer, engine, infer, ...), on the same made-up fields of 1128x720; the
ratio is taken pair by pair and its median printed. The engine alone has its input in memory and drops its logits;
`infer` is run without post-processing, which is no part of the engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from histoseg_fast.engines import open_engine
from histoseg_fast.images import write_png
from histoseg_fast.machine import available_cores, cpu_name
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

FIELDS = 4
"""Different fields; more images repeat them under other names."""


def time_engine(plan: Plan, precision: str, fields: list[np.ndarray], images: int) -> float:
    """Seconds for `images` runs of the bare engine, one after the other, with two requests in flight."""
    with open_engine(plan, device="cpu", precision=precision) as engine:
        slots = engine.slots(2)
        fields = [pad_to_stride(field, plan.stride) for field in fields]
        for slot in slots:  # the first run of a shape allocates
            slot.reshape(1, *fields[0].shape[:2])[0] = fields[0]
            engine.submit(slot)
            engine.wait(slot)
        started = time.perf_counter()
        for i in range(images):
            slot = slots[i % 2]
            if i >= 2:
                engine.wait(slot)
            slot.reshape(1, *fields[0].shape[:2])[0] = fields[i % len(fields)]
            engine.submit(slot)
        for slot in slots[: min(2, images)]:
            engine.wait(slot)
        return time.perf_counter() - started


def time_infer(plan: Plan, precision: str, folder: Path, out: Path) -> tuple[float, dict]:
    """Seconds of a whole `infer`, from the call to the last file, engine start included; and run.json."""
    started = time.perf_counter()
    _, record = infer(plan, [str(folder)], out, InferOptions(device="cpu", precision=precision, postprocess="none"))
    return time.perf_counter() - started, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plan = open_plan(arguments.engine)
    fields = [make_field(seed)[0] for seed in range(FIELDS)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        for i in range(arguments.images):
            write_png(folder / f"field_{i:04}.png", fields[i % FIELDS])
        for repeat in range(arguments.repeats):
            alone = time_engine(plan, arguments.precision, fields, arguments.images)
            whole, record = time_infer(plan, arguments.precision, folder, Path(scratch, f"out{repeat}"))
            rows.append({"engine_seconds": alone, "infer_seconds": whole, "ratio": whole / alone})
            print(
                f"engine alone {alone / arguments.images:.3f} s an image, infer {whole / arguments.images:.3f} s, "
                f"ratio {whole / alone:.3f}",
                flush=True,
            )
    median = statistics.median(row["ratio"] for row in rows)
    print(
        f"{cpu_name()}, {available_cores()} cores; {plan.name}, {record['engine']}, {record['precision']}; "
        f"{arguments.images} images of 1128x720: infer takes {median:.3f} times the bare engine (median of {len(rows)})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"ratio": median, "runs": rows, "run": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
