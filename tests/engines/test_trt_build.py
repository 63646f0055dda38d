"""Building: what is asked of TensorRT, what becomes of its refusals, and the packages that may be missing."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from fake_tensorrt import fake_tensorrt

from histoseg_fast.engines.trt import build, library
from histoseg_fast.engines.trt.fp16 import typed_model
from histoseg_fast.engines.trt.layers import TypedModel
from histoseg_fast.engines.trt.options import HARDWARE, BuildOptions, choose_profile
from histoseg_fast.errors import EngineError, PlanError, UsageError
from histoseg_fast.plan import MODEL
from histoseg_fast.plans import open_plan


@pytest.fixture(scope="module")
def model(tiny_plan):
    return typed_model(tiny_plan.members[MODEL], "fp16")


@pytest.fixture
def options(tiny_plan):
    return BuildOptions.of(tiny_plan)


def one_line(caught):
    message = str(caught.value)
    assert message.isprintable() and len(message) < 500
    return message


# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.13.0.35", "11.4.0.106"])
def test_one_code_path_builds_under_both_versions(machine, model, options, version):
    trt = machine.install(version)
    data, timing = build.build_engine(model, options)
    _, engine = build.load_engine(data)
    assert build.inspect_engine(engine, model) == {"fp16": 3, "fp32": 1} and timing == b"timings"
    (config,) = trt.builds
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED
    assert config.limits == {trt.MemoryPoolType.WORKSPACE: 4 << 30}
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE
    assert config.flags == {trt.BuilderFlag.TF32}


def test_options_reach_the_builder(machine, model, options):
    trt = machine.trt
    for hardware, name in HARDWARE.items():
        asked = dataclasses.replace(options, hardware=hardware, version_compatible=True, workspace_gib=0.5)
        build.build_engine(model, asked)
        config = trt.builds[-1]
        assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel[name]
        assert trt.BuilderFlag.VERSION_COMPATIBLE in config.flags
        assert config.limits == {trt.MemoryPoolType.WORKSPACE: 1 << 29}


def test_fp32_engines_do_without_tf32(machine, tiny_plan, options):
    model = typed_model(tiny_plan.members[MODEL], "fp32")
    data, _ = build.build_engine(model, dataclasses.replace(options, precision="fp32"))
    assert machine.trt.builds[0].flags == set()
    assert build.inspect_engine(build.load_engine(data)[1], model) == {"fp32": 4}


def test_profiles_hold_whole_images_and_batches_of_tiles(machine, model, options):
    build.build_engine(model, options)
    single, batches = (profile.shapes["rgb"] for profile in machine.trt.builds[0].profiles)
    assert single == ((1, 2, 2, 3), (1, 720, 1128, 3), (1, 1128, 1128, 3))
    assert batches == ((1, 2, 2, 3), (4, 1128, 1128, 3), (4, 1128, 1128, 3))


@pytest.mark.parametrize(
    ("shape", "profile"),
    [((1, 720, 1128, 3), 0), ((1, 2, 2, 3), 0), ((4, 1128, 1128, 3), 1), ((2, 256, 300, 3), 1), ((5, 8, 8, 3), None),
     ((1, 1130, 8, 3), None), ((1, 1, 8, 3), None), ((1, 8, 8, 4), None)],
)  # fmt: skip
def test_choice_of_profile(options, shape, profile):
    assert choose_profile(options.profiles, shape) == profile


def test_sizes_follow_the_stride_and_the_plan(tiny_plan):
    manifest = dict(tiny_plan.manifest, stride=32, halo=64, tile={"default": 2000})
    plan = dataclasses.replace(tiny_plan, manifest=manifest)
    options = BuildOptions.of(plan, batch=1)
    assert options.profiles == (options.profiles[0],)
    assert options.profiles[0].minimum == (1, 32, 32, 3)
    assert options.profiles[0].optimum == (1, 736, 1152, 3) and options.profiles[0].maximum == (1, 1984, 1984, 3)
    assert [BuildOptions.of(plan, tile=t).batch for t in (0, 1000, 2080, 4000, 20_000)] == [2, 4, 1, 1, 1]
    assert BuildOptions.of(plan, tile=4000, batch=8).batch == 8
    assert BuildOptions.of(plan, tile=4000).tile == 4000 and BuildOptions.of(plan, tile=100).tile == 1152
    keys = {BuildOptions.of(plan, batch=b, tile=t).key() for b in (1, 2) for t in (0, 3000)}
    assert len(keys) == 4


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16"}, {"hardware": "turing"}, {"workspace_gib": 0}, {"workspace_gib": float("nan")},
     {"workspace_gib": 1e9}, {"batch": 0}, {"batch": 1 << 20}, {"precision": "fp8", "hardware": "ampere+"}],
)  # fmt: skip
def test_options_that_make_no_sense(options, change):
    with pytest.raises(UsageError) as caught:
        dataclasses.replace(options, **change)
    one_line(caught)


@pytest.mark.parametrize("version", ["10.13.0.35", "11.4.0.106"])
@pytest.mark.parametrize(
    ("precision", "counts"), [("int8", {"fp16": 1, "fp32": 1, "int8": 21}), ("fp8", {"fp16": 1, "fp32": 1, "fp8": 21})]
)
def test_8_bits_take_the_same_path(machine, version, precision, counts):
    """No flag and no calibrator: the pairs in the graph say it all."""
    trt, plan = machine.install(version), open_plan("fast")
    model = typed_model(plan.members[MODEL], precision, plan.ranges)
    options = BuildOptions.of(plan, precision=precision)
    data, _ = build.build_engine(model, options)
    assert build.inspect_engine(build.load_engine(data)[1], model) == counts
    assert trt.builds[0].flags == {trt.BuilderFlag.TF32}
    trt.faults.add("unfused")
    data, _ = build.build_engine(model, options)
    with pytest.raises(
        EngineError, match=rf"built for {precision} but 21 convolution\(s\) .* run in fp16; it is refused"
    ):
        build.inspect_engine(build.load_engine(data)[1], model)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_transposed_convolutions_have_kernels(machine, precision):
    plan = open_plan("final")
    model = typed_model(plan.members[MODEL], precision, plan.ranges)
    data, _ = build.build_engine(model, BuildOptions.of(plan, precision=precision))
    found = build.inspect_engine(build.load_engine(data)[1], model)
    assert found == {"fp32": 1, **{"int8": {"fp16": 1, "int8": 11}, "fp8": {"fp16": 3, "fp8": 9}}[precision]}


# -- timing cache, progress, Ctrl-C ----------------------------------------------------------------


def test_the_timing_cache_is_used_unless_it_is_of_another_gpu(machine, model, options):
    _, timing = build.build_engine(model, options, timing=b"old")
    assert timing == b"timings"
    machine.trt.faults.add("timing cache of another GPU")
    assert build.build_engine(model, options, timing=b"old")[1] == b"timings"
    assert [config.timing.content for config in machine.trt.builds] == [b"timings"] * 2


def test_progress(machine, model, options):
    seen = []
    build.build_engine(model, options, progress=lambda phase, share: seen.append((phase, share)))
    assert {phase for phase, _ in seen} == {"Building engine", "Timing"}
    for phase in ("Building engine", "Timing"):
        shares = [share for name, share in seen if name == phase]
        assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1 and len(shares) == 6


def test_ctrl_c_stops_the_build(machine, model, options):
    machine.trt.faults.add("interrupted")
    with pytest.raises(KeyboardInterrupt):
        build.build_engine(model, options)


def test_an_error_in_the_progress_display_does_not_reach_tensorrt(machine, model, options):
    def broken(phase, share):
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError):
        build.build_engine(model, options, progress=broken)


# -- refusals --------------------------------------------------------------------------------------


def test_a_build_that_returns_none(machine, model, options):
    machine.trt.faults.add("build returns None")
    with pytest.raises(EngineError, match=r"could not build .*Could not find any implementation for node_conv2d"):
        build.build_engine(model, options)


def test_no_builder(machine, model, options):
    machine.trt.faults.add("no builder")
    with pytest.raises(EngineError, match=r"cannot build here \(CUDA initialization failure with error: 35") as caught:
        build.build_engine(model, options)
    one_line(caught)


def test_a_graph_that_the_parser_refuses(machine, tiny_plan, options):
    """The plan's own graph, too: its first node is a Transpose of uint8."""
    with pytest.raises(PlanError, match="unsupported data type UINT8") as caught:
        build.build_engine(TypedModel(tiny_plan.members[MODEL], {}), options)
    one_line(caught)


def test_fp32_kernels_in_an_fp16_engine(machine, model, options):
    machine.trt.faults.add("fp32 kernels")
    data, _ = build.build_engine(model, options)
    with pytest.raises(EngineError, match=r"3 convolution\(s\) .* run in fp32; it is refused"):
        build.inspect_engine(build.load_engine(data)[1], model)


def test_an_inspector_that_shows_names_alone(machine, model, options):
    machine.trt.faults.add("no details")
    data, _ = build.build_engine(model, options)
    with pytest.raises(EngineError, match="does not show"):
        build.inspect_engine(build.load_engine(data)[1], model)


def test_none_from_deserialisation(machine):
    with pytest.raises(EngineError, match=r"TensorRT 11\.4\.0\.106 rejects the engine \(Serialization assertion"):
        build.load_engine(b"nonsense")


# -- the package -----------------------------------------------------------------------------------


def missing(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    library.tensorrt.cache_clear()
    with pytest.raises(EngineError) as caught:
        library.tensorrt()
    assert "pip install 'histoseg-fast[tensorrt]'" in str(caught.value)
    return one_line(caught)


def test_tensorrt_is_not_installed(machine, monkeypatch):
    assert "tensorrt" in missing(monkeypatch, None)


@pytest.mark.parametrize("version", ["8.6.1", "10.12.0.36", "10.1.0"])
def test_tensorrt_is_too_old(machine, monkeypatch, version):
    assert f"TensorRT {version} is installed; 10.13 or newer" in missing(monkeypatch, fake_tensorrt(version))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.13.3.9.post1", (10, 13, 3, 9)), ("11.4.0.106", (11, 4, 0, 106)), ("11.0.0", (11, 0, 0)), ("", ())],
)
def test_versions(text, numbers):
    assert library.version_of(text) == numbers


def test_a_broken_library_is_told_in_one_line(machine, monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise FileNotFoundError('Could not find: nvinfer_11.dll\\nSearched: ...')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt")
    library.tensorrt.cache_clear()
    with pytest.raises(EngineError, match=r"nvinfer_11\.dll\)") as caught:
        library.tensorrt()
    one_line(caught)
