"""What a GPU does against what it could do: its rates, the network alone, the engine alone, end to end.

    python benchmarks/bench_gpu.py [--engine final] [--library torch|tensorrt] [--images 1000] [--json FILE]

On made-up fields of 1128x720. The limit is the network's floating point operations over the rate of a large fp16
matrix product on the same card, measured just before; "roofline" takes the bandwidth of a copy into account, too, pass
by pass (`roofline.py`). "network alone" has its input on the device and leaves its logits there; "engine alone" starts
and ends in page-locked memory; "end to end" is `infer` without post-processing from PNG to mask files, from the first
batch to the last: the engine's start is counted apart. The GPU is busy for as long as the network alone takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from roofline import Card, network_passes
from roofline import measure as measure_roofline

from histoseg_fast.engines import Engine, Slot, open_engine
from histoseg_fast.engines.devices import LIBRARY_VARIABLE
from histoseg_fast.engines.gpu import GpuEngine, GpuSlot
from histoseg_fast.images import write_png
from histoseg_fast.pipeline.run import InferOptions, Progress, infer
from histoseg_fast.plan import Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

FIELDS = 4
"""Different fields; more images repeat them under other names."""
MATRIX = 8192
COPY_BYTES = 1 << 30
STITCH_TILES = 32
"""Enough that the launch does not count and no cache holds the logits."""
REPEATS = 5
BARS = {"network": 0.55, "end to end": 0.9, "busy": 0.95, "stitch": 0.8}
"""What is wanted: network, of its limit; end to end, of the engine alone; GPU, of the time; stitching, of a copy."""


def median_seconds(work: Callable[[], None], runs: int, wait: Callable[[], None]) -> float:
    """Median over `REPEATS` of the seconds of one of `runs` calls, after a warm-up."""
    work(), wait()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        seconds.append((time.perf_counter() - started) / runs)
    return statistics.median(seconds)


def matrix_rate(device: str, side: int = MATRIX) -> float:
    """Operations a second of an fp16 matrix product."""
    a, b = (torch.randn(side, side, dtype=torch.float16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / median_seconds(lambda: torch.matmul(a, b, out=out), 20, torch.cuda.synchronize)


def copy_rate(device: str, size: int = COPY_BYTES) -> float:
    """Bytes read and written a second of a copy within the device."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / median_seconds(lambda: b.copy_(a), 20, torch.cuda.synchronize)


def network_seconds(engine: GpuEngine, field: np.ndarray, batch: int) -> float:
    """Seconds an image of the network on tiles that are on the device."""
    memory, shape = engine._memory, (batch, *field.shape[:2])
    with memory.current():
        rgb, host = memory.allocate(batch * field.size), memory.pinned(batch * field.size)
        host.reshape(batch, *field.shape)[...] = field
        memory.upload(rgb, host, engine._running)
        wait = memory.synchronise
        seconds = median_seconds(lambda: engine._network.run(rgb, shape, engine._running), 20, wait)
        memory.free(rgb)
        memory.free_pinned(host)
    return seconds / batch


def stitch_rate(engine: GpuEngine, height: int, width: int, tiles: int = STITCH_TILES) -> float:
    """Bytes read and written a second of the stitch kernel, on random logits."""
    memory, classes = engine._memory, engine._network.classes
    tile = np.random.default_rng(0).standard_normal((classes, height, width), np.float32)
    (slot,) = engine.slots(1)
    assert isinstance(slot, GpuSlot)
    slot.reshape(tiles, height, width)
    slot.cores[...] = (0, 0, height, width)
    with memory.current():
        slot.prepare(tiles)
        logits, host = memory.allocate(tiles * tile.nbytes), memory.pinned(tiles * tile.nbytes)
        host.view(np.float32).reshape(tiles, *tile.shape)[...] = tile
        memory.upload(slot.blocks["cores"], slot.cores, engine._running)
        memory.upload(logits, host, engine._running)
        seconds = median_seconds(lambda: engine._stitch(slot, tiles, logits), 50, memory.synchronise)
        memory.free(logits)
        memory.free_pinned(host)
    slot.close()
    return tiles * height * width * (4 * classes + 1) / seconds


def engine_seconds(engine: GpuEngine, fields: list[np.ndarray], batch: int, images: int) -> float:
    """Seconds an image from page-locked memory to page-locked memory, all slots in use."""
    slots = engine.slots(engine.depth)
    for slot in slots:
        slot.reshape(batch, *fields[0].shape[:2])[...] = fields[0]
        slot.cores[...] = (0, 0, *fields[0].shape[:2])
    batches = max(len(slots), images // batch)

    def run() -> float:
        started = time.perf_counter()
        for i in range(batches):
            if i >= len(slots):
                engine.wait(slots[i % len(slots)])
            engine.submit(slots[i % len(slots)])
        for slot in slots:
            engine.wait(slot)
        return time.perf_counter() - started

    run()  # allocates and captures
    seconds = statistics.median(run() for _ in range(REPEATS))
    for slot in slots:
        slot.close()
    return seconds / (batches * batch)


class Window:
    """The time from an engine's first batch in to its last batch out; `watch` is a `Progress.start`."""

    first, last = math.inf, 0.0

    def watch(self, engine: Engine, images: int, stream: object) -> None:
        submit, wait = engine.submit, engine.wait

        def timed_submit(slot: Slot) -> None:
            self.first = min(self.first, time.perf_counter())
            submit(slot)

        def timed_wait(slot: Slot) -> None:
            wait(slot)
            self.last = time.perf_counter()

        engine.submit, engine.wait = timed_submit, timed_wait  # type: ignore[method-assign]

    @property
    def seconds(self) -> float:
        return self.last - self.first


def infer_images(plan: Plan, fields: list[np.ndarray], images: int) -> tuple[dict[str, Any], float]:
    """run.json of `infer` on files and the seconds of its batches: of the second run, whose engine is in the cache."""
    options = InferOptions(device="cuda", postprocess="none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "images")
        for i, field in enumerate(fields):
            write_png(folder / f"field_{i:05}.png", field)
        for i in range(len(fields), images):
            os.link(folder / f"field_{i % len(fields):05}.png", folder / f"field_{i:05}.png")
        for name in ("first", "second"):
            window = Window()
            _, record = infer(plan, [str(folder)], Path(scratch, name), options, Progress(start=window.watch))
    return record, window.seconds


def measure(plan: Plan, images: int, batches: list[int]) -> dict[str, Any]:
    """Every figure, as JSON values."""
    fields = [make_field(seed)[0] for seed in range(FIELDS)]
    padded = [pad_to_stride(field, plan.stride) for field in fields]
    card = Card(matrix_rate("cuda"), copy_rate("cuda"))
    roofline = measure_roofline(network_passes(plan, *fields[0].shape[:2], max(batches)), max(batches), card)
    limit = 2 * roofline["macs"] / max(batches) / card.flops
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "plan": plan.name,
        "operations": 2 * roofline["macs"] // max(batches),
        "matrix_rate": card.flops,
        "copy_rate": card.bandwidth,
        "limit_seconds": limit,
        "roofline_seconds": roofline["predicted_seconds"] / max(batches),
        "batches": {},
    }
    with open_engine(plan, device="cuda", batch=max(batches), report=print) as engine:
        assert isinstance(engine, GpuEngine)
        found |= {"engine": engine.name, "precision": engine.precision}
        for batch in batches:
            alone = network_seconds(engine, padded[0], batch)
            seconds = engine_seconds(engine, padded, batch, images)
            found["batches"][batch] = {"network_seconds": alone, "engine_seconds": seconds}
        if engine._memory.kernels:
            found["stitch_rate"] = stitch_rate(engine, *padded[0].shape[:2])
    record, window = infer_images(plan, fields, images)
    rows = found["batches"].values()
    alone, seconds = (min(row[key] for row in rows) for key in ("network_seconds", "engine_seconds"))
    found["stream_seconds"], found["whole_seconds"] = window / images, record["wall_seconds"] / images
    found["shares"] = {"network": limit / alone, "end to end": seconds * images / window}
    found["shares"]["busy"] = found["batches"].get(record["batch"], {"network_seconds": alone})["network_seconds"]
    found["shares"]["busy"] *= images / window
    if "stitch_rate" in found:
        found["shares"]["stitch"] = found["stitch_rate"] / card.bandwidth
    return {**found, "run": record}


def table(found: dict[str, Any]) -> str:
    """The figures for a person."""

    def line(what: str, seconds: float, more: str = "") -> str:
        return f"{what:<38}{1e3 * seconds:>10.3f} ms  {more}".rstrip()

    def share(name: str) -> str:
        return f"({found['shares'][name]:.1%}; {BARS[name]:.0%} wanted)" if name in found["shares"] else "(no kernels)"

    lines = [
        f"{found['gpu']}; {found['plan']}, {found['engine']}, {found['precision']}; an image of 1128x720",
        f"fp16 matrix product {found['matrix_rate'] / 1e12:.1f} TFLOP/s, copy {found['copy_rate'] / 1e9:.0f} GB/s",
        line("limit", found["limit_seconds"], f"{found['operations'] / 1e12:.4f} TFLOP"),
        line("roofline", found["roofline_seconds"]),
    ]
    for batch, row in found["batches"].items():
        lines.append(line(f"network alone, batch {batch}", row["network_seconds"]))
        lines.append(line(f"engine alone, batch {batch}", row["engine_seconds"]))
    lines += [
        line("end to end, first batch to last", found["stream_seconds"], f"{1 / found['stream_seconds']:.0f} images/s"),
        line("end to end, start and all", found["whole_seconds"]),
        f"network alone, of its limit {share('network')}",
        f"end to end, of the engine alone {share('end to end')}",
        f"GPU busy, first batch to last {share('busy')}",
        f"stitch kernel, of a copy's bytes a second {share('stitch')}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final")
    parser.add_argument("--library", choices=("torch", "tensorrt"))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.library:
        os.environ[LIBRARY_VARIABLE] = arguments.library
    found = measure(open_plan(arguments.engine), arguments.images, arguments.batches)
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
