"""Checkpoint to ONNX: uint8 RGB in, normalisation inside, float logits out, any batch and any size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from math import prod

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from histoseg_fast.models.base import Network
from histoseg_fast.models.network import UInt8Network

OPSET = 18
SMALLEST_HALVED = 256
"""Tensors of at least this many values are stored in fp16, in half the bytes, unless one is beyond fp16's range."""


def export_onnx(network: Network) -> onnx.ModelProto:
    """The network as ONNX: input `rgb` uint8 (n, h, w, 3), output `logits` float32 (n, C, h, w).

    h and w must be multiples of the network's stride. Initialisers carry the checkpoint's tensor names (where it has
    batch norms: those of its folded form); the weights are stored in fp16 and computed with in fp32.
    Nothing of the machine that exported it (paths, stack traces) stays in the file.
    """
    side = 8 * network.stride
    example = torch.zeros(2, side, 2 * side, 3, dtype=torch.uint8)
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                UInt8Network(network).cpu().eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["rgb"],
                output_names=["logits"],
                dynamic_shapes=({0: "n", 1: "h", 2: "w"},),
                verbose=False,
            )
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
    assert program is not None
    model = program.model_proto
    _strip(model)
    _halve(model.graph)
    onnx.checker.check_model(model)
    return model


def _halve(graph: onnx.GraphProto) -> None:
    """Store the large fp32 tensors in fp16, each with a Cast back to fp32 behind it."""
    large = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and prod(t.dims) >= SMALLEST_HALVED]
    large = [t for t in large if np.abs(numpy_helper.to_array(t)).max() <= np.finfo(np.float16).max]
    names = {tensor.name: f"{tensor.name}.fp32" for tensor in large}
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    for tensor in large:
        half = numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    casts = [helper.make_node("Cast", [n], [names[n]], f"{n}.cast", to=onnx.TensorProto.FLOAT) for n in names]
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _strip(model: onnx.ModelProto) -> None:
    graph = model.graph
    names = {t.name: t.name.removeprefix("network.") for t in graph.initializer}
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    del graph.value_info[:]
    del model.functions[:]
    logits = graph.output[0].type.tensor_type.shape.dim
    for dim, name in ((2, "h"), (3, "w")):
        logits[dim].dim_param = name
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.doc_string = ""
