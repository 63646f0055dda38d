"""Stride and halo from interval arithmetic, against what the networks and operators are seen to depend on."""

from __future__ import annotations

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_networks import exported, network
from torch import nn

from histoseg_fast.compiling.halo import measure
from histoseg_fast.errors import PlanError
from histoseg_fast.models.architectures import ARCHITECTURES, PAPER_ARCHITECTURES
from histoseg_fast.models.network import make_network

# -- the networks ----------------------------------------------------------------------------------


def averaging(arch):
    """The same layers with positive weights and nothing but sums: whatever they look at leaves a trace."""
    made = make_network(arch).double()
    if arch not in PAPER_ARCHITECTURES:  # their ReLUs pass what is positive
        made = made.fold()
        for name, tensor in made.named_parameters():
            nn.init.constant_(tensor, 1 if name.endswith("bias") else 1 / tensor[0].numel())
        return made
    for part in (made.features, made.head):
        for name, module in list(part.named_children()):
            if isinstance(module, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2))
            elif isinstance(module, nn.ReLU):
                setattr(part, name, nn.Identity())
            else:
                nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    return made


def seen(network, length, start, end):
    """First and last row of the input that rows [start, end) of the output depend on, and the same for columns."""
    image = torch.zeros(1, 3, length, length, dtype=torch.float64, requires_grad=True)
    network(image)[:, :, start:end, start:end].sum().backward()
    grid = image.grad[0].abs().sum(0) > 0
    return [(int(axis.nonzero().min()), int(axis.nonzero().max())) for axis in (grid.any(1), grid.any(0))]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_halo_is_enough_and_tight(arch):
    receptive = measure(exported(arch))
    stride, context = receptive.stride, receptive.context
    made, start = averaging(arch), (context // stride + 2) * stride
    for low, high in seen(made, 2 * start + stride, start, start + stride):
        assert max(start - low, high - (start + stride - 1)) == context
    assert 0 <= receptive.halo - context < stride and receptive.halo % stride == 0


def test_halo_of_the_final_network():
    assert (measure(exported("final")).stride, measure(exported("final")).halo) == (4, 28)
    made = averaging("final")
    reach = [max(at - low, high - at) for at in range(32, 36) for low, high in seen(made, 68, at, at + 1)]
    assert max(reach) == 26  # pixels around one pixel, whatever its place in the stride


def test_halo_of_the_fast_network():
    assert (measure(exported("fast")).stride, measure(exported("fast")).halo) == (32, 160)


@pytest.mark.parametrize("arch", ["one", "final"])
def test_a_pixel_beyond_the_halo_changes_nothing(arch):
    receptive, made = measure(exported(arch)), network(arch)
    halo, stride = receptive.halo, receptive.stride
    length, end = 2 * halo + 3 * stride, halo + 2 * stride
    image = torch.randn(1, 3, length, length, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        before = made(image)[..., halo + stride : end, halo + stride : end]
        for outside in (stride - 1, end + halo):
            for index in ((..., outside, slice(None)), (..., outside)):
                changed = image.clone()
                changed[index] += 1000
                assert torch.equal(made(changed)[..., halo + stride : end, halo + stride : end], before)


# -- operator by operator --------------------------------------------------------------------------

CHANNELS = 4


def ones(name, *shape):
    """Positive weights, all different."""
    return numpy_helper.from_array(np.linspace(1, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape), name)


def graph(*nodes):
    """A float network of `nodes` from x to y; w3 and w4 are kernels, s2, s3, half and third are scales."""
    c = CHANNELS
    constants = [ones("w3", c, c, 3, 3), ones("w5", c, c, 5, 5), ones("w35", c, c, 3, 5), ones("w1", c, c, 1, 1)]
    constants += [ones("w2", c, c, 2, 2), ones("w4", c, c, 4, 4), ones("wide", c, 2 * c, 1, 1)]
    constants += [ones("four", c, 4 * c, 1, 1), ones("quarter", c, c // 4, 1, 1)]
    constants.append(numpy_helper.from_array(np.float32(3), "three"))
    for name, scale in (("s2", 2), ("s3", 3), ("half", 1 / 2), ("third", 1 / 3)):
        constants.append(numpy_helper.from_array(np.array([1, 1, scale, scale], np.float32), name))
    used = {name for node in nodes for name in node.input}
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", c, "h", "w"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", c, "oh", "ow"])],
        [constant for constant in constants if constant.name in used],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def chain(*steps):
    """Nodes one after another; a step is (operator, more inputs, attributes)."""
    names = ["x", *(f"t{i}" for i in range(1, len(steps))), "y"]
    return graph(
        *(helper.make_node(op, [names[i], *more], [names[i + 1]], **kw) for i, (op, more, kw) in enumerate(steps))
    )


def dependency(model, stride):
    """Brute force: how far beyond an aligned block of the output a change of one input row or column is felt."""
    start = 12 // stride * stride
    length, end = 2 * start + stride, start + stride
    image = np.random.default_rng(0).random((CHANNELS, length, length)).astype(np.float32)
    changed = [image]
    for i in range(length):
        for index in ((..., i, slice(None)), (..., i)):
            changed.append(image.copy())
            changed[-1][index] += 50
    core = ov.Core()
    run = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    before, *after = run(np.stack(changed))[0]
    assert before.shape == image.shape
    felt = [(out != before)[:, start:end, start:end].any() for out in after]
    rows = [n // 2 for n in np.flatnonzero(felt)]
    assert rows[0] > 0  # else the image is too small to tell
    return max(start - rows[0], rows[-1] - (end - 1))


def conv(weights="w3", **attributes):
    return "Conv", [weights], attributes


def resize(scale, **attributes):
    return "Resize", ["", scale], attributes


UP = ("ConvTranspose", ["w2"], {"strides": [2, 2]})
POOL = ("MaxPool", [], {"kernel_shape": [2, 2], "strides": [2, 2]})
DOWN = conv(pads=[1] * 4, strides=[2, 2])
EXACT = {
    "conv": [conv(pads=[1] * 4)],
    "conv with a lopsided padding": [conv(pads=[2, 2, 0, 0])],
    "wide conv": [conv("w35", pads=[1, 2, 1, 2])],
    "dilation": [conv(pads=[3] * 4, dilations=[3, 3])],
    "stride, then up": [DOWN, UP],
    "two strides, two ups": [DOWN, conv(pads=[1] * 4), DOWN, UP, conv(pads=[1] * 4), UP],
    "max pool": [POOL, UP],
    "overlapping max pool": [("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}), UP],
    "average pool": [("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1] * 4})],
    "overlapping up": [POOL, ("ConvTranspose", ["w4"], {"strides": [2, 2], "pads": [1] * 4})],
    "up with output padding": [
        POOL,
        ("ConvTranspose", ["w3"], {"strides": [2, 2], "pads": [1] * 4, "output_padding": [1, 1]}),
    ],
    "nearest": [POOL, resize("s2", mode="nearest")],
    "nearest, asymmetric": [
        POOL,
        resize("s2", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
    ],
    "linear": [POOL, resize("s2", mode="linear")],
    "space to depth and back": [
        ("SpaceToDepth", [], {"blocksize": 2}),
        conv("four"),
        conv("w3", pads=[1] * 4),
        ("DepthToSpace", [], {"blocksize": 2}),
        conv("quarter"),
    ],
    "pointwise": [("Mul", ["three"], {}), ("Relu", [], {}), ("Sigmoid", [], {}), conv("w1")],
}
ENOUGH = {
    "linear, asymmetric": [POOL, resize("s2", mode="linear", coordinate_transformation_mode="asymmetric")],
    "cubic": [POOL, resize("s2", mode="cubic")],
    "nearest rounded up": [
        POOL,
        resize("s2", mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil"),
    ],
    "nearest by three": [resize("third", mode="nearest"), conv(pads=[1] * 4), resize("s3", mode="nearest")],
    "linear by a half and back": [resize("half", mode="linear"), conv(pads=[1] * 4), resize("s2", mode="linear")],
}


@pytest.mark.parametrize("name", EXACT)
def test_operators(name):
    model = chain(*EXACT[name])
    receptive = measure(model)
    assert receptive.context == dependency(model, receptive.stride)


@pytest.mark.parametrize("name", ENOUGH)
def test_operators_whose_rule_may_be_wider(name):
    model = chain(*ENOUGH[name])
    receptive = measure(model)
    assert 0 <= receptive.context - dependency(model, receptive.stride) <= 2 * receptive.stride


def test_branches_take_the_wider():
    model = graph(
        helper.make_node("Conv", ["x", "w3"], ["a"], pads=[1] * 4),
        helper.make_node("Conv", ["x", "w5"], ["b"], pads=[2] * 4),
        helper.make_node("Concat", ["a", "b"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "wide"], ["y0"]),
        helper.make_node("Add", ["y0", "x"], ["y"]),
    )
    assert measure(model).context == dependency(model, 1) == 2


def test_the_stride_is_the_deepest():
    assert measure(chain(*EXACT["two strides, two ups"])).stride == 4
    assert measure(chain(*ENOUGH["nearest by three"])).stride == 3
    assert measure(chain(*EXACT["pointwise"])).stride == 1


PAD1 = {"pads": [1] * 4}
REFUSED = {
    "unknown operator": [("GlobalAveragePool", [], {})],
    "another unknown operator": [("Erf", [], {})],
    "resize to the whole size": [POOL, resize("s2", mode="linear", coordinate_transformation_mode="align_corners")],
    "anti-aliasing": [resize("half", mode="linear", antialias=1), UP],
    "not the input's size": [POOL],
    "unpadded": [conv()],
    "padded by what the size asks": [conv(auto_pad="SAME_UPPER")],
    "unpadded up": [POOL, ("ConvTranspose", ["w4"], {"strides": [2, 2]})],
    "pool that rounds up": [("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, **PAD1}), UP],
    "height and width exchanged": [("Transpose", [], {"perm": [0, 1, 3, 2]})],
    "a height of two images": [("Concat", ["x"], {"axis": 2})],
    "weights that are computed": [("Conv", ["x"], PAD1)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_rule_is_refused(name):
    with pytest.raises(PlanError) as caught:
        measure(chain(*REFUSED[name]))
    assert str(caught.value).isprintable()


def test_tensors_of_different_sizes_are_refused():
    model = graph(
        helper.make_node("MaxPool", ["x"], ["small"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Add", ["x", "small"], ["y"]),
    )
    with pytest.raises(PlanError, match="different sizes"):
        measure(model)


def test_models_are_sound():
    for steps in (*EXACT.values(), *ENOUGH.values()):
        onnx.checker.check_model(chain(*steps))
