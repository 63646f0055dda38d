"""The real TensorRT on a real GPU: skipped, saying so, where either is missing."""

from __future__ import annotations

import pytest
from random_networks import plan_of

from histoseg_fast.engines.trt.check import synthetic_check
from histoseg_fast.engines.trt.gpu import current_gpu
from histoseg_fast.engines.trt.library import tensorrt
from histoseg_fast.engines.trt.options import BuildOptions, check_card
from histoseg_fast.engines.trt.prepare import prepare
from histoseg_fast.errors import EngineError
from histoseg_fast.plans import open_plan

OPTIONS = [{}, {"precision": "fp32"}, {"hardware": "same-cc"}, {"hardware": "ampere+"}, {"version_compatible": True}]


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    try:
        tensorrt(), current_gpu()
    except EngineError as error:
        pytest.skip(f"needs TensorRT and an NVIDIA GPU ({error})")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_convolutions_run_in_the_precision_asked_for(tiny_plan, tmp_path, options):
    wanted = BuildOptions.of(tiny_plan, **options)
    shares = []
    built = prepare(tiny_plan, wanted, cache=tmp_path, progress=lambda phase, share: shares.append(share))
    assert built.source == "built" and 1.0 in shares
    assert built.info.convolutions.get(wanted.precision, 0) >= 3
    assert prepare(tiny_plan, wanted, cache=tmp_path).source == "cache"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "count"),
    [("fast", "int8", 21), ("final", "int8", 11), ("fast", "fp8", 21), ("final", "fp8", 9)],
)
def test_8_bits(tmp_path, name, precision, count):
    """The engine runs in them, and gives the classes that its graph was predicted to give on the CPU."""
    plan = open_plan(name)
    try:
        check_card(precision, current_gpu())
    except EngineError as error:
        pytest.skip(str(error))
    options = BuildOptions.of(plan, precision=precision)
    info = prepare(plan, options, check=synthetic_check(plan, options), cache=tmp_path).info
    assert info.convolutions[precision] == count and info.agreement > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shipped", "fast"])
def test_whole_networks(tmp_path, name):
    plan = open_plan("final") if name == "shipped" else plan_of(name)
    info = prepare(plan, cache=tmp_path).info
    assert info.convolutions["fp16"] == {"shipped": 12, "fast": 22}[name]
