"""The Triton model repository, read back by the schema that Triton itself reads it with."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys

import pytest
from wheels import unpacked

from histoseg_fast.compiling.triton import config, write_repository
from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.engines.trt.info import EngineInfo
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.errors import UsageError
from histoseg_fast.plan import MODEL

text_format = pytest.importorskip("google.protobuf.text_format")


@pytest.fixture(scope="module")
def parse():
    """Parses config.pbtxt as Triton's ModelConfig; unknown or misspelt fields are errors."""
    path = unpacked("tritonclient<3") / "tritonclient" / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda text: text_format.Parse(text, module.ModelConfig()), module


def papers(plan, **changes):
    options = BuildOptions.of(plan, **changes)
    return EngineInfo.of(plan.members[MODEL], options, Gpu("NVIDIA H200", (9, 0)), "11.4.0").sealed(b"engine", {})


def test_the_onnx_repository(tiny_plan, tmp_path, parse):
    parse, schema = parse
    folder = write_repository(tmp_path, tiny_plan, 4)
    assert folder == tmp_path / "tiny"
    assert (folder / "1" / "model.onnx").read_bytes() == tiny_plan.members[MODEL]
    read = parse((folder / "config.pbtxt").read_text())
    assert (read.name, read.platform, read.max_batch_size) == ("tiny", "onnxruntime_onnx", 4)
    (rgb,), (logits,) = read.input, read.output
    assert (rgb.name, rgb.data_type, list(rgb.dims)) == ("rgb", schema.TYPE_UINT8, [-1, -1, 3])
    assert (logits.name, logits.data_type, list(logits.dims)) == ("logits", schema.TYPE_FP32, [3, -1, -1])
    assert read.HasField("dynamic_batching") and not read.instance_group
    known = {key: value.string_value for key, value in read.parameters.items()}
    assert known == {
        "stride": "2",
        "halo": "8",
        "tile": "128",
        "classes": "background,cancer,stroma",
        "plan_sha256": tiny_plan.sha256,
    }


def test_names_and_shapes_are_those_of_the_onnx(tiny_plan, parse):
    onnx = pytest.importorskip("onnx")
    read = parse[0](config("tiny", tiny_plan, 4, None))
    graph = onnx.load_from_string(tiny_plan.members[MODEL]).graph
    for mine, theirs in ((read.input[0], graph.input[0]), (read.output[0], graph.output[0])):
        dims = [dim.dim_value or -1 for dim in theirs.type.tensor_type.shape.dim]
        assert (mine.name, list(mine.dims)) == (theirs.name, dims[1:]) and dims[0] == -1


def test_the_tensorrt_repository(tiny_plan, tmp_path, parse):
    parse, schema = parse
    folder = write_repository(tmp_path, tiny_plan, 4, (papers(tiny_plan), b"engine"))
    assert [path.name for path in (folder / "1").iterdir()] == ["model.plan"]
    assert (folder / "1" / "model.plan").read_bytes() == b"engine"
    read = parse((folder / "config.pbtxt").read_text())
    assert (read.platform, read.max_batch_size, read.parameters["tile"].string_value) == ("tensorrt_plan", 4, "1128")
    (group,) = read.instance_group
    assert group.kind == schema.ModelInstanceGroup.KIND_GPU and list(group.profile) == ["1"]
    single = parse(config("tiny", tiny_plan, 1, papers(tiny_plan, batch=1)))
    assert list(single.instance_group[0].profile) == ["0"]


@pytest.mark.parametrize("name", ['a "quoted" \\ name', "Krebs und Stroma é", "tab\tand 𝄞"])
def test_names_of_any_kind(tiny_plan, parse, name):
    classes = [{"name": name, "colour": [0, 0, 0]}, *tiny_plan.manifest["classes"][1:]]
    manifest = dict(tiny_plan.manifest, classes=classes)
    plan = dataclasses.replace(tiny_plan, manifest=manifest)
    assert parse[0](config("x", plan, 4, None)).parameters["classes"].string_value == f"{name},cancer,stroma"


def test_a_model_name_that_is_no_folder_name(tiny_plan, tmp_path):
    plan = dataclasses.replace(tiny_plan, manifest=dict(tiny_plan.manifest, name="../a model/é"))
    assert write_repository(tmp_path, plan, 4) == tmp_path / ".._a_model_"


def test_a_folder_that_cannot_be_written(tiny_plan, tmp_path):
    (tmp_path / "tiny").write_text("a file in the folder's place")
    with pytest.raises(UsageError, match="cannot be written"):
        write_repository(tmp_path, tiny_plan, 4)
