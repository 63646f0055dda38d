"""Checkpoint to ONNX: uint8 RGB in, normalisation inside, float logits out, any batch and any size."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings

import onnx
import torch

from histoseg_fast.models.network import SegmentationNetwork, UInt8Network

OPSET = 18


def export_onnx(network: SegmentationNetwork) -> onnx.ModelProto:
    """The network as ONNX: input `rgb` uint8 (n, h, w, 3), output `logits` float32 (n, C, h, w).

    h and w must be multiples of the network's stride. Initialisers carry the checkpoint's tensor names.
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
    model = program.model_proto
    _strip(model)
    onnx.checker.check_model(model)
    return model


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
