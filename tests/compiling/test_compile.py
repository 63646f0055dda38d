"""Checkpoint to plan: what is exported computes what was trained, carries nothing of the machine, and repeats."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from random_networks import NAMES, checkpoint, exported, network, noise
from safetensors.torch import save_file

from histoseg_fast.compiling import compile as compiling
from histoseg_fast.engines import cpu_precisions
from histoseg_fast.errors import HistosegError, ImageError, PlanError, UsageError
from histoseg_fast.images import write_png
from histoseg_fast.models.architectures import ARCHITECTURES
from histoseg_fast.models.network import SegmentationNetwork, UInt8Network
from histoseg_fast.plan import read_plan
from histoseg_fast.training.checkpoint import read_checkpoint, write_checkpoint


def openvino_logits(model, image):
    core = ov.Core()
    source = core.read_model(model.SerializeToString())
    return core.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)[0]


@pytest.fixture
def small_fields(monkeypatch):
    """The synthetic calibration fields, cut: two whole ones would take half a minute here."""
    whole = compiling.make_field
    monkeypatch.setattr(compiling, "make_field", lambda seed: tuple(part[:64, :96] for part in whole(seed)))


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_initialisers_are_the_checkpoints_tensors(arch):
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in exported(arch).graph.initializer}
    state = network(arch).state_dict()
    assert set(state) <= set(tensors)
    for name, tensor in state.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy())
    assert all(tensors[name].size <= 4 for name in set(tensors) - set(state))  # scale, shift and the like


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_of_the_machine_stays_in_the_file(arch):
    model = onnx.ModelProto()
    model.CopyFrom(exported(arch))
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # random bytes may hold anything
    data = model.SerializeToString()
    paths = (str(Path(__file__).parents[2]), sys.prefix, "/home")
    for trace in (*paths, 'File "', ".py", "packages", "trace", "namespace"):
        assert trace.encode() not in data
    assert not model.functions and not model.graph.value_info
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer):
        assert not part.metadata_props and not part.doc_string


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_batch_and_size_are_free(arch):
    graph = exported(arch).graph
    (source,), (logits,) = graph.input, graph.output
    assert (source.name, logits.name) == ("rgb", "logits")
    dims = [[d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in (source, logits)]
    assert dims == [["n", "h", "w", 3], ["n", 3, "h", "w"]]
    assert source.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_onnx_gives_torchs_logits(arch):
    wrapped = UInt8Network(network(arch)).eval()
    for shape in ((1, 4, 4), (2, 24, 12), (1, 28, 40)):
        image = noise(shape[0] * shape[1], shape[2]).reshape(*shape, 3)
        with torch.inference_mode():
            expected = wrapped(torch.from_numpy(image)).numpy()
        np.testing.assert_allclose(openvino_logits(exported(arch), image), expected, atol=1e-4, rtol=1e-4)


# -- compile ---------------------------------------------------------------------------------------


def test_plan_of_a_checkpoint(tmp_path):
    plan = compiling.plan_of_checkpoint(checkpoint(tmp_path / "c.safetensors", "final", scores={"test": {"x": 1}}))
    assert (plan.name, plan.stride, plan.halo, plan.palette.names) == ("final", 4, 28, tuple(NAMES))
    assert plan.tile >= 4 * plan.halo and plan.manifest["scores"] == {"test": {"x": 1}}
    assert plan.manifest["normalisation"]["mean"] == [0.485, 0.456, 0.406]


def test_compiling_twice_gives_equal_bytes(tmp_path, small_fields):
    source, lines = checkpoint(tmp_path / "c.safetensors", "two"), []
    first = compiling.compile_plan(source, tmp_path / "a.plan", report=lines.append)
    compiling.compile_plan(source, tmp_path / "b.plan")
    assert (tmp_path / "a.plan").read_bytes() == (tmp_path / "b.plan").read_bytes()
    assert read_plan(tmp_path / "a.plan").manifest == first.manifest
    assert "stride 2" in lines[0] and first.sha256[:12] in lines[-1]
    assert str(tmp_path) not in json.dumps(first.manifest)


def test_agreement_is_measured_on_the_calibration_images(tmp_path, monkeypatch):
    images = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(images):
        write_png(path, noise(40 + i, 52, i))
    monkeypatch.setattr(compiling, "CALIBRATION_SIDE", 48)
    source = checkpoint(tmp_path / "c.safetensors", "final")
    plan = compiling.compile_plan(source, tmp_path / "a.plan", precision="fp32", calibration=images)
    assert set(plan.manifest["precisions"]) == set(cpu_precisions())
    assert plan.agreement("fp32") == 1.0 and plan.manifest["precision"] == "fp32"
    for precision in set(cpu_precisions()) - {"fp32"}:
        assert plan.manifest["precisions"][precision]["measured_on"] == "2 calibration image(s)"
        expected = compiling.measure_agreement(plan, precision, [noise(40 + i, 52, i)[:48, :48] for i in range(2)])
        assert 0.9 < plan.agreement(precision) == round(expected, 6) <= 1


def test_calibration_image_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"hello")
    with pytest.raises(ImageError, match=r"bad\.png"):
        compiling.compile_plan(
            checkpoint(tmp_path / "c.safetensors", "one"), tmp_path / "a.plan", calibration=[tmp_path / "bad.png"]
        )
    assert not (tmp_path / "a.plan").exists()


def test_unknown_precision(tmp_path):
    with pytest.raises(UsageError, match="'int4'"):
        compiling.compile_plan(tmp_path / "c.safetensors", tmp_path / "a.plan", precision="int4")


# -- checkpoints that do not fit -------------------------------------------------------------------


def refused(path):
    with pytest.raises(PlanError) as caught:
        compiling.load_network(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600 and path.name in message
    return message


HUGE_HEADER = (1 << 60).to_bytes(8, "little") + b"{}"


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 100, b"PK\x03\x04", HUGE_HEADER])
def test_files_that_are_no_checkpoints(tmp_path, content):
    (tmp_path / "c.safetensors").write_bytes(content)
    refused(tmp_path / "c.safetensors")


def test_other_safetensors_and_missing_files(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "is not a" in refused(tmp_path / "other.safetensors")
    assert "no such checkpoint" in refused(tmp_path / "missing.safetensors")
    refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"arch": "one"}, {"arch": "five"}, {"arch": ["final"]}, {"arch": None}, {"classes": ["a", "b"]}, {"classes": 3},
     {"classes": None}, {"classes": []}],
)  # fmt: skip
def test_descriptions_that_do_not_fit_the_tensors(tmp_path, changes):
    refused(checkpoint(tmp_path / "c.safetensors", "two", **changes))


@pytest.mark.parametrize(
    "changes",
    [{"colours": [[0, 0, 0]]}, {"colours": None}, {"colours": [[0, 0, 300], [1, 1, 1], [2, 2, 2]]}, {"training": 3},
     {"normalisation": {"mean": [0, 0, 0], "std": [1, 1, 1]}}, {"classes": ["a", "a", "b"]}, {"classes": [1, 2, 3]}],
)  # fmt: skip
def test_descriptions_that_make_no_plan(tmp_path, changes):
    with pytest.raises(PlanError) as caught:
        compiling.plan_of_checkpoint(checkpoint(tmp_path / "c.safetensors", "two", **changes))
    assert str(caught.value).isprintable() and "c.safetensors" in str(caught.value)


def test_tensors_that_do_not_fit_the_architecture(tmp_path):
    _, description = read_checkpoint(checkpoint(tmp_path / "good.safetensors", "two"))
    state = SegmentationNetwork("two").state_dict()
    for change in ({}, {"head.up1.weight": torch.zeros(1)}, {"more": torch.zeros(1)}):
        tensors = {**state, **change} if change else {}
        write_checkpoint(tmp_path / "c.safetensors", tensors, description)
        assert "'two'" in refused(tmp_path / "c.safetensors")


def test_truncated_checkpoint(tmp_path):
    data = checkpoint(tmp_path / "c.safetensors", "two").read_bytes()
    for size in (7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "t.safetensors").write_bytes(data[:size])
        with pytest.raises(HistosegError):
            compiling.load_network(tmp_path / "t.safetensors")
