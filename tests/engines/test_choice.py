"""The precision that is fastest here: measured once, remembered, and never the cause of a failure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_plans import changed

from histoseg_fast import engines
from histoseg_fast.cache import FOLDER_VARIABLE
from histoseg_fast.engines import choice, choose_precision
from histoseg_fast.engines.choice import FILE, MAX_CHOICES, fastest
from histoseg_fast.plan import Plan

ALL = ("fp32", "bf16", "int8")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    return tmp_path / FILE


class Machine:
    """`measure` answers from `speeds` and notes what it was asked."""

    def __init__(self, **speeds: float):
        self.speeds, self.asked = speeds, []

    def measure(self, plan: Plan, precision: str) -> float:
        self.asked.append(precision)
        return self.speeds[precision]


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({"fp32": 1, "bf16": 2, "int8": 4}, "int8"),
        ({"fp32": 1, "bf16": 2, "int8": 1.5}, "bf16"),  # no fast int8 after all
        ({"fp32": 3, "bf16": 2, "int8": 1}, "fp32"),
        ({"fp32": 1, "bf16": 3.9, "int8": 4}, "bf16"),  # as fast, more exact
    ],
)
def test_the_fastest_is_measured_once(tiny_plan, cache, speeds, chosen):
    machine = Machine(**speeds)
    assert [fastest(tiny_plan, ALL, machine.measure) for _ in range(3)] == [chosen] * 3
    assert machine.asked == list(ALL)
    assert list(json.loads(cache.read_text()).values()) == [speeds]


def test_a_single_candidate_is_not_measured(tiny_plan, cache):
    assert fastest(tiny_plan, ("fp32",), Machine().measure) == "fp32" and not cache.exists()


@pytest.mark.parametrize("what", ["plan", "candidates", "CPU", "cores", "OpenVINO"])
def test_another_plan_or_machine_is_measured_anew(tiny_plan, cache, monkeypatch, what):
    fastest(tiny_plan, ALL, Machine(fp32=1, bf16=2, int8=3).measure)
    other = {"CPU": "cpu_name", "cores": "available_cores", "OpenVINO": "version"}
    if what in other:
        monkeypatch.setattr(choice, other[what], lambda *_: "another")
    plan = changed(tiny_plan, name="other") if what == "plan" else tiny_plan
    machine = Machine(fp32=3, bf16=2, int8=1)
    assert fastest(plan, ALL[:2] if what == "candidates" else ALL, machine.measure) == "fp32"
    assert machine.asked and len(json.loads(cache.read_text())) == 2


@pytest.mark.parametrize("damage", ["", "[1]", "{", '{"a": NaN}', "[" * 100_000, "half", "null", "text"])
def test_a_damaged_file_is_measured_anew(tiny_plan, cache, damage):
    machine = Machine(fp32=1, bf16=2, int8=3)
    fastest(tiny_plan, ALL, machine.measure)
    (key,) = json.loads(cache.read_text())
    broken = {"half": {"fp32": 1}, "null": None, "text": {"fp32": "1", "bf16": -1, "int8": True}}
    cache.write_text(json.dumps({key: broken[damage]}) if damage in broken else damage)
    assert fastest(tiny_plan, ALL, machine.measure) == "int8" and machine.asked == [*ALL, *ALL]
    assert json.loads(cache.read_text())[key] == machine.speeds


def test_a_cache_that_cannot_be_written_costs_the_measurement_alone(tiny_plan, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    machine = Machine(fp32=1, bf16=2, int8=3)
    assert [fastest(tiny_plan, ALL, machine.measure) for _ in range(2)] == ["int8"] * 2
    assert machine.asked == [*ALL, *ALL]


def test_the_file_stays_small(tiny_plan, cache):
    cache.parent.mkdir(exist_ok=True)
    cache.write_text(json.dumps({str(i): {} for i in range(2 * MAX_CHOICES)}))
    fastest(tiny_plan, ALL, Machine(fp32=1, bf16=2, int8=3).measure)
    kept = list(json.loads(cache.read_text()))
    assert len(kept) == MAX_CHOICES and kept[-2] == str(2 * MAX_CHOICES - 1) and len(kept[-1]) == 64


def test_what_really_runs_is_measured(tiny_plan, cache, monkeypatch):
    """Through the engine itself: figures for every candidate, and the best of them is what `auto` says."""
    here = engines.cpu_precisions()[:2]
    monkeypatch.setattr(engines, "cpu_precisions", lambda: here)
    plan = changed(tiny_plan, precisions={p: {"agreement": 1.0} for p in here})
    chosen = choose_precision(plan, "auto")
    if len(here) == 1:
        assert chosen == "fp32" and not cache.exists()
    else:
        (speeds,) = json.loads(cache.read_text()).values()
        assert set(speeds) == set(here) and speeds[chosen] >= 0.95 * max(speeds.values()) > 0
