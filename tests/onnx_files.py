"""Small ONNX files of a test's own, the types in one, and what it computes: in fp32, and as tensor cores do it."""

from __future__ import annotations

import numpy as np
import onnx
import openvino as ov
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn.functional import conv2d, conv_transpose2d


def kinds_of(model):
    """Float type of every tensor of a typed model."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    kinds |= {t.name: t.data_type for t in model.graph.initializer}
    return kinds | {v.name: v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)}


def graph(nodes, constants=(), outputs=("logits",)):
    """A model of one's own around `nodes`, uint8 rgb in."""
    made = helper.make_graph(
        [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in nodes],
        "g",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3, "h", "w"]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9).SerializeToString()


def openvino_logits(model, image):
    core = ov.Core()
    return core.compile_model(core.read_model(model), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)[0]


def in_fp32(function, *tensors, **attributes):
    """A convolution as tensor cores do it: sums in fp32, rounded to the inputs' type at the end."""
    floats = [None if tensor is None else torch.from_numpy(tensor.astype(np.float32)) for tensor in tensors]
    return function(*floats, **attributes).numpy().astype(tensors[0].dtype)


class TensorCoreConv(OpRun):
    op_domain = ""

    def _run(self, x, w, b=None, strides=None, pads=None, **_):
        before, after = (pads or [0] * 4)[:2], (pads or [0] * 4)[2:]
        assert before == after
        return (in_fp32(conv2d, x, w, b, stride=tuple(strides or (1, 1)), padding=tuple(before)),)


class TensorCoreConvTranspose(OpRun):
    op_domain = ""

    def _run(self, x, w, b=None, strides=None, **_):
        return (in_fp32(conv_transpose2d, x, w, b, stride=tuple(strides or (1, 1))),)


TensorCoreConv.__name__, TensorCoreConvTranspose.__name__ = "Conv", "ConvTranspose"  # the operators they stand for


def tensor_core_logits(model, image):
    session = ReferenceEvaluator(onnx.load_from_string(model), new_ops=[TensorCoreConv, TensorCoreConvTranspose])
    return session.run(None, {"rgb": image})[0]
