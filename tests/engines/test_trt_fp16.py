"""The strongly typed graph: types where they belong, and numbers as near to fp32's as fp16 allows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_files import graph, kinds_of, openvino_logits, tensor_core_logits
from PIL import Image
from random_networks import exported, noise

from histoseg_fast.engines.trt.fp16 import typed_model
from histoseg_fast.errors import PlanError
from histoseg_fast.models.architectures import ARCHITECTURES
from histoseg_fast.plan import MODEL
from histoseg_fast.plans import open_plan

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
CONVOLUTIONS = ("Conv", "ConvTranspose")


def model_of(name, tiny_plan):
    return {"tiny": lambda: tiny_plan.members[MODEL], "shipped": lambda: open_plan("final").members[MODEL]}.get(
        name, lambda: exported(name).SerializeToString()
    )()


START = [("Transpose", ["rgb"], ["t"], {"perm": [0, 3, 1, 2]}), ("Cast", ["t"], ["x"], {"to": FLOAT})]
WEIGHTS = ("w", np.full((3, 3, 1, 1), 0.5, np.float32))


# -- types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "shipped", *ARCHITECTURES])
def test_types_are_where_they_belong(tiny_plan, name):
    typed = typed_model(model_of(name, tiny_plan), "fp16")
    model = onnx.load_from_string(typed.data)
    kinds = kinds_of(model)
    assert (kinds["rgb"], kinds["logits"]) == (TensorProto.UINT8, FLOAT)
    (first,) = [node for node in model.graph.node if "rgb" in node.input]
    assert first.op_type == "Cast" and first.attribute[0].i == FLOAT  # all that TensorRT does with uint8
    nodes = [node for node in model.graph.node if node.op_type in CONVOLUTIONS]
    for node in nodes[:-1]:
        assert {kinds[tensor] for tensor in (*node.input, *node.output)} == {HALF}
    assert {kinds[tensor] for tensor in (*nodes[-1].input, *nodes[-1].output)} == {FLOAT}
    for node in model.graph.node:
        if node.op_type in ("Mul", "Sub", "Div") or (node.op_type == "Add" and "shift" in node.input):
            assert {kinds[tensor] for tensor in (*node.input, *node.output)} == {FLOAT}, "normalisation"
        if node.op_type == "Resize":
            assert kinds[node.input[2]] == FLOAT and kinds[node.input[0]] == HALF
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert len(casts) == 3  # of the input, into fp16, out of it: a cast inside would cost
    assert [c.precision for c in typed.convolutions.values()] == ["fp16"] * (len(nodes) - 1) + ["fp32"]
    assert list(typed.convolutions) == [node.name for node in nodes]
    assert [c.output for c in typed.convolutions.values()] == [node.output[0] for node in nodes]


@pytest.mark.parametrize("name", ["tiny", "shipped", "fast"])
def test_fp32_keeps_every_number_and_casts_first(tiny_plan, name):
    data = model_of(name, tiny_plan)
    typed = typed_model(data, "fp32")
    assert {c.precision for c in typed.convolutions.values()} == {"fp32"}
    image = noise(32, 64)[None]
    np.testing.assert_array_equal(openvino_logits(typed.data, image), openvino_logits(data, image))
    assert [n.op_type for n in onnx.load_from_string(typed.data).graph.node][:2] == ["Cast", "Transpose"]


def test_the_same_model_gives_the_same_bytes(tiny_plan):
    assert typed_model(tiny_plan.members[MODEL], "fp16") == typed_model(tiny_plan.members[MODEL], "fp16")


def test_weights_stored_as_fp16_are_constants_again():
    """Behind a Cast node TensorRT would take them for tensors that change."""
    nodes = [*START, ("Cast", ["h"], ["w"], {"to": FLOAT}), ("Conv", ["x", "w"], ["logits"], {})]
    for precision in ("fp16", "fp32"):
        model = onnx.load_from_string(typed_model(graph(nodes, [("h", WEIGHTS[1].astype(np.float16))]), precision).data)
        assert [node.op_type for node in model.graph.node][-1] == "Conv"
        assert model.graph.node[-1].input[1] in {tensor.name for tensor in model.graph.initializer}


def test_two_branches_share_one_cast_and_a_late_skip_is_cast_back():
    nodes = [
        *START,
        ("Conv", ["x", "w"], ["a"], {}),
        ("Conv", ["x", "w"], ["b"], {}),
        ("Add", ["a", "b"], ["c"], {}),
        ("Relu", ["c"], ["d"], {}),
        ("Conv", ["d", "w"], ["e"], {}),
        ("Add", ["e", "d"], ["logits"], {}),
    ]
    data = graph(nodes, [WEIGHTS])
    typed = typed_model(data, "fp16")
    model = onnx.load_from_string(typed.data)
    assert sum(node.op_type == "Cast" for node in model.graph.node) == 3
    assert [c.precision for c in typed.convolutions.values()] == ["fp16", "fp16", "fp32"]
    image = noise(8, 8)[None]
    np.testing.assert_allclose(openvino_logits(typed.data, image), openvino_logits(data, image), rtol=1e-2)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "two", "fast"])
def test_fp16_is_near_fp32(tiny_plan, name):
    """Every tensor between rounded to fp16, as on a GPU."""
    data = model_of(name, tiny_plan)
    image = noise(32, 32)[None]
    exact, logits = openvino_logits(data, image), tensor_core_logits(typed_model(data, "fp16").data, image)
    assert logits.dtype == np.float32 and not np.array_equal(logits, exact)
    np.testing.assert_allclose(logits, exact, atol=5e-3 * np.abs(exact).max())


def test_the_shipped_plan_in_fp16_gives_the_same_classes(real_data):
    data = open_plan("final").members[MODEL]
    path = sorted((real_data / "lung").rglob("*.png"))[0]
    image = np.asarray(Image.open(path).convert("RGB"))[100:164, 100:164][None].copy()
    exact, logits = openvino_logits(data, image), tensor_core_logits(typed_model(data, "fp16").data, image)
    assert exact.shape == logits.shape
    assert (exact.argmax(1) == logits.argmax(1)).mean() >= 0.995
    np.testing.assert_allclose(logits, exact, atol=0.02)


# -- what has no rule ------------------------------------------------------------------------------

WRONG = {
    "weights beyond fp16": ([*START, ("Conv", ["x", "w"], ["y"], {}), ("Conv", ["y", "w"], ["logits"], {})], "65504"),
    "operator": ([*START, ("Softmax", ["x"], ["y"], {}), ("Conv", ["y", "w"], ["logits"], {})], "Softmax"),
    "no convolution": ([*START, ("Relu", ["x"], ["logits"], {})], "no convolution"),
    "arithmetic on uint8": ([("Relu", ["rgb"], ["logits"], {})], "uint8"),
    "integers": ([*START, ("Cast", ["x"], ["y"], {"to": TensorProto.INT32})], "another type"),
}


@pytest.mark.parametrize("name", WRONG)
def test_graphs_without_a_rule(name):
    nodes, words = WRONG[name]
    with pytest.raises(PlanError, match=words) as caught:
        typed_model(graph(nodes, [("w", np.full((3, 3, 1, 1), 1e6, np.float32))]), "fp16")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize("data", [b"hello", b"\xff" * 50])
def test_bytes_that_are_no_model(data):
    with pytest.raises(PlanError):
        typed_model(data, "fp16")
