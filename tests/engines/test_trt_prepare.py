"""From plan to engine: taken from the plan or the cache where it fits, built where not, with one line that says why."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
from tiny_plans import changed
from trt_fixtures import A100, H100, H200, spoiled

from histoseg_fast.engines.trt import prepare as preparing
from histoseg_fast.engines.trt.check import synthetic_check
from histoseg_fast.engines.trt.gpu import Gpu
from histoseg_fast.engines.trt.member import FIELD, TRUST_VARIABLE, member_name, with_engine
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.plan import MODEL, pack, read_plan, unpack


def carrying(plan, *prepared):
    """The plan with engines as members."""
    for one in prepared:
        manifest, members = with_engine(plan, one.info, one.data)
        plan = unpack(pack(manifest, members))
    return plan


# -- built once, found again -----------------------------------------------------------------------


def test_built_once_then_found(machine, tiny_plan):
    first = machine.prepare(tiny_plan)
    assert first.source == "built" and first.info.gpu == H200 and first.info.convolutions == {"fp16": 3, "fp32": 1}
    assert machine.lines == [
        "building the fp16 engine of tiny for NVIDIA H200 (sm90), TensorRT 11.4.0.106 (minutes, once): "
        "none is in the cache"
    ]
    second = machine.prepare(tiny_plan)
    assert (second.source, second.data, second.info) == ("cache", first.data, first.info)
    assert machine.lines == [] and len(machine.trt.builds) == 1 and second.engine.content == first.engine.content


def test_the_timing_cache_is_kept(machine, tiny_plan):
    machine.prepare(tiny_plan)
    machine.prepare(tiny_plan, BuildOptions.of(tiny_plan, batch=1))
    assert [config.timing is not None for config in machine.trt.builds] == [True, True]
    assert len(list(machine.folder.rglob("*.timing"))) == 1


REBUILDS = {
    "another GPU": (lambda m: m.install("11.4.0.106", A100), "the one in the cache is for another GPU, NVIDIA H200"),
    "the same architecture": (lambda m: m.install("11.4.0.106", H100), "is for another GPU, NVIDIA H200 (sm90)"),
    "another TensorRT": (lambda m: m.install("10.13.0.35"), "the one in the cache is for TensorRT 11.4.0.106"),
    "a truncated file": (lambda m: truncate(m.entries()[0]), "the one in the cache is damaged"),
    "an empty file": (lambda m: m.entries()[0].write_bytes(b""), "the one in the cache is damaged"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", REBUILDS)
def test_rebuilt_with_one_line_that_says_why(machine, tiny_plan, name):
    machine.prepare(tiny_plan)
    change, why = REBUILDS[name]
    change(machine)
    assert machine.prepare(tiny_plan).source == "built"
    (line,) = machine.lines
    assert why in line and line.isprintable()
    assert machine.prepare(tiny_plan).source == "cache"


def test_rebuilt_when_tensorrt_rejects_what_is_kept(machine, tiny_plan, monkeypatch):
    machine.prepare(tiny_plan)
    whole = preparing.build.load_engine
    answers = iter([EngineError("TensorRT 11.4.0.106 rejects the engine (magicTag failed)")])

    def load(*arguments, **more):
        for error in answers:
            raise error
        return whole(*arguments, **more)

    monkeypatch.setattr(preparing.build, "load_engine", load)
    assert machine.prepare(tiny_plan).source == "built"
    assert (
        "the one in the cache was built for NVIDIA H200 (sm90), TensorRT 11.4.0.106, and TensorRT 11.4.0.106 rejects "
        "the engine (magicTag failed)"
    ) in machine.lines[0]


def test_other_options_and_other_networks_have_engines_of_their_own(machine, tiny_plan):
    machine.prepare(tiny_plan)
    for options in ({"batch": 2}, {"precision": "fp32"}, {"hardware": "same-cc"}, {"workspace_gib": 1.0}):
        assert machine.prepare(tiny_plan, BuildOptions.of(tiny_plan, **options)).source == "built"
    assert {path.parent.name for path in machine.entries()} and len({p.parent for p in machine.entries()}) == 5


def test_a_hardware_compatible_engine_serves_the_next_gpu(machine, tiny_plan):
    options = BuildOptions.of(tiny_plan, hardware="ampere+")
    machine.prepare(tiny_plan, options)
    machine.install("11.4.0.106", A100)
    assert machine.prepare(tiny_plan, options).source == "cache"


def test_a_version_compatible_engine_built_here_may_run_its_code(machine, tiny_plan):
    options = BuildOptions.of(tiny_plan, version_compatible=True)
    machine.prepare(tiny_plan, options)
    machine.install("11.5.0.1")
    assert machine.prepare(tiny_plan, options).source == "cache"


def test_two_at_a_time_build_once(machine, tiny_plan):
    results = []
    threads = [threading.Thread(target=lambda: results.append(preparing.prepare(tiny_plan).source)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["built", "cache", "cache"] and len(machine.trt.builds) == 1


def test_a_cache_that_cannot_be_written_costs_one_line(machine, tiny_plan):
    machine.folder.write_text("a file in the folder's place")
    prepared = machine.prepare(tiny_plan)
    assert prepared.source == "built" and "could not be kept for the next run" in machine.lines[1]


# -- what refuses an engine ------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["build returns None", "deserialise returns None", "fp32 kernels", "no details"])
def test_nothing_is_kept_of_a_build_that_failed(machine, tiny_plan, fault):
    machine.trt.faults.add(fault)
    with pytest.raises(EngineError):
        machine.prepare(tiny_plan)
    assert machine.entries() == []
    machine.trt.faults.clear()
    assert machine.prepare(tiny_plan).source == "built"


def test_ctrl_c_frees_the_lock_and_keeps_nothing(machine, tiny_plan):
    machine.trt.faults.add("interrupted")
    with pytest.raises(KeyboardInterrupt):
        machine.prepare(tiny_plan)
    machine.trt.faults.clear()
    assert machine.prepare(tiny_plan).source == "built" and len(machine.lines) == 1


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_logits_that_are_not_finite_refuse_the_engine(machine, tiny_plan, value):
    machine.run_engines(spoiled(value))
    check = synthetic_check(tiny_plan, BuildOptions.of(tiny_plan))
    with pytest.raises(EngineError, match="not finite; it is refused; use --precision fp32"):
        machine.prepare(tiny_plan, check=check)
    assert machine.entries() == []


def test_agreement_is_measured_once_and_kept(machine, tiny_plan):
    calls = []

    def count(logits):
        calls.append(1)
        return spoiled(1e4)(logits)  # one pixel of 64 x 64 is wrong

    machine.run_engines(count)
    check = synthetic_check(tiny_plan, BuildOptions.of(tiny_plan))
    first = machine.prepare(tiny_plan, check=check)
    assert 1 - 1 / 64**2 - 1e-9 <= first.info.agreement <= 1
    assert machine.prepare(tiny_plan, check=check).info.agreement == first.info.agreement and calls == [1]


# -- 8 bits ----------------------------------------------------------------------------------------

RANGES = {"inputs": {"b": 5.0, "up": 6.0}, "outputs": {}}


def test_an_int8_engine_is_built_from_the_ranges_and_found_by_them(machine, tiny_plan):
    plan, other = (changed(tiny_plan, int8={**RANGES, "outputs": outputs}) for outputs in ({}, {"b": 7.0}))
    options = BuildOptions.of(plan, precision="int8")
    built = machine.prepare(plan, options)
    assert (
        built.info.convolutions == {"fp16": 1, "fp32": 1, "int8": 2} and "the int8 engine of tiny" in machine.lines[0]
    )
    assert machine.prepare(plan, options).source == "cache"
    assert machine.prepare(other, options).source == "built"
    assert member_name(built.info) == "engines/sm90-11.4.0.106-int8-NVIDIA_H200.engine"
    carried = carrying(plan, built)
    assert machine.prepare(carried, options).source == "plan"
    assert machine.prepare(carried, BuildOptions.of(plan)).source == "built"
    assert machine.prepare(changed(carried, int8=RANGES | {"outputs": {"b": 7.0}}), options).source == "cache"


@pytest.mark.parametrize(
    ("precision", "gpu", "words"),
    [
        (
            "fp8",
            A100,
            r"fp8 needs a GPU of compute capability 8\.9 or newer, not NVIDIA A100 \(sm80\); use --precision",
        ),
        ("int8", Gpu("NVIDIA V100", (7, 0)), r"int8 needs a GPU of compute capability 7\.5 or newer"),
        ("fp8", H200, r"no convolution that TensorRT runs in fp8; use --precision fp16"),
    ],
)
def test_cards_and_networks_without_8_bits_are_told_before_a_build(machine, tiny_plan, precision, gpu, words):
    machine.install("11.4.0.106", gpu)
    plan = changed(tiny_plan, int8=RANGES)
    with pytest.raises((EngineError, PlanError), match=words):
        machine.prepare(plan, BuildOptions.of(plan, precision=precision))
    assert machine.trt.builds == machine.lines == []


def test_8_bits_need_ranges(machine, tiny_plan_path):
    plan = read_plan(tiny_plan_path)
    with pytest.raises(PlanError, match="compiled without ranges, which int8 needs; compile it with --cal") as caught:
        machine.prepare(plan, BuildOptions.of(plan, precision="int8"))
    assert str(caught.value).startswith(str(tiny_plan_path)) and machine.trt.builds == []


# -- engines inside plans --------------------------------------------------------------------------


def test_an_engine_in_the_plan_is_taken_first(machine, tiny_plan):
    built = machine.prepare(tiny_plan)
    plan = carrying(tiny_plan, built)
    assert "engines/sm90-11.4.0.106-fp16-NVIDIA_H200.engine" in plan.members
    machine.entries()[0].unlink()
    found = machine.prepare(plan)
    assert (found.source, found.data, found.info) == ("plan", built.data, built.info) and machine.lines == []


def test_the_engine_of_the_right_gpu_among_several(machine, tiny_plan):
    built = [machine.prepare(tiny_plan)]
    for version, gpu in (("11.4.0.106", A100), ("10.13.0.35", A100)):
        machine.install(version, gpu)
        built.append(machine.prepare(tiny_plan))
    plan = carrying(tiny_plan, *built)
    assert len(plan.members) == 4
    found = machine.prepare(plan)
    assert (found.source, found.info) == ("plan", built[2].info)


UNFIT = {
    "another GPU": (lambda m, p: (m.install("11.4.0.106", A100), p)[1], "is for another GPU, NVIDIA H200 (sm90)"),
    "another TensorRT": (lambda m, p: (m.install("10.13.0.35"), p)[1], "is for TensorRT 11.4.0.106"),
    "another network": (lambda m, p: edited(p, model="0" * 64), "is not of this network"),
    "another digest": (lambda m, p: edited(p, sha256="0" * 64), "is not of this network"),
    "no sound papers": (lambda m, p: edited(p, gpu="a\nb"), "the plan has no sound papers"),
    "too small": (lambda m, p: (m, p)[1], "for tiles of at most 1128 pixels"),
}


def edited(plan, **changes):
    (name,) = plan.manifest[FIELD]
    papers = {**plan.manifest[FIELD][name], **changes}
    return unpack(pack({**plan.manifest, FIELD: {name: papers}}, plan.members))


@pytest.mark.parametrize("name", UNFIT)
def test_a_plan_whose_engine_does_not_fit_says_so(machine, tiny_plan, name):
    plan = carrying(tiny_plan, machine.prepare(tiny_plan))
    machine.entries()[0].unlink()
    change, why = UNFIT[name]
    plan = change(machine, plan)
    options = BuildOptions.of(plan, tile=2000) if name == "too small" else None
    assert machine.prepare(plan, options).source == "built"
    (line,) = machine.lines
    assert why in line and line.isprintable()


def test_a_plan_that_tensorrt_rejects_says_what_it_was_built_for_and_what_is_here(machine, tiny_plan):
    built = machine.prepare(tiny_plan)
    plan = carrying(tiny_plan, dataclasses.replace(built, data=b"junk", info=built.info.sealed(b"junk", {})))
    machine.entries()[0].unlink()
    assert machine.prepare(plan).source == "built"
    (line,) = machine.lines
    assert line.startswith("building the fp16 engine of tiny for NVIDIA H200 (sm90), TensorRT 11.4.0.106")
    assert "the one in the plan was built for NVIDIA H200 (sm90), TensorRT 11.4.0.106, and TensorRT" in line


def test_code_in_a_plan_is_run_only_where_the_user_says_so(machine, tiny_plan, monkeypatch):
    options = BuildOptions.of(tiny_plan, version_compatible=True)
    plan = carrying(tiny_plan, machine.prepare(tiny_plan, options))
    machine.install("11.5.0.1")
    assert machine.prepare(plan).source == "built" and f"{TRUST_VARIABLE}=1" in machine.lines[0]
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    assert machine.prepare(plan).source == "plan"


@pytest.mark.parametrize("papers", [None, 3, [], {"engines/x.engine": 3}, {"engines/x\n.engine": {}}])
def test_papers_of_any_kind(machine, tiny_plan, papers):
    plan = unpack(pack({**tiny_plan.manifest, FIELD: papers}, tiny_plan.members))
    assert machine.prepare(plan).source == "built" and machine.lines[0].isprintable()


@pytest.mark.parametrize("gpu", [H200, Gpu("GPU /../ ü", (12, 0))])
def test_member_names_are_names_that_plans_allow(machine, tiny_plan, gpu):
    machine.install("10.13.3.9.post1", gpu)
    built = machine.prepare(tiny_plan)
    assert member_name(built.info).startswith(f"engines/{gpu.sm}-10.13.3.9.post1-fp16-")
    assert carrying(tiny_plan, built).members[member_name(built.info)] == built.data
    assert machine.prepare(tiny_plan).source == "cache"


def test_a_bare_engine(machine, tiny_plan, tmp_path):
    path = tmp_path / "bare.engine"
    path.write_bytes(machine.prepare(tiny_plan).data)
    assert preparing.load_bare_engine(path)[1].content["gpu"] == H200.name
    machine.install("11.4.0.106", A100)
    with pytest.raises(EngineError, match=r"rejects the engine .* here NVIDIA A100 \(sm80\); build it here"):
        preparing.load_bare_engine(path)
    options = BuildOptions.of(tiny_plan, version_compatible=True)
    path.write_bytes(machine.prepare(tiny_plan, options).data)
    with pytest.raises(EngineError, match="host code is not allowed"):
        preparing.load_bare_engine(path)
    with pytest.raises(EngineError, match="No such file"):
        preparing.load_bare_engine(tmp_path / "missing")


def test_without_the_onnx_package(machine, tiny_plan, monkeypatch):
    from histoseg_fast import extras

    plan = carrying(tiny_plan, machine.prepare(tiny_plan))
    monkeypatch.setattr(extras, "has", lambda *packages: "onnx" not in packages)
    assert machine.prepare(plan).source == "plan"
    with pytest.raises(ValueError, match=r"this needs onnx; pip install 'histoseg-fast\[tensorrt\]'"):
        machine.prepare(tiny_plan)
    assert MODEL in plan.members
