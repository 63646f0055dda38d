"""Q/DQ pairs in the typed graph: where they belong, the same rounding as in plain torch, and what the plans lose."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from onnx_files import graph, kinds_of, openvino_logits, tensor_core_logits
from random_networks import noise

from histoseg_fast import extras
from histoseg_fast.engines.trt.fp16 import typed_model
from histoseg_fast.errors import PlanError
from histoseg_fast.plan import MODEL, Ranges
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field

EIGHT_BITS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
HALF = TensorProto.FLOAT16
RANGES = Ranges({"b": 3.0, "c": 4.0, "up": 5.0}, {"c": 3.5})
SMALLEST = 2.0**-24
"""The least positive fp16."""


def constants(channels=16):
    """Of `network`."""
    rng = np.random.default_rng(5)

    def weights(*shape):
        return (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)

    c = channels
    shapes = {"a": (c, 3, 3, 3), "b": (c, c, 3, 3), "c": (c, c, 1, 1), "up": (c, c, 2, 2), "logits": (3, c, 3, 3)}
    made = {f"{name}.weight": weights(*shape) for name, shape in shapes.items()}
    made["b.weight"][3] = 0  # a channel of nothing but zeros
    made |= {f"{name}.bias": weights(shape[0]) / 4 for name, shape in shapes.items()}
    return made | {"scale": np.float32(1 / 64), "shift": np.float32(-2)}


def network(channels=16, extra=(), **more):
    """Two convolutions beside a skip, a transposed one, and the last; weights stored as the package's plans do."""
    made = constants(channels) | more
    stored = {n: v.astype(np.float16) if n.endswith("weight") and n not in more else v for n, v in made.items()}
    casts = [
        ("Cast", [n], [f"{n}.fp32"], {"to": TensorProto.FLOAT}) for n, v in stored.items() if v.dtype == np.float16
    ]
    name = {node[1][0]: node[2][0] for node in casts}

    def conv(op, x, layer, y, **attributes):
        return (op, [x, name.get(f"{layer}.weight", f"{layer}.weight"), f"{layer}.bias"], [y], attributes)

    nodes = [
        *casts,
        ("Transpose", ["rgb"], ["planes"], {"perm": [0, 3, 1, 2]}),
        ("Cast", ["planes"], ["floats"], {"to": TensorProto.FLOAT}),
        ("Mul", ["floats", "scale"], ["scaled"], {}),
        ("Add", ["scaled", "shift"], ["x"], {}),
        conv("Conv", "x", "a", "a.out", pads=[1] * 4),
        ("Relu", ["a.out"], ["a.relu"], {}),
        ("MaxPool", ["a.relu"], ["pool"], {"kernel_shape": [2, 2], "strides": [2, 2]}),
        conv("Conv", "pool", "b", "b.out", pads=[1] * 4),
        ("Relu", ["b.out"], ["b.relu"], {}),
        conv("Conv", "b.relu", "c", "c.out"),
        ("Add", ["c.out", "pool"], ["sum"], {}),
        ("Relu", ["sum"], ["s"], {}),
        conv("ConvTranspose", "s", "up", "up.out", strides=[2, 2]),
        ("Relu", ["up.out"], ["u"], {}),
        *extra,
        conv("Conv", "u", "logits", "logits", pads=[1] * 4),
    ]
    return graph(nodes, stored.items())


# -- the same rounding, written out ----------------------------------------------------------------


def rounded(x, limit, precision):
    """`x` in 8 bits and back, with an fp16 scale."""
    exact = torch.as_tensor(limit, dtype=torch.float64) / {"int8": 127, "fp8": 448}[precision]
    scale = exact.half()
    scale = torch.where(scale.double() < exact, (scale.view(torch.int16) + 1).view(torch.half), scale).double()
    if precision == "int8":
        return torch.clamp(torch.round(x / scale), -128, 127) * scale
    return (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale


def simulated(image, precision, ranges):
    made = {n: torch.tensor(v.astype(np.float16).astype(np.float64)) for n, v in constants().items()}

    def layer(name, x, function, **options):
        weights = made[f"{name}.weight"]
        if name in ranges.inputs and not (name == "up" and precision == "fp8"):
            limit = weights.abs().amax((1, 2, 3), keepdim=True) if name != "up" else weights.abs().max()
            weights = rounded(weights, torch.where(limit == 0, 1.0, limit), precision)
        return function(x, weights, made[f"{name}.bias"], **options)

    def data(name, x, side):
        limits = getattr(ranges, side)
        return (
            rounded(x, limits[name], precision) if name in limits and not (name == "up" and precision == "fp8") else x
        )

    x = torch.from_numpy(image).permute(0, 3, 1, 2).double() / 64 - 2
    pool = data("b", F.max_pool2d(torch.relu(layer("a", x, F.conv2d, padding=1)), 2), "inputs")
    b = data("c", torch.relu(layer("b", pool, F.conv2d, padding=1)), "inputs")
    c = data("c", layer("c", b, F.conv2d), "outputs")
    up = torch.relu(layer("up", data("up", torch.relu(c + pool), "inputs"), F.conv_transpose2d, stride=2))
    return layer("logits", up, F.conv2d, padding=1).numpy()


@pytest.mark.parametrize("precision", EIGHT_BITS)
@pytest.mark.parametrize("run", [openvino_logits, tensor_core_logits])
@pytest.mark.parametrize(
    "ranges",
    [RANGES, Ranges({"b": 3.0}, {}), Ranges({"b": 0.5, "c": 0.5}, {}), Ranges({"c": 4.0}, {"c": 3.5})],
)
def test_the_graph_rounds_as_the_plan_says(precision, run, ranges):
    model, image = network(), noise(12, 16)[None]
    exact, expected = openvino_logits(model, image), simulated(image, precision, ranges)
    found = run(typed_model(model, precision, ranges).data, image)
    # A value that lies between two steps may be rounded the other way: single pixels differ by a step.
    assert np.abs(found - expected).mean() < 0.1 * np.abs(found - exact).mean()
    assert np.abs(found - expected).max() < 0.1 * np.abs(exact).max()


# -- where the pairs are ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", EIGHT_BITS)
@pytest.mark.parametrize("name", ["fast", "final"])
def test_convolutions_read_8_bit_data_and_weights(name, precision):
    plan, eight = open_plan(name), EIGHT_BITS[precision]
    typed = typed_model(plan.members[MODEL], precision, plan.ranges)
    model = onnx.load_from_string(typed.data)
    kinds = kinds_of(model)
    made = {node.output[0]: node for node in model.graph.node}
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    counts = [c.precision for c in typed.convolutions.values()]
    assert counts[0] == "fp16" and counts[-1] == "fp32"
    assert counts.count(precision) == {"fast": 21, "final": 11 if precision == "int8" else 9}[name]
    for node in model.graph.node:
        if node.name not in typed.convolutions:
            continue
        if typed.convolutions[node.name].precision != precision:
            assert node.input[1] in values
            continue
        data, weights = (made[name] for name in node.input[:2])
        assert data.op_type == weights.op_type == "DequantizeLinear"
        assert made[data.input[0]].op_type == "QuantizeLinear" and kinds[weights.input[0]] == eight
        assert {kinds[tensor] for tensor in (*node.input, *node.output)} == {HALF}
        stored, scale = (values[name] for name in weights.input[:2])
        assert scale.shape == ((stored.shape[0],) if node.op_type == "Conv" else ())
        assert np.abs(stored.astype(np.float32)).max() == {"int8": 127, "fp8": 448}[precision]
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len({pair.input[0] for pair in pairs}) == len(pairs)  # one a tensor
    for pair in pairs:
        assert [node.op_type for node in model.graph.node if pair.input[0] in node.input] == ["QuantizeLinear"]
        assert kinds[pair.input[0]] == kinds[pair.input[1]] == HALF and values[pair.input[1]] > 0
        assert kinds[pair.output[0]] == eight
    assert len(typed.data) < 0.6 * len(typed_model(plan.members[MODEL], "fp16").data)
    assert model.opset_import[0].version == 21


def test_both_branches_of_a_sum_are_rounded():
    model = onnx.load_from_string(typed_model(network(), "int8", RANGES).data)
    (total,) = (node for node in model.graph.node if node.output[0] == "sum")
    assert list(total.input) == ["c.out.rounded", "pool.rounded"]


def test_the_other_precisions_keep_their_opset_and_their_bytes():
    for precision in ("fp16", "fp32"):
        typed = typed_model(network(), precision, RANGES)
        assert onnx.load_from_string(typed.data).opset_import[0].version == 18
        assert typed == typed_model(network(), precision)


def test_the_same_ranges_give_the_same_bytes_and_others_give_others():
    first, again = (typed_model(network(), "int8", RANGES) for _ in range(2))
    assert first == again and first.data != typed_model(network(), "int8", Ranges({"b": 3.0}, {})).data


def test_what_tensorrt_has_no_fp8_for_stays_in_fp16():
    def precisions(model, precision="fp8", ranges=RANGES):
        return [c.precision for c in typed_model(model, precision, ranges).convolutions.values()]

    assert precisions(network()) == ["fp16", "fp8", "fp8", "fp16", "fp32"]  # not the transposed one
    wide = np.ones((16, 16, 7, 7), np.float32)
    assert precisions(network(**{"b.weight": wide})) == ["fp16", "fp16", "fp8", "fp16", "fp32"]
    assert precisions(network(8), "int8") == ["fp16", "int8", "int8", "int8", "fp32"]
    with pytest.raises(PlanError, match="no convolution that TensorRT runs in fp8; use --precision fp16"):
        precisions(network(8))


def test_a_range_of_the_last_convolution_changes_nothing():
    ranges = Ranges({**RANGES.inputs, "logits": 2.0}, {**RANGES.outputs, "logits": 2.0})
    assert typed_model(network(), "int8", ranges).data == typed_model(network(), "int8", RANGES).data


def test_weights_at_the_ends_of_fp16():
    """Scales are never 0, and no weight lies beyond what they reach."""
    weights = np.full((16, 16, 3, 3), 1e-9, np.float32)
    weights[0], weights[1, 0, 0, 0] = 60000, 1e-4
    for precision in EIGHT_BITS:
        model = onnx.load_from_string(typed_model(network(**{"b.weight": weights}), precision, RANGES).data)
        values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        (dequantise,) = (n for n in model.graph.node if n.input[0].startswith("b.weight"))
        stored, scale = (values[name].astype(np.float64) for name in dequantise.input[:2])
        assert scale.min() == SMALLEST and np.isfinite(scale).all()
        scale = scale.reshape(-1, 1, 1, 1)
        wrong = np.abs(stored * scale - weights)
        allowed = scale / 2 if precision == "int8" else np.maximum(scale * 2**-10, np.abs(weights) / 16)
        assert (wrong <= 1.001 * allowed).all()


# -- what the shipped plans lose: predicted here, measured on a GPU by `compile --tensorrt` -------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "precision", "least"),
    [
        ("fast", 512, "int8", 0.99),
        ("fast", 512, "fp8", 0.99),
        ("final", 256, "int8", 0.99),
        ("final", 256, "fp8", 0.98),
    ],
)
def test_agreement_of_the_shipped_plans(name, side, precision, least):
    plan, image = open_plan(name), make_field(0)[0][None, :side, :side]
    exact = openvino_logits(plan.members[MODEL], image).argmax(1)
    found = openvino_logits(typed_model(plan.members[MODEL], precision, plan.ranges).data, image).argmax(1)
    assert least <= (exact == found).mean() < 1


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        (None, "compiled without ranges, which int8 needs; compile it with --calibrate DIR"),
        (Ranges({"d": 1.0}, {}), "ranges for 'd', which is no convolution"),
        (Ranges({"b": 1.0}, {"scale": 1.0}), "ranges for 'scale', which is no convolution"),
        (Ranges({"\n\x1b[31m": 1.0}, {}), "which is no convolution"),
        (Ranges({"b": 9e29}, {}), r"range of 9e\+29, beyond what an fp16 scale holds"),
        (Ranges({}, {}), "no convolution that TensorRT runs in int8"),
        (Ranges({}, {"c": 1.0}), "no convolution that TensorRT runs in int8"),
    ],
)
def test_ranges_that_do_not_fit(ranges, words):
    with pytest.raises(PlanError, match=words) as caught:
        typed_model(network(), "int8", ranges)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_hostile_range_costs_the_answer_alone():
    found = openvino_logits(typed_model(network(), "int8", Ranges({"b": 1.1e-30}, {})).data, noise(8, 8)[None])
    assert np.isfinite(found).all()


def test_fp8_needs_a_package(monkeypatch):
    monkeypatch.setattr(extras, "has", lambda *packages: "ml_dtypes" not in packages)
    with pytest.raises(ValueError, match=r"this needs ml_dtypes; pip install 'histoseg-fast\[tensorrt\]'"):
        typed_model(network(), "fp8", RANGES)
    assert typed_model(network(), "int8", RANGES).convolutions
