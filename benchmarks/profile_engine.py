"""The CPU engine layer by layer: which kernel ran, how long, and how far it is from what this CPU can do.

    python benchmarks/profile_engine.py [--engine final] [--precision int8] [--runs 20] [--threads 1] [--json FILE]

The graph is compiled as the engine compiles it, with OpenVINO's profiling on; of each layer's runs the lower quartile
counts, because whatever else happens on a machine only adds. On one that does other work, a real-time thread measures
about what a quiet one would: chrt -f 1 python benchmarks/profile_engine.py --threads 1

A layer's least time is the larger of its arithmetic at the CPU's rate (products in registers, `peak_rate.cpp`, built by
this script) and its tensors at the rate of a large copy: "of limit" is that over the time it took, and the limit named
is the one that is larger. A tensor that stays in the cache can beat the copy.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.properties as properties
import openvino.properties.hint as hint

from histoseg_fast.engines import choose_precision
from histoseg_fast.engines.int8 import quantise
from histoseg_fast.engines.openvino import PRECISIONS, without_shuffle
from histoseg_fast.machine import available_cores, cpu_name, cpu_precisions
from histoseg_fast.plan import MODEL, Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

BYTES = {"u8": 1, "i8": 1, "bf16": 2, "f16": 2, "f32": 4, "i32": 4}
RATES = {"u8": "int8", "i8": "int8", "bf16": "bf16", "f32": "fp32"}
"""Which multipliers a convolution uses that computes in this type."""
PEAK_ROUNDS, PEAK_REPEATS = 100_000, 200
COPY_BYTES, COPY_REPEATS = 1 << 28, 10
PAUSE = 0.1
"""Share of a run to sleep behind it: a kernel stops real-time threads that never do."""
FAR = 0.5
"""Layers below this share of their limit are marked, if they take at least `WORTH` of the time."""
WORTH = 0.02


@dataclass
class Layer:
    """A node of the executed graph: the seconds of a run, and the least they could be by `limit`."""

    name: str
    kind: str
    kernel: str
    shape: str
    types: str
    seconds: float
    operations: int
    bytes: int
    least_seconds: float = 0.0
    limit: str = ""


def compile_profiled(plan: Plan, precision: str, threads: int) -> ov.CompiledModel:
    """The plan as `OpenVINOEngine` compiles it, one batch at a time, with profiling."""
    core = ov.Core()
    model, _ = without_shuffle(core.read_model(plan.members[MODEL]))
    floating = precision
    if precision == "int8":
        assert plan.ranges is not None
        quantise(model, plan.ranges)
        floating = "bf16" if "bf16" in cpu_precisions() else "fp32"
    mode = hint.ExecutionMode.ACCURACY if precision == "fp32" else hint.ExecutionMode.PERFORMANCE
    return core.compile_model(
        model,
        "CPU",
        {
            hint.inference_precision: PRECISIONS[floating],
            hint.execution_mode: mode,
            hint.enable_cpu_pinning: False,
            properties.num_streams: 1,
            properties.inference_num_threads: threads,
            properties.enable_profiling: True,
        },
    )


def profile(compiled: ov.CompiledModel, image: np.ndarray, runs: int) -> tuple[list[Layer], float]:
    """The layers in the order they ran, and the seconds of a whole run; lower quartiles of `runs`.

    `compiled` must not have run before.
    """
    request = compiled.create_infer_request()
    sums: dict[str, list[float]] = {}
    whole = []
    for run in range(runs + 1):  # the first allocates
        started = time.perf_counter()
        request.infer({0: image[None]})
        whole.append(time.perf_counter() - started)
        time.sleep(PAUSE * whole[-1])
        for entry in request.profiling_info:
            # What is reported is the mean over all runs of the compiled model so far, in whole microseconds.
            sums.setdefault(entry.node_name, []).append((run + 1) * entry.real_time.total_seconds())
    seconds = {name: float(np.percentile(np.diff(total), 25)) for name, total in sums.items()}
    graph = compiled.get_runtime_model().get_ordered_ops()
    nodes = [node for node in graph if seconds.get(node.get_friendly_name(), 0) > 0]
    return [_layer(node, seconds[node.get_friendly_name()]) for node in nodes], float(np.percentile(whole[1:], 25))


def _info(node: ov.Node, key: str) -> str:
    return str(node.get_rt_info()[key].astype(str))


def _layer(node: ov.Node, seconds: float) -> Layer:
    kind = _info(node, "layerType")
    sources = [value.get_source_output() for value in node.inputs()]
    inputs = [
        (tuple(s.get_partial_shape().to_shape()), _info(s.get_node(), "outputPrecisions").split(",")[0])
        for s in sources
    ]
    outputs = [tuple(value.get_partial_shape().to_shape()) for value in node.outputs()]
    kept = _info(node, "outputPrecisions").split(",")[0]
    moved = sum(prod(shape) * BYTES.get(precision, 4) for shape, precision in inputs)
    moved += sum(prod(shape) for shape in outputs) * BYTES.get(kept, 4)
    operations, text = 0, "x".join(map(str, outputs[0])) if outputs else ""
    if kind in ("Convolution", "Deconvolution"):
        weights, places = inputs[1][0], (outputs if kind == "Convolution" else [inputs[0][0]])[0][2:]
        operations = 2 * prod(weights) * prod(places)
        into, out = weights[:2][::-1] if kind == "Convolution" else weights[:2]
        text = f"{into}->{out} {'x'.join(map(str, weights[2:]))} at {'x'.join(map(str, places))}"
    types = f"{inputs[0][1] if inputs else ''}>{kept}"
    return Layer(node.get_friendly_name(), kind, _info(node, "primitiveType"), text, types, seconds, operations, moved)


def peak_rates(threads: int) -> dict[str, float]:
    """Operations a second of `threads` cores by type: one core's, measured, times their number."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch, "peak.so")
        source = Path(__file__).with_name("peak_rate.cpp")
        subprocess.run(["c++", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        functions = ctypes.CDLL(str(library))
    rates = {}
    for name in ("int8", "bf16", "fp32"):
        function = getattr(functions, f"peak_{name}")
        function.argtypes = [ctypes.c_int64]
        best = 0.0
        for _ in range(PEAK_REPEATS):
            started = time.perf_counter()
            operations = function(PEAK_ROUNDS) * 12 * PEAK_ROUNDS
            best = max(best, operations / (time.perf_counter() - started))
        rates[name] = best * threads
    return rates


def copy_rate() -> float:
    """Bytes read and written a second by one thread that copies what no cache holds."""
    source = np.ones(COPY_BYTES, np.uint8)
    target, best = np.zeros_like(source), 0.0
    for _ in range(COPY_REPEATS):
        started = time.perf_counter()
        np.copyto(target, source)
        best = max(best, 2 * COPY_BYTES / (time.perf_counter() - started))
    return best


def set_limits(layers: Sequence[Layer], rates: dict[str, float], copy: float) -> None:
    """Fill in `least_seconds` and `limit`."""
    for layer in layers:
        rate = rates.get(RATES.get(layer.types.partition(">")[0], ""), 0.0)
        arithmetic = layer.operations / rate if rate else 0.0
        memory = layer.bytes / copy
        layer.least_seconds = max(arithmetic, memory)
        layer.limit = "arithmetic" if arithmetic >= memory else "memory"


def table(layers: Sequence[Layer], shown: int) -> str:
    """The layers for a person, the slowest first; * marks those worth a look."""
    total = sum(layer.seconds for layer in layers)
    head = f"{'layer':<34}{'what':<32}{'kernel':<24}{'types':<11}{'ms':>8}{'share':>7}{'GMAC':>8}{'GOPS':>7}{'GB/s':>7}"
    lines = [head + f"{'of limit':>10}"]
    for layer in sorted(layers, key=lambda layer: -layer.seconds)[:shown]:
        share, reached = layer.seconds / total, layer.least_seconds / layer.seconds
        mark = "*" if reached < FAR and share >= WORTH else " "
        what = f"{layer.kind} {layer.shape}" if not layer.operations else layer.shape
        lines.append(
            f"{layer.name[-33:]:<34}{what[:31]:<32}{layer.kernel[:23]:<24}{layer.types:<11}{layer.seconds * 1e3:>8.2f}"
            f"{share:>7.1%}{layer.operations / 2e9:>8.2f}{layer.operations / layer.seconds / 1e9:>7.0f}"
            f"{layer.bytes / layer.seconds / 1e9:>7.1f}{reached:>6.0%} {layer.limit[:3]}{mark}"
        )
    return "\n".join(lines)


def by_kernel(layers: Sequence[Layer]) -> str:
    """Time and rate of each kind of kernel."""
    total, lines = sum(layer.seconds for layer in layers), []
    for kernel in sorted({layer.kernel for layer in layers}):
        group = [layer for layer in layers if layer.kernel == kernel]
        seconds, operations = sum(layer.seconds for layer in group), sum(layer.operations for layer in group)
        if seconds >= 0.001 * total:
            lines.append(
                (
                    seconds,
                    f"{kernel:<24}{len(group):>4} layers{seconds * 1e3:>9.2f} ms{seconds / total:>7.1%}",
                    operations,
                )
            )
    return "\n".join(
        text + (f"{operations / seconds / 1e9:>7.0f} GOPS" if operations else "")
        for seconds, text, operations in sorted(lines)[::-1]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--tile", type=int, default=0, help="side of a square tile (0: a field of 1128x720)")
    parser.add_argument("--layers", type=int, default=40, help="how many to print")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plan = open_plan(arguments.engine)
    precision = choose_precision(plan, arguments.precision)
    side = arguments.tile
    field = make_field(0, side, side)[0] if side else make_field(0)[0]
    image = pad_to_stride(field, plan.stride)
    layers, whole = profile(compile_profiled(plan, precision, arguments.threads), image, arguments.runs)
    rates, copy = peak_rates(arguments.threads), copy_rate()
    set_limits(layers, rates, copy)
    total, operations = sum(layer.seconds for layer in layers), sum(layer.operations for layer in layers)
    least = sum(layer.least_seconds for layer in layers)
    print(f"{cpu_name()}, {arguments.threads} thread(s); {plan.name}, {precision}, {image.shape[1]}x{image.shape[0]}")
    print("limits: " + ", ".join(f"{name} {rate / 1e9:.0f} GOPS" for name, rate in rates.items()), end="")
    print(f"; a copy {copy / 1e9:.1f} GB/s (one thread)\n\n{table(layers, arguments.layers)}\n\n{by_kernel(layers)}\n")
    print(f"all layers {total * 1e3:.1f} ms, a whole run {whole * 1e3:.1f} ms (lower quartiles of {arguments.runs})")
    rate = f"{operations / 2e9:.2f} GMAC, {operations / total / 1e9:.0f} GOPS"
    print(f"{rate}; at the limit {least * 1e3:.1f} ms ({least / total:.0%})")
    if arguments.json:
        found: dict[str, Any] = {"rates": rates, "copy_rate": copy, "seconds": total, "whole_seconds": whole}
        arguments.json.write_text(json.dumps({**found, "layers": [asdict(layer) for layer in layers]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
