"""What the engine inspector prints, in the forms of 10.x and 11.x, and the fp16 engine that is really fp32."""

from __future__ import annotations

import json

import pytest

from histoseg_fast.engines.trt.layers import Convolution, check_precision
from histoseg_fast.errors import EngineError

MODEL = {"a": Convolution("a.out", "fp16"), "a_1": Convolution("a_1.out", "fp16"), "z": Convolution("logits", "fp32")}
HALF, FLOAT = "Channel major FP16 format where channel % 8 == 0", "Row major linear FP32"
FORMATS = {
    **{"Half": HALF, "Float": FLOAT, "Int8": "Thirty-two wide channel vectorized row major Int8 format"},
    **{"FP8": "Channel major FP8 format where channel % 16 == 0"},
}


def tensor_10(kind, name="t"):
    return {"Name": name, "Location": "Device", "Dimensions": [1, 8, 4, 4], "Format/Datatype": kind}


def tensor_11(kind, name="t"):
    return {"Name": name, "Dimensions": [1, 8, 4, 4], "Format": "Channel major", "Datatype": kind}


def cask(name, kind, tensor=tensor_10, **more):
    """A convolution layer as 10.x prints it."""
    shown = FORMATS[kind] if tensor is tensor_10 else kind
    layer = {"Name": f"{name} + {name}_relu", "LayerType": "CaskConvolution", "Weights": {"Type": kind, "Count": 9}}
    layer |= {"Inputs": [tensor(shown)], "Outputs": [tensor(shown)], "ParameterType": "Convolution"}
    return layer | {"Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: {name}_relu]"} | more


def fused(name, kind, tensor=tensor_10, tactic="__myl_ConvRelu_myl0_3", **more):
    """A layer of the fusing backend: no weights, types by one word, ONNX names in the metadata alone."""
    layer = {"Name": f"__myl_x_{kind}", "LayerType": "kgen", "Inputs": [tensor(kind)], "Outputs": [tensor(kind)]}
    return layer | {"TacticName": tactic, "Metadata": f"[ONNX Layer: {name}]"} | more


def check(*layers, model=MODEL):
    return check_precision(json.dumps({"Layers": list(layers), "Bindings": ["rgb"]}), model)


@pytest.mark.parametrize("tensor", [tensor_10, tensor_11])
@pytest.mark.parametrize("layer", [cask, fused])
def test_a_true_fp16_engine(layer, tensor):
    layers = [layer("a", "Half", tensor), layer("a_1", "Half", tensor), layer("z", "Float", tensor)]
    assert check(*layers) == {"fp16": 2, "fp32": 1}


@pytest.mark.parametrize("tensor", [tensor_10, tensor_11])
@pytest.mark.parametrize("layer", [cask, fused])
def test_an_fp16_build_that_is_fp32_is_refused(layer, tensor):
    with pytest.raises(EngineError, match=r"built for fp16 but 2 convolution\(s\) \(a, a_1\) run in fp32"):
        check(*(layer(name, "Float", tensor) for name in MODEL))
    with pytest.raises(EngineError, match=r"1 convolution\(s\) \(a_1\) run in fp32"):
        check(layer("a", "Half", tensor), layer("a_1", "Float", tensor), layer("z", "Float", tensor))


def test_layers_that_move_data_for_a_convolution_do_not_count():
    copy = {"LayerType": "Reformat", "Inputs": [tensor_10(HALF)], "Outputs": [tensor_10(HALF)]}
    copies = [copy | {"Name": "Reformatting CopyNode for Input Tensor 0 to a + a_relu", "Metadata": "[ONNX Layer: a]"}]
    move = fused("a", "Half", tactic="__myl_Move")
    rest = [cask("a_1", "Half"), cask("z", "Float")]
    with pytest.raises(EngineError, match=r"\(a\) run in fp32"):
        check(*copies, move, cask("a", "Float"), *rest)
    with pytest.raises(EngineError, match="does not show"):
        check(*copies, *rest)
    copies[0]["Inputs"] = [tensor_10(FLOAT)]
    assert check(*copies, cask("a", "Half"), *rest) == {"fp16": 2, "fp32": 1}


def test_a_cast_joined_to_a_convolution_is_no_fp32_convolution():
    writes_float = cask("a_1", "Half", Outputs=[tensor_10(FLOAT)])
    takes_half = fused("z", "Half", Inputs=[tensor_10("Half"), tensor_10("Float")])
    assert check(cask("a", "Half"), writes_float, takes_half)["fp16"] >= 2


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        ("sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64", "fp16"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize64x64x64", "fp16"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16", "fp32"),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize32x32x8", "fp32"),
        ("sm75_xmma_fprop_implicit_gemm_h1688", "fp16"),
    ],
)
def test_what_a_kernel_is_called_counts_before_its_inputs(tactic, precision):
    """The cast before the first convolution may be joined to it: then it takes float."""
    layers = [fused(name, "Float" if precision == "fp16" else "Half", tactic=tactic) for name in ("a", "a_1")]
    if precision == "fp16":
        assert check(*layers, cask("z", "Float")) == {"fp16": 2, "fp32": 1}
    else:
        with pytest.raises(EngineError, match="run in fp32"):
            check(*layers, cask("z", "Float"))


def test_types_of_both_kinds_for_one_convolution():
    with pytest.raises(EngineError, match="fp32 in part"):
        check(cask("a", "Half"), cask("a", "Float"), cask("a_1", "Half"), cask("z", "Float"))


def test_found_by_its_output_where_no_layer_bears_its_name():
    nameless = fused("other", "Half", Outputs=[tensor_10("Half", "a.out")])
    assert check(nameless, cask("a_1", "Half"), cask("z", "Float")) == {"fp16": 2, "fp32": 1}


HIDDEN = {
    "no layer": [cask("a", "Half"), cask("z", "Float")],
    "a longer name": [cask("a", "Half"), cask("a_11", "Half"), cask("b.a_1", "Half"), cask("z", "Float")],
    "no types": [cask("a", "Half"), {"Name": "a_1", "LayerType": "CaskConvolution"}, cask("z", "Float")],
    "names alone": ["a + a_relu", "a_1 + a_1_relu", "z"],
    "nothing": [],
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_is_not_shown_is_refused(name):
    with pytest.raises(EngineError, match="does not show in which precision"):
        check(*HIDDEN[name])


def test_many_names_are_cut():
    model = {f"conv_{i}": Convolution(f"o{i}", "fp16") for i in range(30)}
    with pytest.raises(EngineError) as caught:
        check(model=model)
    assert "30 convolution(s) (conv_0, conv_1, conv_2 and 27 more)" in str(caught.value)


def test_an_fp32_engine_must_be_fp32():
    model = {name: Convolution(c.output, "fp32") for name, c in MODEL.items()}
    assert check(*(cask(name, "Float") for name in model), model=model) == {"fp32": 3}
    with pytest.raises(EngineError, match=r"built for fp32 but 1 convolution\(s\) \(a\) run in fp16"):
        check(cask("a", "Half"), cask("a_1", "Float"), cask("z", "Float"), model=model)


@pytest.mark.parametrize("text", ["", "nonsense", "[]", "{}", "null", '{"Layers": 3}'])
def test_answers_that_cannot_be_read(text):
    with pytest.raises(EngineError, match="inspector"):
        check_precision(text, MODEL)


# -- 8 bits ----------------------------------------------------------------------------------------

KINDS = {"int8": "Int8", "fp8": "FP8"}


def quantised(precision):
    """The first convolution stays in fp16, the last in fp32."""
    return {"f": Convolution("f.out", "fp16"), "a": Convolution("a.out", precision), "z": Convolution("logits", "fp32")}


@pytest.mark.parametrize("tensor", [tensor_10, tensor_11])
@pytest.mark.parametrize(("precision", "kind"), KINDS.items())
def test_a_true_8_bit_engine(tensor, precision, kind):
    layers = [cask("f", "Half", tensor, Outputs=[tensor(FORMATS[kind])]), cask("z", "Float", tensor)]
    model = quantised(precision)
    found = {"fp16": 1, precision: 1, "fp32": 1}
    assert check(*layers, cask("a", kind, tensor), model=model) == found
    for name in ("a.weight + a.weight.dq + a", "a.weight + a.weight.dq + a + a_relu + b.q"):
        assert check(*layers, cask("a", kind, tensor, Name=name, Metadata=""), model=model) == found
    two = fused("a", kind, tensor, Inputs=[tensor(kind), tensor(kind), tensor("Half")])
    assert check(*layers, two, model=model) == found


@pytest.mark.parametrize("tensor", [tensor_10, tensor_11])
@pytest.mark.parametrize(("precision", "kind"), KINDS.items())
def test_pairs_that_were_not_joined_to_their_convolution_are_refused(tensor, precision, kind):
    """It runs in fp16 then, and may read 8-bit data all the same."""
    rest = [cask("f", "Half", tensor), cask("z", "Float", tensor)]
    tactic = "sm80_xmma_fprop_implicit_gemm_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x64x64"
    reads = tensor(FORMATS[kind])
    for layer in (
        cask("a", "Half", tensor),
        cask("a", "Half", tensor, Inputs=[reads]),
        cask("a", kind, tensor, TacticName=tactic),
        fused("a", "Half", tensor, Inputs=[reads], tactic=tactic),
        fused("a", "Half", tensor, Inputs=[tensor(kind), tensor("Half")]),
    ):
        with pytest.raises(EngineError, match=rf"built for {precision} but 1 convolution\(s\) \(a\) run in fp16;"):
            check(*rest, layer, model=quantised(precision))
    with pytest.raises(EngineError, match=r"\(a\) run in fp16 in part"):
        check(*rest, cask("a", kind, tensor), cask("a", "Half", tensor), model=quantised(precision))
    with pytest.raises(EngineError, match=r"does not show in which precision 1 convolution\(s\) \(a\)"):
        check(*rest, fused("a", kind, tensor), model=quantised(precision))
    (other,) = KINDS.keys() - {precision}
    with pytest.raises(EngineError, match=rf"\(a\) run in {other}; it is refused"):
        check(*rest, cask("a", KINDS[other], tensor), model=quantised(precision))


@pytest.mark.parametrize(
    ("tactic", "precision"),
    [
        (
            "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32",
            "int8",
        ),
        ("sm80_xmma_fprop_implicit_gemm_i8f16_i8i32_f16_nhwckrsc_nhwc_tilesize128x64x64", "int8"),
        ("sm80_xmma_deconv_implicit_gemm_i8i8_i8i32_f32_nhwckrsc_nhwc_tilesize64x64x64", "int8"),
        ("volta_int8_i8816cudnn_int8_256x64_ldg16_relu_singleBuffer_medium_nt_v1", "int8"),
        ("sm90_xmma_fprop_implicit_gemm_e4m3e4m3_e4m3f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "fp8"),
        ("sm90_xmma_fprop_implicit_gemm_e4m3f16_e4m3f32_f32_nhwckrsc_nhwc_tilesize256x128x64", "fp8"),
        ("sm90_xmma_fprop_implicit_gemm_f16i8_f16f16_f16_nhwckrsc_nhwc_tilesize64x64x64", "fp16"),
        ("sm90_xmma_fprop_implicit_gemm_f16e4m3_f16f16_f16_nhwckrsc_nhwc_tilesize64x64x64", "fp16"),
    ],
)
def test_kernels_by_the_type_they_multiply(tactic, precision):
    """Not by the one that they write; a single input of 8 bits alone would not say it."""
    kind = {"int8": "Int8", "fp8": "FP8", "fp16": "Half"}[precision]
    model = {"a": Convolution("a.out", precision)}
    assert check(fused("a", kind, tactic=tactic), model=model) == {precision: 1}
