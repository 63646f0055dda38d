"""Explicit quantisation: QuantizeLinear / DequantizeLinear (Q/DQ) pairs in the fp16 graph, from the plan's ranges.

TensorRT runs a convolution in 8 bits where its data and its weights come out of a DequantizeLinear, and no calibrator
and no flag has a say in it. Its integers are symmetric, so behind a ReLU half of the levels that the CPU's int8 has
are never used: the two round differently, and each is measured on its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from histoseg_fast.errors import PlanError
from histoseg_fast.extras import need
from histoseg_fast.plan import MIN_RANGE, Ranges

OPSET, IR_VERSION = 21, 10
"""The first opset in which every version of ONNX gives DequantizeLinear of an fp8 tensor and an fp16 scale as fp16."""
LARGEST = {"int8": 127.0, "fp8": 448.0}
"""What the end of a range is rounded to. -128 stays unused; fp8 is E4M3FN, whose largest value this is."""
FP8_CHANNELS, FP8_KERNEL = 16, 32
"""TensorRT's fp8 convolutions take channels in multiples of this many, and kernels of so many weights a channel pair
at most; transposed ones it has none."""


@dataclass(frozen=True)
class Layer:
    """A convolution: its node, its float32 weights, and whether it runs in fp16 where nothing is quantised."""

    node: onnx.NodeProto
    weights: np.ndarray
    half: bool

    def can_run(self, precision: str) -> bool:
        """Whether TensorRT has it in "int8" or "fp8": the last convolution stays in fp32, whatever the ranges say."""
        if not self.half or precision == "int8":
            return self.half
        channels = self.weights.shape[:2]
        plain = self.node.op_type == "Conv" and not any(count % FP8_CHANNELS for count in channels)
        return plain and int(np.prod(self.weights.shape[2:])) <= FP8_KERNEL


def choose_layers(layers: Mapping[str, Layer], ranges: Ranges | None, precision: str) -> dict[str, Layer]:
    """Those of `layers`, by their name in the checkpoint, that run in `precision` ("int8" or "fp8").

    Raises PlanError if the plan has no `ranges`, has one for a convolution that is not there, or none would run so.
    """
    if ranges is None:
        raise PlanError(f"was compiled without ranges, which {precision} needs", fix="compile it with --calibrate DIR")
    if missing := sorted({*ranges.inputs, *ranges.outputs} - layers.keys()):
        raise PlanError(f"has int8 ranges for {missing[0]!r}, which is no convolution of its network")
    chosen = {name: layers[name] for name in ranges.inputs if layers[name].can_run(precision)}
    if not chosen:
        raise PlanError(f"has no convolution that TensorRT runs in {precision}", fix="use --precision fp16")
    return chosen


def insert_pairs(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    chosen: Mapping[str, Layer],
    ranges: Ranges,
    precision: str,
) -> list[onnx.NodeProto]:
    """`nodes`, typed in fp16, with Q/DQ before the `chosen` layers and behind those of them in `ranges.outputs`.

    A tensor has one pair, which all that read it share: so the other branch of a sum is rounded, too, and TensorRT
    adds 8-bit tensors. Weights become 8-bit constants with a DQ. New constants go into `constants`. Raises PlanError
    for a range that an fp16 scale cannot hold.
    """
    limits: dict[str, float] = {}
    for side, index in ((ranges.inputs, 0), (ranges.outputs, 1)):
        for name in (name for name in side if name in chosen):
            node = chosen[name].node
            limits.setdefault((node.input if index == 0 else node.output)[0], side[name])
    weights = {layer.node.name: layer for layer in chosen.values()}
    constants[f"{precision}.zero"] = _eight_bits(np.zeros((), np.float32), precision)
    made = []
    for node in nodes:
        if node.name in weights:
            made.append(_dequantised_weights(weights[node.name], constants, precision))
            node.input[1] = made[-1].output[0]
        for k, name in enumerate(node.input):
            node.input[k] = f"{name}.rounded" if name in limits else name
        made.append(node)
        for name in (name for name in node.output if name in limits):
            made += _pair(name, limits[name], constants, precision)
    return made


def _pair(tensor: str, limit: float, constants: dict[str, np.ndarray], precision: str) -> Iterator[onnx.NodeProto]:
    scale, zero, rounded = f"{tensor}.scale", f"{precision}.zero", f"{tensor}.{precision}"
    constants[scale] = _scale(np.float64(limit), precision)
    if not np.isfinite(constants[scale]):
        raise PlanError(f"has an int8 range of {limit:g}, beyond what an fp16 scale holds", fix="use --precision fp16")
    yield helper.make_node("QuantizeLinear", [tensor, scale, zero], [rounded], name=f"{rounded}.q")
    yield helper.make_node("DequantizeLinear", [rounded, scale, zero], [f"{tensor}.rounded"], name=f"{rounded}.dq")


def _dequantised_weights(layer: Layer, constants: dict[str, np.ndarray], precision: str) -> onnx.NodeProto:
    """The node that gives the weights of `layer`, rounded by output channel.

    Those of a transposed convolution are rounded as one: TensorRT has no scale for each output
    channel there (NVIDIA/TensorRT, issue 2380).
    """
    weights = layer.weights.astype(np.float64)
    by_channel = layer.node.op_type == "Conv"
    limit = np.abs(weights).max(axis=tuple(range(1, weights.ndim)) if by_channel else None)
    scale = _scale(np.where(limit < MIN_RANGE, LARGEST[precision], limit), precision)
    name = f"{layer.node.input[1]}.{precision}"
    constants[name] = _eight_bits(weights / scale.reshape(-1, *[1] * (weights.ndim - 1)), precision)
    constants[f"{name}.scale"] = scale
    constants[f"{name}.zero"] = _eight_bits(np.zeros(scale.shape, np.float32), precision)
    inputs = [name, f"{name}.scale", f"{name}.zero"]
    return helper.make_node("DequantizeLinear", inputs, [f"{name}.rounded"], name=f"{name}.dq", axis=0)


def _scale(limit: np.ndarray, precision: str) -> np.ndarray:
    """The least fp16 that takes `limit` to the largest value: never 0, which TensorRT refuses; infinite beyond fp16."""
    exact = limit / LARGEST[precision]
    with np.errstate(over="ignore", under="ignore"):
        scale = exact.astype(np.float16)
        above: np.ndarray = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale)
    return above


def _eight_bits(values: np.ndarray, precision: str) -> np.ndarray:
    """`values` rounded to the nearest, ties to even, and cut at the largest."""
    cut: np.ndarray = np.clip(values, -LARGEST[precision], LARGEST[precision])
    if precision == "int8":
        whole: np.ndarray = np.rint(cut)
        return whole.astype(np.int8)
    need("tensorrt", "ml_dtypes")
    from ml_dtypes import float8_e4m3fn

    rounded: np.ndarray = cut.astype(np.float32).astype(float8_e4m3fn)
    return rounded
