"""Int8 on the CPU against the same rounding in plain torch, and plans whose ranges do not fit."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from random_networks import folded, noise, plan_of

from histoseg_fast.compiling.calibrate import candidate_ranges
from histoseg_fast.engines import open_engine, openvino, run_tiled
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.plan import MODEL, pack, unpack
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

needs_int8 = pytest.mark.skipif("int8" not in cpu_precisions(), reason="this CPU has no native int8")


def changed(plan, members=None, **manifest):
    """The plan with another model or other manifest fields."""
    fields = {k: v for k, v in plan.manifest.items() if k not in ("format", "version", "members")}
    return unpack(pack(fields | manifest, members or plan.members))


def edited(plan, change, **manifest):
    model = onnx.load_from_string(plan.members[MODEL])
    change(model.graph)
    return changed(plan, {MODEL: model.SerializeToString()}, **manifest)


def ranges(inputs, outputs=()):
    return {"inputs": dict(inputs), "outputs": dict(outputs)}


# -- the same rounding, written out ----------------------------------------------------------------


def rounded(x, low, high, levels):
    """`x` rounded to the nearest of `levels` values from `low` to `high`."""
    step = (high - low) / (levels - 1)
    return torch.round((torch.minimum(torch.maximum(x, low), high) - low) / step) * step + low


def rounded_weights(weights, out_axis):
    others = [axis for axis in range(4) if axis != out_axis]
    limit = weights.abs().amax(others, keepdim=True)
    limit = torch.where(limit == 0, 1.0, limit)
    return rounded(weights, -limit, limit, 255)


def simulated(plan, image):
    """Logits of the tiny network, rounded where the plan's ranges say so."""
    model, limits = onnx.load_from_string(plan.members[MODEL]), plan.ranges
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t), dtype=torch.float64) for t in model.graph.initializer}

    def convolved(name, x, function, out_axis=0, **options):
        weights = tensors[f"{name}.weight"]
        if name in limits.inputs:
            x = rounded(x, torch.tensor(0.0), torch.tensor(limits.inputs[name]), 256)
            weights = rounded_weights(weights, out_axis)
        y = function(x, weights, **options)
        if name in limits.outputs:
            limit = torch.tensor(limits.outputs[name], dtype=torch.float64)
            y = rounded(y, -limit, limit * 127 / 128, 256)
        return y

    x = torch.from_numpy(pad_to_stride(image, 2)).permute(2, 0, 1)[None].double() / 64 - 2
    x = F.max_pool2d(torch.relu(convolved("a", x, F.conv2d, padding=1)), 2)
    x = torch.relu(convolved("b", x, F.conv2d, padding=2))
    x = torch.relu(convolved("up", x, F.conv_transpose2d, out_axis=1, stride=2))
    logits = convolved("logits", x, F.conv2d, padding=1) + tensors["logits.bias"].view(1, -1, 1, 1)
    return logits[0, :, : image.shape[0], : image.shape[1]].numpy()


def no_change(graph):
    pass


def a_channel_of_zeros(graph):
    for tensor in graph.initializer:
        if tensor.name in ("b.weight", "up.weight"):
            values = numpy_helper.to_array(tensor).copy()
            values[(3,) if tensor.name == "b.weight" else (slice(None), 3)] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def stored_in_fp16(graph):
    (weights,) = (t for t in graph.initializer if t.name == "b.weight")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights).astype(np.float16), "b.weight"))
    graph.node.insert(0, helper.make_node("Cast", ["b.weight"], ["b.weight.fp32"], to=onnx.TensorProto.FLOAT))
    for node in graph.node[1:]:
        for i, name in enumerate(node.input):
            node.input[i] = {"b.weight": "b.weight.fp32"}.get(name, name)


@needs_int8
@pytest.mark.parametrize("change", [no_change, a_channel_of_zeros, stored_in_fp16])
@pytest.mark.parametrize(
    "given",
    [
        ranges({"b": 5.0}),
        ranges({"up": 6.0}),
        ranges({"b": 5.0, "up": 6.0, "logits": 9.0}),
        ranges({"b": 1.0, "up": 2.0}),  # most values are beyond them
        ranges({"b": 5.0, "up": 6.0}, {"b": 7.0}),
        ranges({}, {"b": 7.0, "up": 9.0}),
    ],
)
def test_int8_is_the_rounding_that_the_plan_says(tiny_plan, monkeypatch, change, given):
    monkeypatch.setattr(openvino, "cpu_precisions", lambda: ("fp32", "int8"))  # the rest in fp32
    plan = edited(tiny_plan, change, int8=given)
    for height, width in ((1, 1), (33, 48)):
        image = noise(height, width)
        with (
            open_engine(plan, device="cpu", precision="int8") as engine,
            open_engine(plan, device="cpu", precision="fp32") as exact,
        ):
            assert engine.precision == "int8"
            found, plain = run_tiled(engine, plan, image), run_tiled(exact, plan, image)
        expected = simulated(plan, image)
        scale = np.abs(plain).max()
        # A sum that lies between two steps may be rounded the other way: single pixels differ by a step.
        assert np.abs(found - expected).max() < 0.05 * scale
        assert np.abs(found - expected).mean() < 0.1 * np.abs(found - plain).mean()


@needs_int8
def test_the_fast_network_in_int8():
    """A field: classes as in fp32, and the tile size changes nothing to speak of."""
    image = make_field(1)[0][:480, :416]
    limits = candidate_ranges(folded("fast"), [(make_field(2)[0][:256, :256], None)])[0]
    plan = changed(plan_of("fast"), int8=ranges(limits.inputs, limits.outputs))
    with (
        open_engine(plan, device="cpu", precision="fp32") as exact,
        open_engine(plan, device="cpu", precision="int8") as engine,
    ):
        expected, found = run_tiled(exact, plan, image), run_tiled(engine, plan, image)
        tiled = run_tiled(engine, plan, image, 2 * plan.halo + 2 * plan.stride)
    assert not np.array_equal(found, expected)
    assert (found.argmax(0) == expected.argmax(0)).mean() >= 0.95
    assert (tiled.argmax(0) == found.argmax(0)).mean() >= 0.999


@needs_int8
def test_the_papers_network_in_int8():
    image = make_field(1)[0][:128, :160]
    limits = candidate_ranges(folded("final"), [(make_field(2)[0][:96, :96], None)])[0]
    assert "head.up2" in limits.inputs and not limits.outputs
    plan = changed(plan_of("final"), int8=ranges(limits.inputs))
    with (
        open_engine(plan, device="cpu", precision="fp32") as exact,
        open_engine(plan, device="cpu", precision="int8") as engine,
    ):
        expected, found = run_tiled(exact, plan, image), run_tiled(engine, plan, image)
    assert (found.argmax(0) == expected.argmax(0)).mean() >= 0.95


# -- ranges that do not fit ------------------------------------------------------------------------


def computed_weights(graph):
    """b's weights are the sum of two constants."""
    graph.node.insert(0, helper.make_node("Add", ["b.weight", "b.weight"], ["twice"]))
    for node in graph.node:
        if node.op_type == "Conv" and "b.weight" in node.input:
            node.input[1] = "twice"


@pytest.mark.parametrize(
    ("change", "given"),
    [
        (no_change, ranges({"c": 1.0})),
        (no_change, ranges({}, {"c": 1.0})),
        (no_change, ranges({"b": 1.0, "b.weight": 1.0})),
        (no_change, ranges({"rgb": 1.0})),
        (no_change, ranges({"scale": 1.0})),
        (no_change, ranges({"": 1.0})),
        (no_change, ranges({"\n\x1b[31m": 1.0})),
        (computed_weights, ranges({"b": 1.0})),
        (computed_weights, ranges({"rgb": 1.0})),
    ],
)
def test_ranges_of_layers_that_the_network_lacks(tiny_plan, monkeypatch, change, given):
    plan = edited(tiny_plan, change, int8=given)
    monkeypatch.setattr("histoseg_fast.engines.cpu_precisions", lambda: ("fp32", "int8"))
    with pytest.raises(PlanError, match="no convolution of its network") as caught:
        open_engine(plan, device="cpu", precision="int8")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    with open_engine(plan, device="cpu", precision="fp32") as engine:
        assert np.isfinite(run_tiled(engine, plan, noise(8, 8))).all()


def computed_in_fp16(graph):
    """b's convolution, as a plan from elsewhere may have it."""
    (weights,) = (t for t in graph.initializer if t.name == "b.weight")
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights).astype(np.float16), "b.weight"))
    (place,) = (i for i, node in enumerate(graph.node) if "b.weight" in node.input)
    convolution = graph.node[place]
    after = helper.make_node("Cast", ["b.out"], [convolution.output[0]], to=onnx.TensorProto.FLOAT)
    before = helper.make_node("Cast", [convolution.input[0]], ["b.in"], to=onnx.TensorProto.FLOAT16)
    convolution.input[0], convolution.output[0] = "b.in", "b.out"
    graph.node.insert(place + 1, after)
    graph.node.insert(place, before)


@needs_int8
def test_a_layer_in_fp16_is_rounded_too(tiny_plan):
    plan = edited(tiny_plan, computed_in_fp16, int8=ranges({"b": 5.0}, {"b": 7.0}))
    with open_engine(plan, device="cpu", precision="int8") as engine:
        found = run_tiled(engine, plan, noise(18, 20))
    expected = simulated(changed(tiny_plan, int8=ranges({"b": 5.0}, {"b": 7.0})), noise(18, 20))
    assert (found.argmax(0) == expected.argmax(0)).mean() > 0.9


@needs_int8
@pytest.mark.parametrize("limit", [1.1e-30, 9e29])
@pytest.mark.parametrize("name", ["a", "b", "up", "logits"])
def test_hostile_ranges_cost_the_answer_and_nothing_else(tiny_plan, limit, name):
    plan = changed(tiny_plan, int8=ranges({name: limit}, {name: limit}))
    try:
        with open_engine(plan, device="cpu", precision="int8") as engine:
            assert run_tiled(engine, plan, noise(20, 22)).shape == (3, 20, 22)
    except EngineError as error:
        assert str(error).isprintable()


def test_int8_needs_ranges(tiny_plan):
    with pytest.raises(EngineError, match="compiled without int8"):
        open_engine(tiny_plan, device="cpu", precision="int8")
