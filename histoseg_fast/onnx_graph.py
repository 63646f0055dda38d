"""What a plan's ONNX model must be before any engine parses it: a bounded list of nodes in order, without loops.

Engines trust a model to be sound. OpenVINO follows a cycle until memory ends, and unrolls a loop of 2^62 rounds; so the
few fields that matter are read here, straight from the protobuf bytes: inference needs no onnx package.
"""

from __future__ import annotations

from collections.abc import Iterator

from histoseg_fast.errors import PlanError

MAX_NODES = 4096
"""Most operators of a network; OpenVINO's time grows with their square."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_MAX_VARINT_BYTES = 10
# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_SPARSE = 1, 5, 11, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_ATTRIBUTE = 1, 2, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES = 6, 11, 22, 23
_TENSOR_NAME, _VALUE_NAME = 8, 1


def check_graph(model: bytes) -> None:
    """PlanError unless `model` is an ONNX model whose nodes read only what earlier ones gave, with no graphs within.

    Refused as well: more than `MAX_NODES`, functions of the model's own, sparse tensors (a few bytes that claim any
    size). Types, shapes and operators are left to the engine.
    """
    nodes: list[memoryview] = []
    known: set[bytes] = {b""}  # an input that is left out
    for number, value in _fields(memoryview(model)):
        if number == _MODEL_FUNCTIONS:
            raise PlanError("has functions of its own")
        if number != _MODEL_GRAPH:
            continue
        for part, content in _fields(value):  # a field that comes twice is one that goes on
            if part == _GRAPH_NODE:
                nodes.append(content)
            elif part == _GRAPH_INITIALIZER:
                known.update(_strings(content, _TENSOR_NAME))
            elif part == _GRAPH_INPUT:
                known.update(_strings(content, _VALUE_NAME))
            elif part == _GRAPH_SPARSE:
                raise PlanError("has sparse tensors")
    if not 0 < len(nodes) <= MAX_NODES:
        raise PlanError(f"has {len(nodes)} operators; 1 to {MAX_NODES} are allowed")
    for node in nodes:
        _check_node(node, known)


def _check_node(node: memoryview, known: set[bytes]) -> None:
    """`known`: the tensors that are there before; the node's own are added."""
    if not known.issuperset(_strings(node, _NODE_INPUT)):
        raise PlanError("has an operator that reads what no earlier one gives")
    for number, value in _fields(node):
        held = {field for field, _ in _fields(value)} if number == _NODE_ATTRIBUTE else set()
        if held & {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS}:
            raise PlanError("has a loop or a branch")
        if held & {_ATTRIBUTE_SPARSE, _ATTRIBUTE_SPARSES}:
            raise PlanError("has sparse tensors")
    for name in _strings(node, _NODE_OUTPUT):
        if name in known and name:
            raise PlanError("has two operators that give one tensor")
        known.add(name)


def _strings(message: memoryview, wanted: int) -> list[bytes]:
    return [bytes(value) for number, value in _fields(message) if number == wanted]


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Numbers and contents of the fields of a protobuf message; contents that are numbers come as nothing."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind, size = key & 7, 0
        if kind == _VARINT:
            _, position = _varint(message, position)
        elif kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in _FIXED:
            position += _FIXED[kind]
        else:
            raise PlanError("is no ONNX model")
        if position + size > len(message):
            raise PlanError("is cut off, or no ONNX model")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number of variable length, and where the next field begins."""
    value = 0
    for i, byte in enumerate(message[position : position + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, position + i + 1
    raise PlanError("is cut off, or no ONNX model")
