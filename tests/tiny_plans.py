"""A network of a few hundred weights and a manifest that fits it: plans that run fast."""

from __future__ import annotations

import numpy as np
import pytest

from histoseg_fast.plan import Plan, pack, unpack


def tiny_model(seed: int = 0) -> bytes:
    """A network of a few hundred weights that looks around itself: conv 3x3, pool, conv 5x5, up 2x2, conv 3x3."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)

    def tensor(name: str, *shape: int) -> onnx.TensorProto:
        scale = 1.5 / np.sqrt(np.prod(shape[1:]) or 1)
        return numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), name)

    constants = [
        numpy_helper.from_array(np.float32(1 / 64), "scale"),
        numpy_helper.from_array(np.float32(-2), "shift"),
        tensor("a.weight", 8, 3, 3, 3),
        tensor("b.weight", 8, 8, 5, 5),
        tensor("up.weight", 8, 8, 2, 2),
        tensor("logits.weight", 3, 8, 3, 3),
        tensor("logits.bias", 3),
    ]
    nodes = [
        helper.make_node("Transpose", ["rgb"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["x0"]),
        helper.make_node("Conv", ["x0", "a.weight"], ["x1"], pads=[1] * 4),
        helper.make_node("Relu", ["x1"], ["x2"]),
        helper.make_node("MaxPool", ["x2"], ["x3"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["x3", "b.weight"], ["x4"], pads=[2] * 4),
        helper.make_node("Relu", ["x4"], ["x5"]),
        helper.make_node("ConvTranspose", ["x5", "up.weight"], ["x6"], strides=[2, 2]),
        helper.make_node("Relu", ["x6"], ["x7"]),
        helper.make_node("Conv", ["x7", "logits.weight", "logits.bias"], ["logits"], pads=[1] * 4),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("rgb", TensorProto.UINT8, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def tiny_manifest(**changes: object) -> dict[str, object]:
    """A manifest that fits `tiny_model`."""
    return {
        "name": "tiny",
        "arch": "tiny",
        "classes": [
            {"name": "background", "colour": [0, 0, 0]},
            {"name": "cancer", "colour": [255, 0, 0]},
            {"name": "stroma", "colour": [0, 255, 0]},
        ],
        "normalisation": {},
        "stride": 2,
        "halo": 8,
        "tile": {"default": 128},
        "precision": "auto",
        "precisions": {"fp32": {"agreement": 1.0}},
        "training": {},
        "scores": {},
        "made_with": {},
        **changes,
    }


def changed(plan: Plan, members: dict[str, bytes] | None = None, **manifest: object) -> Plan:
    """The plan with another model or other manifest fields."""
    fields = {k: v for k, v in plan.manifest.items() if k not in ("format", "version", "members")}
    return unpack(pack(fields | manifest, members or plan.members))
