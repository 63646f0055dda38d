"""What a GPU does against what it could do: its matrix rate, the network alone, the engine alone, end to end.

    python benchmarks/bench_gpu.py [--engine final] [--library torch|tensorrt] [--images 400] [--json FILE]

On made-up fields of 1128x720. The limit is the network's floating point operations over the rate of a large fp16
matrix product on the same card, measured just before. "network alone" has its input on the device and leaves its
logits there; "engine alone" starts and ends in page-locked memory; "end to end" is `infer` from PNG to mask files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from histoseg_fast import _core
from histoseg_fast.engines import open_engine
from histoseg_fast.engines.devices import LIBRARY_VARIABLE
from histoseg_fast.engines.gpu import GpuEngine
from histoseg_fast.images import write_png
from histoseg_fast.models.network import rebuild
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plan import Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

FIELDS = 4
"""Different fields; more images repeat them under other names."""
MATRIX = 8192
REPEATS = 5


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


def copy_rate(device: str, size: int = 1 << 30) -> float:
    """Bytes read and written a second of a copy within the device."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / median_seconds(lambda: b.copy_(a), 20, torch.cuda.synchronize)


def operations(plan: Plan, height: int, width: int) -> int:
    """Floating point operations (two a multiply-add) of the plan's convolutions on one image."""
    total = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        places = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += 2 * module.weight.numel() * places.shape[-1] * places.shape[-2]  # type: ignore[operator,union-attr]

    network = rebuild(plan).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    network(torch.empty(1, height, width, 3, dtype=torch.uint8, device="meta"))
    return total


def network_seconds(engine: GpuEngine, field: np.ndarray, batch: int) -> float:
    """Seconds an image of the network on tiles that are on the device."""
    memory, shape = engine._memory, (batch, *field.shape[:2])
    with memory.current():
        rgb = memory.allocate(batch * field.size)
        wait = memory.synchronise
        seconds = median_seconds(lambda: engine._network.run(rgb, shape, engine._running), 20, wait)
        memory.free(rgb)
    return seconds / batch


def stitch_rate(engine: GpuEngine, field: np.ndarray, batch: int) -> float:
    """Bytes read and written a second of the stitch kernel."""
    memory, (height, width) = engine._memory, field.shape[:2]
    classes = engine._network.classes
    (slot,) = engine.slots(1)
    slot.reshape(batch, height, width)
    with memory.current():
        slot.prepare(batch)  # type: ignore[attr-defined]
        slot.cores[...] = (0, 0, height, width)
        memory.upload(slot.blocks["cores"], slot.cores, engine._running)  # type: ignore[attr-defined]
        logits = engine._network.run(slot.blocks["rgb"], (batch, height, width), engine._running)  # type: ignore
        seconds = median_seconds(lambda: engine._stitch(slot, batch, logits), 50, memory.synchronise)  # type: ignore
    slot.close()
    return batch * height * width * (4 * classes + 1) / seconds


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


def infer_images(plan: Plan, fields: list[np.ndarray], images: int, batch: int) -> dict[str, Any]:
    """run.json of `infer` on files, its second run in this process (the engine is in the cache)."""
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(images):
            write_png(Path(scratch, "images", f"field_{i:04}.png"), fields[i % len(fields)])
        for name in ("first", "second"):
            _, record = infer(
                plan, [scratch + "/images"], Path(scratch, name), InferOptions(device="cuda", batch=batch)
            )
    return record


def measure(plan: Plan, images: int, batches: list[int]) -> dict[str, Any]:
    """Every figure, as JSON values."""
    fields = [make_field(seed)[0] for seed in range(FIELDS)]
    padded = [pad_to_stride(field, plan.stride) for field in fields]
    height, width = fields[0].shape[:2]
    work, rate, copies = operations(plan, height, width), matrix_rate("cuda"), copy_rate("cuda")
    found: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "plan": plan.name,
        "operations": work,
        "matrix_rate": rate,
        "copy_rate": copies,
        "limit_seconds": work / rate,
        "batches": {},
    }
    with open_engine(plan, device="cuda", batch=max(batches), report=print) as engine:
        assert isinstance(engine, GpuEngine)
        found |= {"engine": engine.name, "precision": engine.precision}
        for batch in batches:
            alone = network_seconds(engine, padded[0], batch)
            found["batches"][batch] = {
                "network_seconds": alone,
                "engine_seconds": engine_seconds(engine, padded, batch, images),
                "share_of_limit": work / rate / alone,
            }
        if _core.cuda_built:
            found["stitch_rate"] = stitch_rate(engine, padded[0], 4)
    record = infer_images(plan, fields, images, 0)
    seconds = record["wall_seconds"] / images
    best = min(row["network_seconds"] for row in found["batches"].values())
    return {**found, "infer_seconds": seconds, "busy_share": best / seconds, "run": record}


def table(found: dict[str, Any]) -> str:
    """The figures for a person."""
    lines = [
        f"{found['gpu']}; {found['plan']}, {found['engine']}, {found['precision']}; seconds an image of 1128x720",
        f"{'fp16 matrix product':<34}{found['matrix_rate'] / 1e12:>10.1f} TFLOP/s",
        f"{'limit':<34}{1e3 * found['limit_seconds']:>10.3f} ms  ({found['operations'] / 1e12:.3f} TFLOP)",
    ]
    for batch, row in found["batches"].items():
        share = f"({row['share_of_limit']:.0%} of the limit)"
        lines.append(f"{f'network alone, batch {batch}':<34}{1e3 * row['network_seconds']:>10.3f} ms  {share}")
        lines.append(f"{f'engine alone, batch {batch}':<34}{1e3 * row['engine_seconds']:>10.3f} ms")
    lines.append(f"{'end to end, engine start included':<34}{1e3 * found['infer_seconds']:>10.3f} ms")
    lines.append(f"{'GPU busy end to end':<34}{found['busy_share']:>10.1%}")
    if "stitch_rate" in found:
        share = f"({found['stitch_rate'] / found['copy_rate']:.0%} of a copy's {found['copy_rate'] / 1e9:.0f})"
        lines.append(f"{'stitch kernel':<34}{found['stitch_rate'] / 1e9:>10.1f} GB/s  {share}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final")
    parser.add_argument("--library", choices=("torch", "tensorrt"))
    parser.add_argument("--images", type=int, default=400)
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
