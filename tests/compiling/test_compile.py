"""Checkpoint to plan: what is exported computes what was trained, carries nothing of the machine, and repeats."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import openvino as ov
import pytest
import torch
from data_folders import write_folder
from onnx import TensorProto, helper, numpy_helper
from random_networks import NAMES, checkpoint, exported, folded, network, noise
from safetensors.torch import save_file

from histoseg_fast.compiling import calibrate, export
from histoseg_fast.compiling import compile as compiling
from histoseg_fast.compiling.calibrate import candidate_ranges
from histoseg_fast.compiling.compile import CompileOptions
from histoseg_fast.compiling.export import SMALLEST_HALVED
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.errors import DataError, HistosegError, ImageError, LabelError, PlanError, UsageError
from histoseg_fast.images import write_png
from histoseg_fast.labels import encode
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.models.architectures import ARCHITECTURES, IMAGENET_MEAN, IMAGENET_STD, PAPER_ARCHITECTURES
from histoseg_fast.models.network import UInt8Network, make_network
from histoseg_fast.plan import DEFAULT_GATE, read_plan
from histoseg_fast.tiling import pad_to_stride
from histoseg_fast.training.checkpoint import read_checkpoint, write_checkpoint


def openvino_logits(model, image):
    core = ov.Core()
    source = core.read_model(model.SerializeToString())
    return core.compile_model(source, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(image)[0]


@pytest.fixture
def small_fields(monkeypatch):
    """The synthetic calibration fields, cut: two whole ones would take half a minute here."""
    whole = calibrate.make_field
    monkeypatch.setattr(calibrate, "make_field", lambda seed: tuple(part[:64, :96] for part in whole(seed)))


@pytest.fixture
def untimed(monkeypatch):
    """No precision's speed is measured."""
    monkeypatch.setattr(calibrate, "_speed", lambda engine, plan: 1.5)


# -- export ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_initialisers_are_the_checkpoints_tensors(arch):
    """By name; the large ones rounded to fp16, the others as they are."""
    tensors = {t.name: numpy_helper.to_array(t) for t in exported(arch).graph.initializer}
    state = folded(arch).state_dict()
    assert set(state) <= set(tensors)
    for name, tensor in state.items():
        expected = (tensor.half() if tensor.numel() >= SMALLEST_HALVED else tensor).numpy()
        assert tensors[name].dtype == expected.dtype
        np.testing.assert_array_equal(tensors[name], expected)
    assert {t.dtype for t in tensors.values()} >= {np.dtype(np.float16), np.dtype(np.float32)}
    assert all(tensors[name].size <= 4 for name in set(tensors) - set(state))  # scale, shift and the like
    if arch in PAPER_ARCHITECTURES:
        assert set(state) == set(network(arch).state_dict())


def test_weights_that_fp16_cannot_hold_stay_as_they_are():
    values = {
        name: np.linspace(1, 2, 4 * 8 * 9, dtype=np.float32).reshape(4, 8, 3, 3) for name in ("a", "large", "nan")
    }
    values["large"][0, 0, 0, 0], values["nan"][0, 0, 0, 0] = 65536, np.nan
    values["b"] = np.ones(SMALLEST_HALVED - 1, np.float32)
    made = helper.make_graph(
        [helper.make_node("Conv", ["x", name], [f"y_{name}"]) for name in ("a", "large", "nan")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 9, 9])],
        [helper.make_tensor_value_info(f"y_{name}", TensorProto.FLOAT, [1, 4, 7, 7]) for name in ("a", "large", "nan")],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    export._halve(made)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    assert {name for name, value in kept.items() if value.dtype == np.float16} == {"a"}
    for name in ("large", "nan", "b"):
        np.testing.assert_array_equal(kept[name], values[name])
    assert [list(node.input)[1] for node in made.node if node.op_type == "Conv"] == ["a.fp32", "large", "nan"]
    onnx.checker.check_model(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))


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
    trained, stored = UInt8Network(network(arch)).eval(), copy.deepcopy(UInt8Network(folded(arch))).eval()
    for tensor in stored.network.parameters():
        if tensor.numel() >= SMALLEST_HALVED:
            tensor.data = tensor.data.half().float()
    side = max(4, network(arch).stride)
    for n, height, width in ((1, 1, 1), (2, 6, 3), (1, 7, 10)):
        image = noise(n * height * side, width * side).reshape(n, height * side, width * side, 3)
        with torch.inference_mode():
            expected, unrounded = (wrapped(torch.from_numpy(image)).numpy() for wrapped in (stored, trained))
        np.testing.assert_allclose(openvino_logits(exported(arch), image), expected, atol=1e-4, rtol=1e-4)
        assert np.abs(expected - unrounded).max() < 0.02 * np.abs(unrounded).max()


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


def pictures(root, count, height=40, width=52):
    root.mkdir()
    for i in range(count):
        write_png(root / f"{i}.png", noise(height + i, width, i))
    return root


def agreement(plan, precision, images):
    """Share of pixels whose class equals fp32's, from the engines themselves."""
    found = []
    for name in ("fp32", precision):
        with open_engine(plan, device="cpu", precision=name) as engine:
            found.append(np.concatenate([run_tiled(engine, plan, image).argmax(0).ravel() for image in images]))
    return (found[0] == found[1]).mean()


def test_every_other_image_is_measured_and_the_others_set_the_ranges(tmp_path, monkeypatch, untimed):
    monkeypatch.setattr(calibrate, "MAX_SIDE", 48)
    source, folder = checkpoint(tmp_path / "c.safetensors", "final"), pictures(tmp_path / "some images", 4)
    options = CompileOptions(precision="fp32", gate={"agreement": 0.5, "mean_iou": 0.1})
    plan = compiling.compile_plan(source, tmp_path / "a.plan", calibrate=folder, options=options)
    cut = [noise(40 + i, 52, i)[:48, :48] for i in range(4)]
    assert plan.manifest["precision"] == "fp32" and plan.manifest["gate"] == options.gate
    assert "temperature" not in plan.manifest and set(plan.manifest["precisions"]) == set(cpu_precisions())
    assert plan.manifest["precisions"]["fp32"] == {"agreement": 1.0, "megapixels_per_second": 1.5}
    for precision in set(cpu_precisions()) - {"fp32"}:
        found = plan.manifest["precisions"][precision]
        assert found["measured_on"] == "2 image(s), every other image of some images"
        assert set(found) == {"agreement", "measured_on", "megapixels_per_second"}
        assert 0.8 < found["agreement"] == round(agreement(plan, precision, cut[1::2]), 6) <= 1
    assert plan.ranges in candidate_ranges(folded("final"), [(image, None) for image in cut[::2]])
    layers = {n.removesuffix(".weight") for n in network("final").state_dict() if n.endswith("weight")}
    assert set(plan.ranges.inputs) == layers - {"features.conv1_1"} and plan.ranges.outputs == {}


def five_classes(root):
    """A data folder and a checkpoint of `fast` of five classes, with colours of their own."""
    torch.manual_seed(3)
    made, random = make_network("fast", 5), np.random.default_rng(2)
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    colours = [[10 * i, 0, 255 - i] for i in range(5)]
    description = {"arch": "fast", "classes": list("abcde"), "colours": colours, "training": {}, "scores": {}}
    description["normalisation"] = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    write_checkpoint(root / "c.safetensors", made.state_dict(), description)
    sizes = {"t": (96, 64), "u": (1, 1), "v": (50, 70), "w": (33, 40), "x": (9, 9)}
    palette = compiling.Palette(tuple("abcde"), tuple(map(tuple, colours)))
    ids = {name: random.integers(0, 5, size, np.uint8) for name, size in sizes.items()}
    splits = {"t": "train", "u": "train", "v": "val", "w": "val", "x": "test"}
    images = {name: noise(*size, seed) for seed, (name, size) in enumerate(sizes.items())}
    write_folder(root / "data", {name: (images[name], ids[name] % 3) for name in sizes}, splits)
    for name in sizes:
        write_png(root / "data" / "labels" / f"{name}.png", encode(ids[name], palette))
    return root / "c.safetensors", root / "data", [images["v"], images["w"]]


def test_a_data_folder_calibrates_the_probabilities(tmp_path, untimed):
    source, data, measured = five_classes(tmp_path)
    lines = []
    plan = compiling.compile_plan(source, tmp_path / "a.plan", calibrate=data, report=lines.append)
    temperature = plan.manifest["temperature"]
    assert plan.palette.names == tuple("abcde") and 0.1 <= temperature <= 10 and temperature != 1
    assert lines[0] == f"temperature {temperature:.3f} on 2 image(s), the val split of data"
    assert lines[1].startswith("int8 ranges of least error^") and lines[1].endswith("of these images' pixels as fp32")
    assert lines[2] == "network fast: stride 32, halo 160"
    for i, precision in enumerate(cpu_precisions()):
        found = plan.manifest["precisions"][precision]
        assert {"agreement", "mean_iou", "cross_entropy", "megapixels_per_second"} <= set(found)
        assert lines[3 + i] == (
            f"{precision}: {found['agreement']:.3%} of pixels as fp32; mIoU {found['mean_iou']:.4f}, "
            f"cross entropy {found['cross_entropy']:.4f}; 1.50 megapixels/s here"
        )
        if precision != "fp32":
            assert found["measured_on"] == "2 image(s), the val split of data"
    gates = [line for line in lines if "the gate of 99.5% agreement, 0.2 points of mIoU" in line]
    assert [line.split()[:2] for line in gates] == [
        [precision, "passes" if plan.passes(precision) else "fails"] for precision in cpu_precisions()[1:]
    ]
    assert str(tmp_path) not in json.dumps(plan.manifest)
    assert set(plan.ranges.outputs) == {f"up.{level}.0" for level in range(4)} < set(plan.ranges.inputs)
    assert "stem.0" not in plan.ranges.inputs and "logits" in plan.ranges.inputs
    trained = UInt8Network(compiling.load_network(source)[0])
    for image in measured:
        height, width = image.shape[:2]
        with torch.inference_mode():
            before = trained(torch.from_numpy(pad_to_stride(image, 32))[None])[0, :, :height, :width].numpy()
        with open_engine(plan, device="cpu", precision="fp32") as engine:
            after = run_tiled(engine, plan, image)
        scale = np.abs(before).max()
        np.testing.assert_allclose(temperature * after, before, atol=2e-3 * scale)
        clear = np.diff(np.sort(before, axis=0)[-2:], axis=0)[0] > 5e-3 * scale
        assert clear.mean() > 0.5
        np.testing.assert_array_equal(after.argmax(0)[clear], before.argmax(0)[clear])


def test_without_a_calibration_folder_there_is_no_int8(tmp_path, small_fields):
    source = checkpoint(tmp_path / "c.safetensors", "two")
    plan = compiling.compile_plan(source, tmp_path / "a.plan")
    assert plan.ranges is None and not {"int8", "temperature"} & set(plan.manifest)
    assert set(plan.manifest["precisions"]) == set(cpu_precisions()) - {"int8"}
    assert plan.manifest["gate"] == DEFAULT_GATE and "megapixels_per_second" not in json.dumps(plan.manifest)
    with pytest.raises(UsageError, match="int8 takes its ranges from images; --calibrate DIR"):
        compiling.compile_plan(source, tmp_path / "b.plan", options=CompileOptions(precision="int8"))
    assert not (tmp_path / "b.plan").exists()


def broken_image(root):
    pictures(root / "x", 2)
    (root / "x" / "0.png").write_bytes(b"hello")


def no_validation(root):
    write_folder(root / "x", {name: (noise(8, 8), np.zeros((8, 8), np.uint8)) for name in "ab"}, {"a": "train"})


def no_labels_for_one(root):
    write_folder(root / "x", {name: (noise(8, 8), np.zeros((8, 8), np.uint8)) for name in "abcdef"})
    (root / "x" / "labels" / "c.png").unlink()


def other_colours(root):
    write_folder(root / "x", {name: (noise(8, 8), np.zeros((8, 8), np.uint8)) for name in "abcdef"})
    write_png(root / "x" / "labels" / "e.png", noise(8, 8))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda root: pictures(root / "x", 1), DataError, r"x: has one image: .*; give two or more"),
        (lambda root: pictures(root / "x", 0), UsageError, "no image found"),
        (lambda root: None, UsageError, "x: no such file or folder"),
        (broken_image, ImageError, r"0\.png"),
        (no_validation, DataError, "x: the val split is empty; name its images in split.csv"),
        (no_labels_for_one, DataError, "c: image without label"),
        (other_colours, LabelError, r"e\.png: .* off the palette"),
    ],
)
def test_calibration_folders_that_cannot_be_used(tmp_path, make, error, told):
    make(tmp_path)
    with pytest.raises(error, match=told) as caught:
        compiling.compile_plan(
            checkpoint(tmp_path / "c.safetensors", "one"), tmp_path / "a.plan", calibrate=tmp_path / "x"
        )
    assert str(caught.value).isprintable()
    assert not (tmp_path / "a.plan").exists()


def test_unknown_precision(tmp_path):
    with pytest.raises(UsageError, match="'int4'"):
        compiling.compile_plan(
            tmp_path / "c.safetensors", tmp_path / "a.plan", options=CompileOptions(precision="int4")
        )


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
    with pytest.raises(UsageError, match="no such checkpoint"):
        compiling.load_network(tmp_path / "missing.safetensors")
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


@pytest.mark.parametrize(("arch", "name"), [("two", "head.up1.weight"), ("fast", "stem.1.running_var")])
def test_tensors_that_do_not_fit_the_architecture(tmp_path, arch, name):
    _, description = read_checkpoint(checkpoint(tmp_path / "good.safetensors", arch))
    state = make_network(arch).state_dict()
    for change in ({}, {name: torch.zeros(1)}, {"more": torch.zeros(1)}):
        tensors = {**state, **change} if change else {}
        write_checkpoint(tmp_path / "c.safetensors", tensors, description)
        assert f"'{arch}'" in refused(tmp_path / "c.safetensors")
    write_checkpoint(tmp_path / "c.safetensors", {n: t for n, t in state.items() if n != name}, description)
    assert f"'{arch}'" in refused(tmp_path / "c.safetensors")


@pytest.mark.parametrize("arch", ["two", "fast"])
def test_truncated_checkpoint(tmp_path, arch):
    data = checkpoint(tmp_path / "c.safetensors", arch).read_bytes()
    for size in (7, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "t.safetensors").write_bytes(data[:size])
        with pytest.raises(HistosegError):
            compiling.load_network(tmp_path / "t.safetensors")
