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
"""Operators whose output pixel needs the same input pixel only (`_check_pointwise` says when)."""
_CHANNELS_MOVED = ([0, 3, 1, 2], [0, 2, 3, 1])
_LOCAL_RESIZE = {b"half_pixel", b"half_pixel_symmetric", b"pytorch_half_pixel", b"asymmetric"}
"""How Resize finds its source pixels; other ways depend on the size of the whole image."""
_EXACT_NEAREST = {(way, b"round_prefer_floor") for way in _LOCAL_RESIZE - {b"asymmetric"}}
_EXACT_NEAREST |= {(b"asymmetric", b"floor")}
"""Of mode nearest: these stay within the pixels that the output covers; others may take the next one."""


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
    attributes = _attributes(node)
    if node.op_type in _POINTWISE:
        _check_pointwise(node, attributes)
        return Fraction(1)
    if node.op_type in ("Conv", "MaxPool", "AveragePool"):
        return Fraction(1, _window(node, axis, constants)[0])
    if node.op_type == "ConvTranspose":
        return Fraction(_window(node, axis, constants)[0])
    if node.op_type in ("DepthToSpace", "SpaceToDepth"):
        block = attributes["blocksize"]
        return Fraction(block) if node.op_type == "DepthToSpace" else Fraction(1, block)
    if node.op_type == "Resize" and len(node.input) > 2 and node.input[2] in constants:
        way = attributes.get("coordinate_transformation_mode", b"half_pixel")
        if way not in _LOCAL_RESIZE or attributes.get("antialias"):
            raise PlanError(f"Resize {node.name} looks at more of the image than its neighbours")
        return Fraction(float(numpy_helper.to_array(constants[node.input[2]])[2 + axis])).limit_denominator(64)
    raise PlanError(f"the halo of operator {node.op_type} is not known", fix="use convolutions, pooling, resizing")


def _needs(node: onnx.NodeProto, axis: int, out: Interval, constants: Mapping[str, onnx.TensorProto]) -> Interval:
    """Input pixels that the output pixels `out` are computed from."""
    if node.op_type in _POINTWISE:
        return out
    attributes = _attributes(node)
    if node.op_type in ("Conv", "MaxPool", "AveragePool"):
        stride, pad, reach = _window(node, axis, constants)
        return Interval(out.low * stride - pad, out.high * stride - pad + reach)
    if node.op_type == "ConvTranspose":
        stride, pad, reach = _window(node, axis, constants)
        return Interval(-((reach - pad - out.low) // stride), (out.high + pad) // stride)
    scale = _scale(node, axis, constants)
    spread = 0
    if node.op_type == "Resize":
        way = attributes.get("coordinate_transformation_mode", b"half_pixel")
        exact = (way, attributes.get("nearest_mode", b"round_prefer_floor")) in _EXACT_NEAREST
        spread = {b"nearest": 0 if exact else 1, b"linear": 1, b"cubic": 2}[attributes.get("mode", b"nearest")]
    return Interval(int(out.low // scale) - spread, int(-(-(out.high + 1) // scale)) - 1 + spread)


def _check_pointwise(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> None:
    """Moving and joining must leave height and width as they are."""
    if node.op_type == "Transpose" and list(attributes.get("perm", ())) not in _CHANNELS_MOVED:
        raise PlanError(f"Transpose {node.name} moves more than the channels")
    if node.op_type == "Concat" and attributes["axis"] not in (1, -3):
        raise PlanError(f"Concat {node.name} joins images, not channels")


def _window(node: onnx.NodeProto, axis: int, constants: Mapping[str, onnx.TensorProto]) -> tuple[int, int, int]:
    """Stride, padding before, and pixels from first to last tap, of a convolution or pooling.

    Raises PlanError unless the output's size is exactly the input's over (or times) the stride.
    """
    attributes = _attributes(node)
    stride, pad, after = (_at(attributes, *a) for a in (("strides", axis, 1), ("pads", axis, 0), ("pads", axis + 2, 0)))
    reach = _at(attributes, "dilations", axis, 1) * (_kernel(node, axis, constants) - 1)
    if node.op_type == "ConvTranspose":
        exact = reach + 1 + _at(attributes, "output_padding", axis, 0) - pad - after == stride
    else:
        exact = (pad + after - reach - 1) // stride == -1
    by_size = attributes.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in attributes
    if not exact or by_size or attributes.get("ceil_mode"):
        raise PlanError(f"{node.op_type} {node.name} is not padded to its input's size over its stride")
    return stride, pad, reach


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _at(attributes: Mapping[str, Sequence[int]], name: str, axis: int, default: int) -> int:
    return int(attributes[name][axis]) if name in attributes else default


def _kernel(node: onnx.NodeProto, axis: int, constants: Mapping[str, onnx.TensorProto]) -> int:
    shape = _attributes(node).get("kernel_shape")
    if shape is None:
        if node.input[1] not in constants:
            raise PlanError(f"{node.op_type} {node.name} has weights of unknown size")
        shape = constants[node.input[1]].dims[2:]
    return int(shape[axis])
