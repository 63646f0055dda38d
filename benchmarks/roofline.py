"""The least time a plan's network can take on a GPU: each layer's operations over its rate, bytes over its bandwidth.

    python benchmarks/roofline.py [--engine fast] [--tflops 790] [--terabytes 4.8] [--batch 1] [--unfused] [--json FILE]

Nothing is run: the figures are predictions from the plan's ONNX as it is typed for TensorRT, and from two numbers of a
card (the defaults are an H200's). A pass is what one kernel does: by default a convolution with the additions, ReLUs
and casts behind it, and the whole normalisation; with --unfused every operator for itself, as PyTorch runs them. Every
pass reads each tensor that it takes once, and writes its own once, in device memory. Convolutions in fp32 run as TF32,
at half the rate. "joined" is what would be saved if a pass were done within the one before, so that what lies between
them stays on the chip: the most that such a step could gain.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto

from histoseg_fast.engines.trt.fp16 import typed_model
from histoseg_fast.plan import MODEL, Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.tiling import padded_length

CONVOLUTIONS = ("Conv", "ConvTranspose")
JOINING = ("Relu", "Add", "Mul", "Sub", "Div", "Cast", "Clip", "Transpose")
"""Operators that end the pass before them instead of beginning one of their own."""
BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.UINT8: 1}
TF32_SHARE = 0.5
"""Of the fp16 matrix rate: what NVIDIA's data sheets say of every chip since Ampere."""


@dataclass(frozen=True)
class Card:
    """A GPU: fp16 matrix `flops` a second and `bandwidth` of its memory in bytes a second."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Pass:
    """What one kernel does: `macs` multiply-adds in "fp16" or "fp32" ("" where there are none), and bytes by tensor."""

    name: str
    macs: int
    precision: str
    reads: Mapping[str, int]
    writes: Mapping[str, int]
    weights: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values()) + self.weights

    @property
    def intensity(self) -> float:
        """Floating point operations (two a multiply-add) by byte."""
        return 2 * self.macs / self.bytes

    def compute_seconds(self, card: Card) -> float:
        return 2 * self.macs / (card.flops * (1.0 if self.precision == "fp16" else TF32_SHARE))

    def memory_seconds(self, card: Card) -> float:
        return self.bytes / card.bandwidth

    def seconds(self, card: Card) -> float:
        return max(self.compute_seconds(card), self.memory_seconds(card))


def network_passes(plan: Plan, height: int, width: int, batch: int = 1, fused: bool = True) -> list[Pass]:
    """The passes of `plan` over `batch` images, padded to the stride, in fp16; the last is the stitching."""
    model = onnx.load_from_string(typed_model(plan.members[MODEL], "fp16").data)
    sides = [padded_length(side, plan.stride) for side in (height, width)]
    shape = (batch, *sides, 3)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    for dim in model.graph.output[0].type.tensor_type.shape.dim:
        dim.Clear()
    made = list(graph_passes(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph, fused))
    (logits,) = (value.name for value in model.graph.output)
    read = {logits: next(one.writes[logits] for one in made if logits in one.writes)}
    return [*made, Pass("stitch", 0, "", read, {"classes": batch * prod(sides)})]


def graph_passes(graph: onnx.GraphProto, fused: bool) -> Iterator[Pass]:
    """The passes of a graph whose shapes are known."""
    values = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    shapes = {name: [dim.dim_value for dim in kind.shape.dim] for name, kind in values.items()}
    sizes = {name: prod(shapes[name]) * BYTES[kind.elem_type] for name, kind in values.items()}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    uses = Counter(name for node in graph.node for name in node.input) + Counter(value.name for value in graph.output)
    for nodes in _groups(graph, fused, uses):
        made = {name for node in nodes for name in node.output}
        taken = [name for node in nodes for name in node.input if name]
        inside = Counter(taken)
        weights = sum(_constant_bytes(constants[name]) for name in dict.fromkeys(taken) if name in constants)
        reads = {name: sizes[name] for name in taken if name not in made and name not in constants}
        writes = {name: sizes[name] for node in nodes for name in node.output if uses[name] > inside[name]}
        main = next((node for node in nodes if node.op_type in CONVOLUTIONS), None)
        if main is None:
            yield Pass(" + ".join(node.op_type for node in nodes), 0, "", reads, writes, weights)
            continue
        kernel = constants[main.input[1]]
        # Every output of a convolution sums over the kernel; every input of a transposed one spreads over it.
        places = shapes[(main.output if main.op_type == "Conv" else main.input)[0]]
        name = main.input[1].removesuffix(".fp16").removesuffix(".fp32").removesuffix(".weight")
        macs = prod(kernel.dims) * places[0] * prod(places[2:])
        precision = "fp16" if kernel.data_type == TensorProto.FLOAT16 else "fp32"
        yield Pass(name, macs, precision, reads, writes, weights)


def _groups(graph: onnx.GraphProto, fused: bool, uses: Mapping[str, int]) -> Iterator[list[onnx.NodeProto]]:
    """The nodes of each pass. A joining node joins the last one if its input comes from there, and for it alone."""
    group: list[onnx.NodeProto] = []
    for node in graph.node:
        last = group[-1].output[0] if group else None
        if fused and last in node.input and uses[last] == 1 and node.op_type in JOINING:
            group.append(node)
            continue
        if group:
            yield group
        group = [node]
    yield group


def _constant_bytes(tensor: onnx.TensorProto) -> int:
    return prod(tensor.dims) * BYTES.get(tensor.data_type, 8)


def joined_seconds(passes: Sequence[Pass], at: int, card: Card) -> float:
    """Seconds saved if pass `at` were done within the one before it; 0 where it takes nothing from there."""
    before, this = passes[at - 1], passes[at]
    between = set(before.writes).intersection(this.reads)
    if at == 0 or not between:
        return 0.0
    elsewhere = {name for i, one in enumerate(passes) if i != at for name in one.reads}
    both = replace(
        before,
        macs=before.macs + this.macs,
        precision=before.precision if before.macs >= this.macs else this.precision,
        reads={**before.reads, **{name: size for name, size in this.reads.items() if name not in between}},
        writes={**{n: s for n, s in before.writes.items() if n not in between or n in elsewhere}, **this.writes},
        weights=before.weights + this.weights,
    )
    compute = before.compute_seconds(card) + this.compute_seconds(card)
    return before.seconds(card) + this.seconds(card) - max(compute, both.memory_seconds(card))


def measure(passes: Sequence[Pass], batch: int, card: Card) -> dict[str, Any]:
    """Rows and totals as JSON values: multiply-adds and bytes of the batch, predicted seconds of it and of an image."""
    rows = [
        {
            "name": one.name,
            "precision": one.precision,
            "macs": one.macs,
            "bytes_in": sum(one.reads.values()),
            "bytes_out": sum(one.writes.values()),
            "bytes_weights": one.weights,
            "intensity": one.intensity,
            "seconds": one.seconds(card),
            "bound": "compute" if one.compute_seconds(card) > one.memory_seconds(card) else "memory",
            "joined_saves": joined_seconds(passes, at, card),
        }
        for at, one in enumerate(passes)
    ]
    seconds = sum(one.seconds(card) for one in passes)
    return {
        "batch": batch,
        "flops_a_second": card.flops,
        "bytes_a_second": card.bandwidth,
        "passes": rows,
        "macs": sum(one.macs for one in passes),
        "bytes": sum(one.bytes for one in passes),
        "compute_seconds": sum(one.compute_seconds(card) for one in passes),
        "memory_seconds": sum(one.memory_seconds(card) for one in passes),
        "memory_bound_share": sum(row["seconds"] for row in rows if row["bound"] == "memory") / seconds,
        "predicted_seconds": seconds,
        "predicted_images_a_second": batch / seconds,
    }


def table(title: str, found: Mapping[str, Any]) -> str:
    """The figures for a person: of an image, whatever the batch."""
    batch, mega, micro = found["batch"], 1e-6 / found["batch"], 1e6 / found["batch"]
    lines = [
        f"{title}; predicted, not measured; of an image, in batches of {batch}",
        f"{'pass':<34}{'type':>5}{'GMAC':>9}{'MB in':>8}{'out':>8}{'weights':>8}{'FLOP/B':>8}{'us':>8}"
        "  bound    joined",
    ]
    for row in found["passes"]:
        saved = f"{micro * row['joined_saves']:>6.1f}" if row["joined_saves"] else ""
        lines.append(
            f"{row['name'][:33]:<34}{row['precision']:>5}{1e-9 * row['macs'] / batch:>9.2f}"
            f"{mega * row['bytes_in']:>8.2f}{mega * row['bytes_out']:>8.2f}{mega * row['bytes_weights']:>8.2f}"
            f"{row['intensity']:>8.0f}{micro * row['seconds']:>8.1f}  {row['bound']:<8} {saved}".rstrip()
        )
    lines += [
        f"operations {2e-12 * found['macs'] / batch:.4f} TFLOP: {micro * found['compute_seconds']:.1f} us;"
        f" bytes {mega * found['bytes']:.1f} MB: {micro * found['memory_seconds']:.1f} us",
        f"the sum of the passes' larger ones: {micro * found['predicted_seconds']:.1f} us"
        f" ({found['predicted_images_a_second']:.0f} images/s),"
        f" {found['memory_bound_share']:.0%} of it bound by memory",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="fast", help="a plan file, or a shipped plan's name")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tflops", type=float, default=790.0, help="fp16 matrix rate, 10^12 operations a second")
    parser.add_argument("--terabytes", type=float, default=4.8, help="memory bandwidth, 10^12 bytes a second")
    parser.add_argument("--unfused", action="store_true", help="every operator for itself")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    plan, card = open_plan(arguments.engine), Card(1e12 * arguments.tflops, 1e12 * arguments.terabytes)
    passes = network_passes(plan, arguments.height, arguments.width, arguments.batch, not arguments.unfused)
    found = measure(passes, arguments.batch, card)
    size = f"{arguments.width}x{arguments.height}, {arguments.tflops:g} TFLOP/s, {arguments.terabytes:g} TB/s"
    print(table(f"{plan.name}, {size}", found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
