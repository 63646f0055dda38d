"""A segmentation network of the user's own, as ONNX, brought into the form that plans hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.files import read_at_most
from histoseg_fast.plan import MAX_PLAN_BYTES

OLDEST_OPSET = 13
INPUT, OUTPUT = "rgb", "logits"


@dataclass(frozen=True)
class Normalisation:
    """What a network of floats expects of RGB in 0..1: (x - mean) / std by channel.

    Raises UsageError unless both are three finite numbers, the deviations above 0.
    """

    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        sound = len(self.mean) == len(self.std) == 3 and all(map(math.isfinite, (*self.mean, *self.std)))
        if not sound or min(self.std) <= 0:
            raise UsageError("mean and deviation of RGB are three numbers each, the deviations above 0")


def read_onnx(path: str | Path, classes: int, normalisation: Normalisation) -> onnx.ModelProto:
    """The network in the file `path` with input `rgb` uint8 (n, h, w, 3) and output `logits` (n, classes, h, w).

    The file's network takes either that, or float32 (n, 3, h, w), which `normalisation` is then put before; it gives
    float32 logits, before any softmax, of its input's height and width. Sizes that the file fixes are set free.
    Raises PlanError where it is no such network, or keeps tensors in other files.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            data = read_at_most(stream, MAX_PLAN_BYTES)
        if len(data) > MAX_PLAN_BYTES:
            raise PlanError(f"is larger than {MAX_PLAN_BYTES >> 20} MiB", where=path)
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except FileNotFoundError:
        raise PlanError("no such ONNX file", where=path) from None
    except OSError as error:
        raise PlanError(f"cannot be read: {error.strerror}", where=path) from error
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise PlanError(f"is no sound ONNX model ({reason})", where=path, fix="export it again") from error
    try:
        _adapt(model, classes, normalisation)
    except PlanError as error:
        raise PlanError(error.what, where=path, fix=error.fix) from None
    return model


def _adapt(model: onnx.ModelProto, classes: int, normalisation: Normalisation) -> None:
    graph = model.graph
    if max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0) < OLDEST_OPSET:
        raise PlanError(f"has an ONNX opset before {OLDEST_OPSET}", fix="export it again with a newer one")
    _hold_constants(graph)
    held = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in held]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise PlanError(f"has {len(inputs)} inputs and {len(graph.output)} outputs; one of each is wanted")
    (source,), (target,) = inputs, graph.output
    for value, name in ((source, INPUT), (target, OUTPUT)):
        if value.name != name:
            _rename(graph, name, f"{name}.inner")  # an inner tensor that has the name
            _rename(graph, value.name, name)
    kind, shape = source.type.tensor_type.elem_type, _shape(source)
    if kind == TensorProto.FLOAT and len(shape) == 4 and (shape[1] == 3 or (shape[1] == 0 and shape[3] != 3)):
        _normalise(graph, source, normalisation)
    elif kind != TensorProto.UINT8 or len(shape) != 4 or shape[3] not in (3, 0):
        raise PlanError(
            f"takes {TensorProto.DataType.Name(kind).lower()} {shape}",
            fix="export it with an input float32 (n, 3, h, w) or uint8 (n, h, w, 3)",
        )
    source.CopyFrom(helper.make_tensor_value_info(source.name, TensorProto.UINT8, ["n", "h", "w", 3]))
    out = _shape(target)
    if target.type.tensor_type.elem_type != TensorProto.FLOAT or len(out) != 4 or out[1] not in (classes, 0):
        raise PlanError(f"gives {out}, not float32 logits (n, {classes}, h, w)", fix="name as many --classes as it has")
    target.CopyFrom(helper.make_tensor_value_info(target.name, TensorProto.FLOAT, ["n", classes, "h", "w"]))
    del graph.value_info[:]
    for node in graph.node:
        if node.op_type == "BatchNormalization" and len(node.output) > 1:
            raise PlanError("was exported in training mode", fix="export it in evaluation mode")


def _hold_constants(graph: onnx.GraphProto) -> None:
    """Nodes that give a constant tensor become initialisers, where `halo.measure` and engines look for weights."""
    nodes = []
    for node in graph.node:
        values = [a.t for a in node.attribute if a.name == "value"] if node.op_type == "Constant" else []
        for tensor in values:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        if not values:
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)


def _normalise(graph: onnx.GraphProto, source: onnx.ValueInfoProto, normalisation: Normalisation) -> None:
    """Put the way from uint8 (n, h, w, 3) to the float planes that the network takes before it."""
    scale = 1 / (255 * np.asarray(normalisation.std, np.float64))
    shift = -np.asarray(normalisation.mean, np.float64) / np.asarray(normalisation.std, np.float64)
    planes = f"{source.name}.normalised"
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == source.name:
                node.input[i] = planes
    constants = {"scale": scale, "shift": shift}
    for name, values in constants.items():
        tensor = values.astype(np.float32).reshape(1, 3, 1, 1)
        graph.initializer.append(numpy_helper.from_array(tensor, f"{source.name}.{name}"))
    steps = [
        helper.make_node("Transpose", [source.name], [f"{source.name}.planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", [f"{source.name}.planes"], [f"{source.name}.floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{source.name}.floats", f"{source.name}.scale"], [f"{source.name}.scaled"]),
        helper.make_node("Add", [f"{source.name}.scaled", f"{source.name}.shift"], [planes]),
    ]
    nodes = [*steps, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for value in (*graph.input, *graph.output):
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    """0 stands for a size that is not fixed."""
    return tuple(int(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
