"""`compile --tensorrt`: the engine and what was measured of it, in the plan; and nothing in it after a refusal."""

from __future__ import annotations

import numpy as np
import pytest
from random_networks import noise
from tiny_plans import tiny_manifest
from trt_fixtures import A100, spoiled

from histoseg_fast.compiling.calibrate import Calibration
from histoseg_fast.compiling.tensorrt import add_engine
from histoseg_fast.engines import choose_gpu_precision, choose_precision
from histoseg_fast.engines.trt.member import FIELD
from histoseg_fast.engines.trt.options import BuildOptions
from histoseg_fast.errors import EngineError
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.plan import MODEL, read_plan, write_plan

NAME = "engines/sm90-11.4.0.106-fp16-NVIDIA_H200.engine"


@pytest.fixture
def plan(tiny_plan, tmp_path):
    """The tiny plan as a file of its own."""
    return write_plan(tmp_path / "tiny.plan", tiny_manifest(), {MODEL: tiny_plan.members[MODEL]})


@pytest.fixture
def add(machine):
    """Add the engine of a plan, whose logits go through `spoil`: (plan, lines)."""

    def run(plan, spoil=lambda logits: logits, options=None, labelled=False):
        lines = []
        machine.run_engines(spoil)
        added = add_engine(plan, options or BuildOptions.of(plan), calibration(labelled), report=lines.append)
        return added, lines

    return run


def calibration(labelled=False, count=2):
    images = [noise(48 + 2 * i, 52, i) for i in range(count)]
    labels = [np.full(image.shape[:2], i % 3, np.uint8) if labelled else None for i, image in enumerate(images)]
    return Calibration((), list(zip(images, labels, strict=True)), f"{count} images")


def test_the_engine_travels_in_the_plan(machine, add, plan):
    added, lines = add(plan)
    assert read_plan(plan.path).members == added.members and set(added.members) == {MODEL, NAME}
    papers = added.manifest[FIELD][NAME]
    assert papers["gpu"] == "NVIDIA H200" and papers["precision"] == "fp16" and papers["tensorrt"] == "11.4.0.106"
    assert papers["convolutions"] == {"fp16": 3, "fp32": 1} and papers["agreement"] == 1.0
    assert papers["sha256"] == added.manifest["members"][NAME]["sha256"]
    assert added.manifest["precisions"]["fp16"] == {
        "agreement": 1.0,
        "measured_on": "2 images, TensorRT 11.4.0.106 on NVIDIA H200",
    }
    assert added.passes("fp16") and added.manifest["precisions"]["fp32"] == {"agreement": 1.0}
    assert all(line.isprintable() for line in lines) and "3 in fp16, 1 in fp32" in "".join(lines)
    machine.entries()[0].unlink()
    assert machine.prepare(added).source == "plan"


def test_agreement_counts_every_pixel(machine, add, plan):
    """Two images, one wrong pixel each; more images than one, of different sizes."""
    added, _ = add(plan, spoiled(1e4))
    wrong, pixels = 2, 48 * 52 + 50 * 52
    assert 1 - wrong / pixels - 1e-6 <= added.agreement("fp16") < 1


def test_labels_give_miou_too(machine, add, plan):
    added, _ = add(plan, labelled=True)
    assert set(added.manifest["precisions"]["fp16"]) == {"agreement", "mean_iou", "cross_entropy", "measured_on"}


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_logits_that_are_not_finite_leave_the_plan_as_it_is(machine, add, plan, value):
    before = plan.path.read_bytes()
    with pytest.raises(EngineError, match="not finite"):
        add(plan, spoiled(value))
    assert plan.path.read_bytes() == before and machine.entries() == []


@pytest.mark.parametrize("fault", ["build returns None", "fp32 kernels", "no details", "deserialise returns None"])
def test_refusals_leave_the_plan_as_it_is(machine, add, plan, fault):
    machine.trt.faults.add(fault)
    before = plan.path.read_bytes()
    with pytest.raises(EngineError):
        add(plan)
    assert plan.path.read_bytes() == before


def test_an_engine_from_the_cache_is_measured_again(machine, add, plan):
    machine.prepare(plan)
    added, _ = add(plan)
    assert added.agreement("fp16") == 1.0 and len(machine.trt.builds) == 1
    before = plan.path.read_bytes()
    with pytest.raises(EngineError, match="not finite"):
        add(plan, spoiled(np.inf))
    assert plan.path.read_bytes() == before


def test_engines_for_several_machines_in_one_plan(machine, add, plan):
    first, _ = add(plan)
    machine.install("10.13.0.35", A100)
    second, _ = add(first)
    assert set(second.members) == {MODEL, NAME, "engines/sm80-10.13.0.35-fp16-NVIDIA_A100.engine"}
    assert second.members[NAME] == first.members[NAME]
    third, _ = add(second)
    assert third.members == second.members


def test_fp32_engines_say_nothing_of_fp16(machine, add, plan):
    added, _ = add(plan, options=BuildOptions.of(plan, precision="fp32"))
    assert set(added.manifest["precisions"]) == {"fp32"} and NAME.replace("fp16", "fp32") in added.manifest[FIELD]


@pytest.mark.parametrize(("wrong", "verdict"), [(0, "passes"), (1, "fails")])
def test_int8_figures_of_tensorrt_stand_beside_the_cpus(machine, add, tiny_plan, tmp_path, wrong, verdict):
    measured = {"fp32": {"agreement": 1.0}, "int8": {"agreement": 0.997, "measured_on": "the CPU"}}
    more = {"int8": {"inputs": {"b": 5.0, "up": 6.0}, "outputs": {}}, "gate": {"agreement": 0.9999, "mean_iou": 0.0}}
    manifest = tiny_manifest(precision="int8", precisions=measured, **more)
    plan = write_plan(tmp_path / "tiny.plan", manifest, {MODEL: tiny_plan.members[MODEL]})
    options = BuildOptions.of(plan, precision="int8")
    added, lines = add(plan, spoiled(1e4) if wrong else lambda logits: logits, options)
    assert added.manifest["precisions"]["int8"] == measured["int8"]
    figures = added.manifest["precisions"]["tensorrt-int8"]
    assert (figures["agreement"] == 1.0) == (not wrong) and "TensorRT 11.4.0.106 on NVIDIA H200" in figures[
        "measured_on"
    ]
    assert f"tensorrt-int8 {verdict} the gate of 100.0% agreement, 0 points of mIoU" in lines
    assert added.manifest[FIELD][NAME.replace("fp16", "int8")]["convolutions"] == {"fp16": 1, "fp32": 1, "int8": 2}
    assert choose_gpu_precision(added, "auto", (0,), "tensorrt") == ("fp16" if wrong else "int8")
    assert choose_precision(added, "auto") == ("int8" if "int8" in cpu_precisions() else "fp32")


def test_fp16_is_told_to_pass_or_to_fail(machine, add, plan):
    assert "fp16 passes the gate of 99.5% agreement, 0.2 points of mIoU" in add(plan)[1]
