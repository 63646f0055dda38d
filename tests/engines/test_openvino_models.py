"""Models that the CPU engine does not run are refused in one line."""

from __future__ import annotations

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from random_networks import noise
from tiny_plans import changed

from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.plan import MODEL


def edit(plan, change):
    model = onnx.load_from_string(plan.members[MODEL])
    change(model.graph)
    return changed(plan, {MODEL: model.SerializeToString()})


def input_type(graph):
    graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def input_shape(*dims):
    def change(graph):
        graph.input[0].CopyFrom(helper.make_tensor_value_info("rgb", TensorProto.UINT8, dims))

    return change


def planes_first(graph):
    del graph.node[0]
    graph.node[0].input[0] = "rgb"
    input_shape("n", 3, "h", "w")(graph)


def two_outputs(graph):
    graph.output.append(helper.make_tensor_value_info("x7", TensorProto.FLOAT, ["n", 8, "h", "w"]))


def two_inputs(graph):
    graph.input.append(helper.make_tensor_value_info("more", TensorProto.UINT8, ["n", "h", "w", 3]))
    graph.node.append(helper.make_node("Cast", ["more"], ["more_float"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Shape", ["more_float"], ["unused"]))


def other_output(name, channels):
    def change(graph):
        graph.output[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", channels, "h", "w"]))

    return change


def integer_output(graph):
    graph.node.append(helper.make_node("Cast", ["logits"], ["ids"], to=TensorProto.INT32))
    graph.output[0].CopyFrom(helper.make_tensor_value_info("ids", TensorProto.INT32, ["n", 3, "h", "w"]))


def dynamic_rank(graph):
    graph.input[0].type.tensor_type.ClearField("shape")


def unknown_operator(graph):
    graph.node[5].op_type = "Frobnicate"


WRONG = {
    "float input": input_type,
    "planes first": planes_first,
    "fixed size": input_shape(1, 64, 64, 3),
    "fixed batch": input_shape(1, "h", "w", 3),
    "four channels": input_shape("n", "h", "w", 4),
    "unknown channels": input_shape("n", "h", "w", "c"),
    "no batch": input_shape("h", "w", 3),
    "any rank": dynamic_rank,
    "eight classes": other_output("x7", 8),
    "two outputs": two_outputs,
    "two inputs": two_inputs,
    "integers out": integer_output,
    "unknown operator": unknown_operator,
}


def refusal(plan, members=None, **manifest):
    """What is said of a plan as it is read, or at the latest when it is opened."""
    with pytest.raises(PlanError) as caught:
        open_engine(changed(plan, members, **manifest), precision="fp32")
    return str(caught.value)


def in_one_line(message):
    return message.isprintable() and MODEL in message and len(message) < 500


@pytest.mark.parametrize("name", WRONG)
def test_models_of_another_kind(tiny_plan, name):
    assert in_one_line(refusal(edit(tiny_plan, WRONG[name])))


@pytest.mark.parametrize("classes", [2, 4])
def test_another_number_of_classes(tiny_plan, classes):
    assert in_one_line(refusal(tiny_plan, classes=[{"name": f"c{i}", "colour": [i, 0, 0]} for i in range(classes)]))


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 1000, b"\xff" * 64, b"<?xml version='1.0'?><net/>"])
def test_bytes_that_are_no_model(tiny_plan, content):
    assert in_one_line(refusal(tiny_plan, {MODEL: content}))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_truncated_models(tiny_plan, data):
    model = tiny_plan.members[MODEL]
    assert in_one_line(refusal(tiny_plan, {MODEL: model[: data.draw(st.integers(0, len(model) - 40))]}))


def test_a_model_that_changes_the_size_fails_in_one_line(tiny_plan):
    def half(graph):
        graph.node[9].attribute[0].CopyFrom(helper.make_attribute("strides", [1, 1]))

    with open_engine(edit(tiny_plan, half), precision="fp32") as engine, pytest.raises(EngineError) as caught:
        run_tiled(engine, tiny_plan, noise(32, 32))
    assert "logits" in str(caught.value) and str(caught.value).isprintable()
