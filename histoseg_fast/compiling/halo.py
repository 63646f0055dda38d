"""Stride and halo of a network, from its ONNX graph by interval arithmetic: nothing is typed in by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import onnx
from onnx import helper, numpy_helper

from histoseg_fast.errors import PlanError

_POINTWISE = {"Cast", "Mul", "Add", "Sub", "Div", "Relu", "Clip", "LeakyRelu", "Sigmoid", "BatchNormalization"}
_POINTWISE |= {"Identity", "Transpose", "Concat", "QuantizeLinear", "DequantizeLinear"}
"""Operators whose output pixel needs the same input pixel only. (A Transpose in these graphs moves channels.)"""


@dataclass(frozen=True)
class Interval:
    """Pixels low..high (both included) of a tensor, along one axis."""

    low: int
    high: int

    def union(self, other: Interval | None) -> Interval:
        return self if other is None else Interval(min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Receptive:
    """`stride` of the network and the `halo` of a tile: the context rounded up to the stride; both in pixels.

    `context` is the farthest pixel that a stride-aligned block of the output looks at, beyond the block.
    """

    stride: int
    context: int

    @property
    def halo(self) -> int:
        return -(-self.context // self.stride) * self.stride


def measure(model: onnx.ModelProto) -> Receptive:
    """Walk the graph forward for the stride, then backward for what an aligned output block needs of the input.

    Both spatial axes are followed; the wider counts. Raises PlanError for an operator with no rule here.
    """
    axes = [_measure_axis(model.graph, axis) for axis in (0, 1)]
    stride = lcm(*(s for s, _ in axes))
    return Receptive(stride, max(context for _, context in axes))


def _measure_axis(graph: onnx.GraphProto, axis: int) -> tuple[int, int]:
    constants = {t.name: t for t in graph.initializer}
    source, target = graph.input[0].name, graph.output[0].name
    scales: dict[str, Fraction] = {source: Fraction(1)}
    for node in graph.node:
        inputs = [scales[name] for name in node.input if name in scales]
        if not inputs:
            continue
        if len(set(inputs)) > 1:
            raise PlanError(f"{node.op_type} {node.name} joins tensors of different sizes")
        scales |= dict.fromkeys(node.output, inputs[0] * _scale(node, axis, constants))
    if scales.get(target) != 1:
        raise PlanError("the network's output has not the size of its input")
    stride = lcm(*(scale.denominator for scale in scales.values()))
    wanted: dict[str, Interval] = {target: Interval(0, stride - 1)}
    for node in reversed(graph.node):
        needed = [wanted[name] for name in node.output if name in wanted]
        if not needed:
            continue
        interval = _needs(node, axis, needed[0], constants)
        for name in node.input:
            if name in scales:
                wanted[name] = interval.union(wanted.get(name))
    reach = wanted[source]
    return stride, max(0, -reach.low, reach.high - (stride - 1))


def _scale(node: onnx.NodeProto, axis: int, constants: Mapping[str, onnx.TensorProto]) -> Fraction:
    """Size of the node's output over that of its input."""
    if node.op_type in _POINTWISE:
        return Fraction(1)
    attributes = _attributes(node)
    if node.op_type in ("Conv", "MaxPool", "AveragePool"):
        return Fraction(1, _at(attributes, "strides", axis, 1))
    if node.op_type == "ConvTranspose":
        return Fraction(_at(attributes, "strides", axis, 1))
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):
        block = attributes["blocksize"]
        return Fraction(block) if node.op_type == "DepthToSpace" else Fraction(1, block)
    if node.op_type == "Resize" and len(node.input) > 2 and node.input[2] in constants:
        return Fraction(float(numpy_helper.to_array(constants[node.input[2]])[2 + axis])).limit_denominator(64)
    raise PlanError(f"the halo of operator {node.op_type} is not known", fix="use convolutions, pooling, resizing")


def _needs(node: onnx.NodeProto, axis: int, out: Interval, constants: Mapping[str, onnx.TensorProto]) -> Interval:
    """Input pixels that the output pixels `out` are computed from."""
    if node.op_type in _POINTWISE:
        return out
    attributes = _attributes(node)
    if node.op_type in ("Conv", "MaxPool", "AveragePool"):
        stride, pad = _at(attributes, "strides", axis, 1), _at(attributes, "pads", axis, 0)
        reach = _at(attributes, "dilations", axis, 1) * (_kernel(node, axis, constants) - 1)
        return Interval(out.low * stride - pad, out.high * stride - pad + reach)
    if node.op_type == "ConvTranspose":
        stride, pad = _at(attributes, "strides", axis, 1), _at(attributes, "pads", axis, 0)
        reach = _at(attributes, "dilations", axis, 1) * (_kernel(node, axis, constants) - 1)
        return Interval(-((reach - pad - out.low) // stride), (out.high + pad) // stride)
    scale = _scale(node, axis, constants)
    spread = 1 if attributes.get("mode", b"nearest") in (b"linear", b"cubic") else 0
    spread *= 2 if attributes.get("mode") == b"cubic" else 1
    return Interval(int(out.low // scale) - spread, int(-(-(out.high + 1) // scale)) - 1 + spread)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _at(attributes: Mapping[str, Sequence[int]], name: str, axis: int, default: int) -> int:
    return int(attributes[name][axis]) if name in attributes else default


def _kernel(node: onnx.NodeProto, axis: int, constants: Mapping[str, onnx.TensorProto]) -> int:
    shape = _attributes(node).get("kernel_shape") or constants[node.input[1]].dims[2:]
    return int(shape[axis])
