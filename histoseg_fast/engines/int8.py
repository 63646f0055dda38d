"""Int8 in OpenVINO's graph: the plan's activation ranges become FakeQuantize operators, which its CPU runs as int8.

Weights are rounded by output channel to -127..127 of their largest magnitude, activations by tensor: to 0..255 of
their range behind a ReLU, to -128..127 where they have a sign (Jacob et al., "Quantization and Training of Neural
Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018). What has no range stays in floating point.
"""

from __future__ import annotations

import numpy as np
import openvino as ov
import openvino.opset13 as operators

from histoseg_fast.errors import PlanError
from histoseg_fast.plan import MIN_RANGE, Ranges

LEVELS = 256
_CONVOLUTIONS = ("Convolution", "ConvolutionBackpropData")


def quantise(model: ov.Model, ranges: Ranges) -> None:
    """Insert FakeQuantize before (`ranges.inputs`) and behind (`ranges.outputs`) the convolutions named in `ranges`.

    Raises PlanError if `model` has no convolution of such a name.
    """
    found = {
        weights.get_friendly_name().removesuffix(".weight"): op
        for op in model.get_ordered_ops()
        if op.get_type_name() in _CONVOLUTIONS and (weights := _weights(op)) is not None
    }
    if missing := sorted({*ranges.inputs, *ranges.outputs} - found.keys()):
        raise PlanError(f"has int8 ranges for {missing[0]!r}, which is no convolution of its network")
    for name, limit in ranges.inputs.items():
        _quantise_weights(found[name])
        _quantise_tensor(found[name].input_value(0), limit, signed=False)
    for name, limit in ranges.outputs.items():
        _quantise_tensor(_with_bias(found[name]), limit, signed=True)


def _weights(convolution: ov.Node) -> ov.Node | None:
    """The convolution's weights, which carry its name in the checkpoint; None where they are computed."""
    node = convolution.input_value(1).get_node()
    if node.get_type_name() == "Convert":  # stored in fp16
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _with_bias(convolution: ov.Node) -> ov.Output:
    readers = (reader.get_node() for reader in convolution.output(0).get_target_inputs())
    return next((node.output(0) for node in readers if node.get_type_name() == "Add"), convolution.output(0))


def _quantise_weights(convolution: ov.Node) -> None:
    weights = _weights(convolution)
    assert weights is not None
    values = np.asarray(weights.data, np.float32)
    # Transposed convolutions keep their output channels on the second axis.
    channel = 0 if convolution.get_type_name() == "Convolution" else 1
    others = tuple(axis for axis in range(values.ndim) if axis != channel)
    limit = np.abs(values).max(axis=others, keepdims=True)
    limit[limit < MIN_RANGE] = 1  # of a channel that is nothing but zeros
    rounded = operators.fake_quantize(convolution.input_value(1), -limit, limit, -limit, limit, LEVELS - 1)
    convolution.input(1).replace_source_output(rounded.output(0))


def _quantise_tensor(tensor: ov.Output, limit: float, signed: bool) -> None:
    readers = list(tensor.get_target_inputs())
    if tensor.get_node().get_type_name() == "MaxPool":  # rounded before it, the same comes out, and it pools int8
        readers = [tensor.get_node().input(0)]
        tensor = readers[0].get_source_output()
    if tensor.get_node().get_type_name() == "FakeQuantize":
        return  # another convolution reads it too
    low, high = (np.float32(-limit), np.float32(limit * 127 / 128)) if signed else (np.float32(0), np.float32(limit))
    rounded = operators.fake_quantize(tensor, low, high, low, high, LEVELS)
    for reader in readers:
        reader.replace_source_output(rounded.output(0))
