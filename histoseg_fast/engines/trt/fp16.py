"""The plan's ONNX as TensorRT wants it: strongly typed, so that the precision lies in the graph and nowhere else.

TensorRT from 11 on knows no other way, and 10.x under STRONGLY_TYPED does the same: each layer runs in the type of
its tensors. In "fp16" the normalisation and the last convolution with all that follows it stay fp32, everything
between runs in fp16 with fp16 weights; "int8" and "fp8" are that with Q/DQ pairs in it (see `quantised`). The input
stays uint8 (n, h, w, 3), the output float32 (n, C, h, w).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from histoseg_fast.engines.trt.layers import Convolution, TypedModel
from histoseg_fast.engines.trt.options import EIGHT_BITS
from histoseg_fast.engines.trt.quantised import IR_VERSION, OPSET, Layer, choose_layers, insert_pairs
from histoseg_fast.errors import PlanError
from histoseg_fast.plan import Ranges

_CONVOLUTIONS = {"Conv", "ConvTranspose"}
_NORMALISING = {"Cast", "Transpose", "Mul", "Add", "Sub", "Div", "Identity"}
_BODY = _CONVOLUTIONS | _NORMALISING | {"MaxPool", "AveragePool", "Relu", "LeakyRelu", "Clip", "Sigmoid", "Concat"}
_BODY |= {"Resize", "DepthToSpace", "SpaceToDepth"}
"""Operators of one float type from input to output; Resize's scales (its other inputs) are always float32."""
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass
class _Graph:
    """The graph while it is rewritten: nodes in order, constants by name, where constants that were cast came from,
    and the types that casts have made."""

    graph: onnx.GraphProto
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]
    origins: dict[str, str]
    casts: dict[tuple[str, int], str] = field(default_factory=dict)

    def data_inputs(self, node: onnx.NodeProto) -> list[str]:
        return [name for name in node.input if name and name not in self.constants]

    def users(self, tensor: str) -> list[int]:
        """Positions of the nodes that take `tensor`."""
        return [i for i, node in enumerate(self.nodes) if tensor in node.input]


def typed_model(model: bytes, precision: str, ranges: Ranges | None = None) -> TypedModel:
    """`model` (a plan's ONNX) typed for TensorRT in "fp16", "fp32", or, with the plan's `ranges`, "int8" or "fp8".

    Raises PlanError for a graph with operators that have no rule here, weights that fp16 cannot hold, or ranges that
    are missing or do not fit.
    """
    try:
        proto = onnx.load_from_string(model)
    except Exception as error:  # protobuf's own classes, which onnx does not wrap
        raise PlanError("model.onnx is no ONNX file") from error
    graph = _fold(proto.graph)
    _cast_first(graph)
    half = _half_nodes(graph) if precision != "fp32" else set()
    _name_nodes(graph.nodes)
    chosen = choose_layers(_layers(graph, half), ranges, precision) if precision in EIGHT_BITS else {}
    rounded = {layer.node.name for layer in chosen.values()}
    convolutions = {
        node.name: Convolution(node.output[0], precision if node.name in rounded else "fp16" if i in half else "fp32")
        for i, node in enumerate(graph.nodes)
        if node.op_type in _CONVOLUTIONS
    }
    nodes = _typed_nodes(graph, half)
    if ranges is not None and chosen:
        nodes = insert_pairs(nodes, graph.constants, chosen, ranges, precision)
        _raise_opset(proto)
    _write(graph, nodes)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    return TypedModel(proto.SerializeToString(deterministic=True), convolutions)


def _fold(proto: onnx.GraphProto) -> _Graph:
    """Constants by name; Constant nodes and casts of constants (weights stored as fp16, say) become constants."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.initializer}
    nodes: list[onnx.NodeProto] = []
    origins: dict[str, str] = {}
    for node in proto.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Cast" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]].astype(helper.tensor_dtype_to_np_dtype(_to(node)))
            origins[node.output[0]] = origins.get(node.input[0], node.input[0])
        elif node.op_type == "Cast" and _to(node) not in _FLOATS:
            raise PlanError(f"model.onnx casts to another type than float ({node.name[:80]!r})")
        else:
            nodes.append(node)
    return _Graph(proto, nodes, constants, origins)


def _to(cast: onnx.NodeProto) -> int:
    return next(int(attribute.i) for attribute in cast.attribute if attribute.name == "to")


def _cast_first(graph: _Graph) -> None:
    """Turn Transpose(uint8), Cast into Cast, Transpose: TensorRT does nothing with uint8 but convert it."""
    source = graph.graph.input[0].name
    users = graph.users(source)
    if len(users) == 1 and graph.nodes[users[0]].op_type == "Transpose":
        following = graph.users(graph.nodes[users[0]].output[0])
        if len(following) == 1 and graph.nodes[following[0]].op_type == "Cast":
            transpose, cast = graph.nodes[users[0]], graph.nodes[following[0]]
            cast.input[0], transpose.output[0] = source, cast.output[0]
            transpose.input[0] = cast.output[0] = f"{source}.float"
            graph.nodes[users[0]], graph.nodes[following[0]] = cast, transpose
    if not users or any(graph.nodes[i].op_type != "Cast" for i in users):
        raise PlanError("model.onnx does something else with its uint8 input than convert it to float")


def _half_nodes(graph: _Graph) -> set[int]:
    """Positions of the nodes that run in fp16: behind the normalisation, before the last convolution."""
    exact = {graph.graph.input[0].name}
    body = []
    for i, node in enumerate(graph.nodes):
        if node.op_type not in _BODY:
            raise PlanError(f"operator {node.op_type} has no fp16 form here", fix="build the engine in fp32")
        if node.op_type in _NORMALISING and exact.issuperset(graph.data_inputs(node)):
            exact.update(node.output)
        else:
            body.append(i)
    return set(body) - _last(graph, body)


def _last(graph: _Graph, body: list[int]) -> set[int]:
    """The last convolutions (no other one looks at them) and every node behind them."""
    leads: set[str] = set()  # tensors that some convolution is computed from
    last = set()
    for i in reversed(body):
        node = graph.nodes[i]
        seen = leads.intersection(node.output)
        if node.op_type in _CONVOLUTIONS and not seen:
            last.add(i)
        if node.op_type in _CONVOLUTIONS or seen:
            leads.update(node.input)
    tail: set[str] = set()
    for i in body:
        if i in last or tail.intersection(graph.nodes[i].input):
            last.add(i)
            tail.update(graph.nodes[i].output)
    if graph.graph.output[0].name not in tail:
        raise PlanError("model.onnx gives logits that no convolution computes", fix="build the engine in fp32")
    return last


def _name_nodes(nodes: list[onnx.NodeProto]) -> None:
    """Give every node a name of its own: the engine inspector knows layers by it."""
    taken: set[str] = set()
    for i, node in enumerate(nodes):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}.{i}"
        taken.add(node.name)


def _layers(graph: _Graph, half: set[int]) -> dict[str, Layer]:
    """Convolutions with constant weights, by their name in the checkpoint: that of the weights less ".weight"."""
    return {
        graph.origins.get(node.input[1], node.input[1]).removesuffix(".weight"): Layer(
            node, graph.constants[node.input[1]], i in half
        )
        for i, node in enumerate(graph.nodes)
        if node.op_type in _CONVOLUTIONS and node.input[1] in graph.constants
    }


def _raise_opset(proto: onnx.ModelProto) -> None:
    """To one that has Q/DQ in fp16; the operators of a body mean the same in it."""
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    for opset in proto.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, OPSET)


def _typed_nodes(graph: _Graph, half: set[int]) -> list[onnx.NodeProto]:
    """The nodes with fp16 constants where they run in fp16, and a Cast wherever a tensor enters or leaves fp16."""
    made: dict[str, int] = {}  # float type of each tensor
    nodes: list[onnx.NodeProto] = []
    for i, node in enumerate(graph.nodes):
        kind = TensorProto.FLOAT16 if i in half else TensorProto.FLOAT
        for k, name in enumerate(node.input):
            if name in graph.constants:
                if kind == TensorProto.FLOAT16 and not (node.op_type == "Resize" and k > 0):
                    node.input[k] = _half_constant(graph, name)
            elif made.get(name, kind) != kind:
                node.input[k] = _cast(graph, nodes, name, kind)
        if node.op_type == "Cast":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("to", kind))
        made |= dict.fromkeys(node.output, kind)
        nodes.append(node)
    return nodes


def _half_constant(graph: _Graph, name: str) -> str:
    value = graph.constants[name]
    if value.dtype != np.float32:
        return name
    with np.errstate(over="ignore"):
        half = value.astype(np.float16)
    if not np.isfinite(half).all():
        raise PlanError(f"tensor {name[:80]!r} holds values beyond fp16's 65504", fix="build the engine in fp32")
    graph.constants[f"{name}.fp16"] = half
    return f"{name}.fp16"


def _cast(graph: _Graph, nodes: list[onnx.NodeProto], name: str, kind: int) -> str:
    """The tensor `name` as `kind`, made by one Cast node however many nodes want it."""
    if (name, kind) not in graph.casts:
        graph.casts[name, kind] = target = f"{name}.{'fp16' if kind == TensorProto.FLOAT16 else 'fp32'}"
        nodes.append(helper.make_node("Cast", [name], [target], name=f"{target}.cast", to=kind))
    return graph.casts[name, kind]


def _write(graph: _Graph, nodes: list[onnx.NodeProto]) -> None:
    used = {name for node in nodes for name in node.input}
    copies = []
    for node in nodes:
        copies.append(onnx.NodeProto())
        copies[-1].CopyFrom(node)
    proto = graph.graph
    del proto.node[:], proto.initializer[:], proto.value_info[:]
    proto.node.extend(copies)
    proto.initializer.extend(
        numpy_helper.from_array(np.asarray(value, order="C"), name)
        for name, value in graph.constants.items()
        if name in used
    )
