"""ONNX networks of the user's own: brought into the plan's form, measured, run; or refused in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_networks import noise
from tiny_plans import tiny_model
from torch import nn

from histoseg_fast.cli import main
from histoseg_fast.compiling.compile import compile_onnx
from histoseg_fast.compiling.foreign import Normalisation, read_onnx
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import PlanError, UsageError
from histoseg_fast.labels import Palette
from histoseg_fast.plans import open_plan

CLASSES = "glass=0,0,0;gland=255,0,0;stroma=0,255,0;fat=255,255,0"
MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


class Theirs(nn.Module):
    """A network that this package has never seen: strides, batch norm, a skip connection, bilinear upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 16, 4, stride=4), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid())
        self.up = nn.Upsample(scale_factor=4, mode="nearest")
        self.out = nn.Conv2d(24, 4, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.a(x)
        return self.out(torch.cat([a, self.up(self.b(a))], 1))


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    torch.manual_seed(3)
    network = Theirs()
    network.a[1].running_mean.normal_()
    return network.eval()


@pytest.fixture(scope="module")
def file(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the old exporter writes it, of one fixed size."""
    path = tmp_path_factory.mktemp("onnx") / "théirs v2.onnx"
    example = torch.zeros(1, 3, 32, 48)
    torch.onnx.export(theirs, (example,), path, input_names=["image"], dynamo=False, opset_version=17)
    return path


def test_it_computes_what_it_did_on_any_size_and_in_tiles(theirs: nn.Module, file: Path, tmp_path: Path) -> None:
    plan = compile_onnx(file, tmp_path / "x.plan", Palette.parse(CLASSES), Normalisation(MEAN, STD))
    assert plan.palette.names == ("glass", "gland", "stroma", "fat") and plan.name == "théirs v2"
    assert plan.stride == 4 and plan.halo >= 8
    image = noise(72, 104, 1)
    with torch.no_grad():
        x = (torch.from_numpy(image).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
        expected = theirs(x.permute(2, 0, 1)[None])[0].numpy()
    with open_engine(plan, precision="fp32") as engine:
        found = run_tiled(engine, plan, image)
        tiled = run_tiled(engine, plan, image, 2 * plan.halo + 2 * plan.stride)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(tiled, found, atol=1e-5)


def test_a_network_of_bytes_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bytes.onnx").write_bytes(tiny_model())
    model = read_onnx(tmp_path / "bytes.onnx", 3, Normalisation())
    assert [node.op_type for node in model.graph.node] == [
        node.op_type for node in onnx.load_from_string(tiny_model()).graph.node
    ]
    assert model.graph.input[0].name == "rgb" and model.graph.output[0].name == "logits"


def test_inner_tensors_may_have_the_names(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(changed_model("name taken").SerializeToString())
    plan = compile_onnx(path, tmp_path / "x.plan", Palette.parse("a=0,0,0;b=1,1,1;c=2,2,2"), Normalisation())
    with open_engine(plan, precision="fp32") as engine:
        assert run_tiled(engine, plan, noise(32, 32, 0)).min() == 0


def test_on_the_command_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["histoseg-fast", "compile", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    out = str(tmp_path / "x.plan")
    assert run(str(file), "-o", out, "--classes", CLASSES, "--mean", "0.5,0.5,0.5") == 0
    assert "stride 4, halo" in capsys.readouterr().out
    assert open_plan(out).manifest["normalisation"] == {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0]}
    for arguments, text in [
        ([str(file)], "--classes need each other"),
        ([str(file), "--classes", "a=0,0,0;b=1,1,1"], "name as many --classes"),
        ([str(file), "--classes", CLASSES, "--std", "0,1,1"], "deviations above 0"),
        ([str(file), "--classes", CLASSES, "--mean", "a"], "are no numbers"),
        ([str(file), "--classes", CLASSES, "--precision", "int8"], "runs in 16 bits or more"),
        ([str(tmp_path / "none.onnx"), "--classes", CLASSES], "no such ONNX file"),
    ]:
        assert run(*arguments, "-o", str(tmp_path / "no.plan")) in (1, 2)
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1
    assert not (tmp_path / "no.plan").exists()


def changed_model(change: str) -> onnx.ModelProto:
    model = onnx.load_from_string(tiny_model())
    graph = model.graph
    if change == "old":
        model.opset_import[0].version = 12
    elif change == "floats in rows":
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    elif change == "two outputs":
        graph.output.append(helper.make_tensor_value_info("x7", TensorProto.FLOAT, ["n", 8, "h", "w"]))
    elif change == "half":
        graph.node.append(helper.make_node("Cast", ["logits"], ["halved"], to=TensorProto.FLOAT16))
        graph.output[0].CopyFrom(helper.make_tensor_value_info("halved", TensorProto.FLOAT16, ["n", 3, "h", "w"]))
    elif change == "whole image":
        graph.node.append(helper.make_node("GlobalAveragePool", ["logits"], ["mean"]))
        graph.node.append(helper.make_node("Add", ["logits", "mean"], ["sum"]))
        graph.output[0].name = "sum"
    elif change == "name taken":
        graph.node.append(helper.make_node("Relu", ["logits"], ["positive"]))
        graph.output[0].name = "positive"
    elif change == "half the size":
        graph.node.append(helper.make_node("MaxPool", ["logits"], ["less"], kernel_shape=[2, 2], strides=[2, 2]))
        graph.output[0].name = "less"
    elif change == "elsewhere":
        tensor = numpy_helper.from_array(np.zeros(3, np.float32), "logits.bias")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret")
        graph.initializer[-1].CopyFrom(tensor)
    return model


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("old", "opset before 13"),
        ("floats in rows", "takes float"),
        ("two outputs", "2 outputs"),
        ("half", "not float32 logits"),
        ("whole image", "halo of operator GlobalAveragePool is not known"),
        ("half the size", "output has not the size of its input"),
        ("elsewhere", "no sound ONNX model|refers to files outside"),
        ("damaged", "no sound ONNX model"),
        ("text", "no sound ONNX model"),
    ],
)
def test_what_is_no_such_network_is_refused(tmp_path: Path, change: str, text: str) -> None:
    data = changed_model(change).SerializeToString()
    data = {"damaged": data[: len(data) // 2], "text": b"hello"}.get(change, data)
    path = tmp_path / "x.onnx"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=text) as caught:
        compile_onnx(path, tmp_path / "x.plan", Palette.parse("a=0,0,0;b=1,1,1;c=2,2,2"), Normalisation())
    assert "x.onnx" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "x.plan").exists()


@pytest.mark.parametrize(
    ("mean", "std"), [((0, 0), (1, 1, 1)), ((0, 0, 0), (1, -1, 1)), ((0, 0, float("nan")), (1,) * 3)]
)
def test_bad_normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="three numbers each"):
        Normalisation(mean, std)
