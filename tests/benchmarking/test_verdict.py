"""What is said to limit a run, and what to help, follows from the figures."""

from __future__ import annotations

from typing import Any

import pytest

from histoseg_fast.benchmarking import verdict
from histoseg_fast.benchmarking.verdict import judge, warn
from histoseg_fast.pipeline.run import InferOptions
from histoseg_fast.plan import Plan

CORES = 4
NO_STEPS = InferOptions(postprocess="none")


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "available_cores", lambda: CORES)


def row(**changes: Any) -> dict[str, Any]:
    """A quiet run of ten seconds and a hundred images, at 99 % of the engine, unless told otherwise."""
    return {
        "precision": "int8",
        "device": "cpu",
        "tile": 128,
        "batch": 1,
        "images": 100,
        "wall_seconds": 10.0,
        "images_per_second": 10.0,
        "share_of_engine": 0.99,
        "stage_seconds": {"read": 1.0, "engine": 9.9, "stitch": 0.1, "write": 0.4},
        "workers": {"read": 2, "stitch": 1, "write": 2},
        "cpu_busy_share": 0.98,
        "other_processors": 0.0,
        "cold_images_per_second": 9.9,
        "spread": 0.01,
        "engine_spread": 0.01,
        "agreement_with_fp32": 0.998,
        **changes,
    }


def seconds(**changes: float) -> dict[str, float]:
    return {"read": 1.0, "engine": 7.0, "stitch": 0.1, "write": 0.4, **changes}


@pytest.mark.parametrize(
    ("changes", "limit", "words"),
    [
        ({}, "engine", "99%"),
        ({"share_of_engine": 0.7, "stage_seconds": seconds(read=19.0)}, "decode", "2 thread(s) work 95% of the time"),
        ({"share_of_engine": 0.7, "stage_seconds": seconds(write=19.0)}, "write", "the engine waits 30% of the time"),
        ({"share_of_engine": 0.7, "stage_seconds": seconds(stitch=9.5)}, "stitch", "1 thread(s)"),
        ({"share_of_engine": 0.9}, "cores", "decode 10.0 ms, stitch 1.0 ms, write 4.0 ms"),
        ({"share_of_engine": 0.9, "cpu_busy_share": 0.5}, "waiting", "the cores are 50% busy"),
        ({"share_of_engine": 0.9, "cpu_busy_share": 0.5, "other_processors": 1.9}, "cores", "keep 1.9 of them"),
        ({"share_of_engine": 0.9, "other_processors": 0.3}, "cores", "decode 10.0 ms"),
        ({"share_of_engine": 0.9, "device": "cuda:0"}, "waiting", "no stage works throughout"),
    ],
)
def test_what_limits(tiny_plan: Plan, changes: dict[str, Any], limit: str, words: str) -> None:
    measured = row(**changes)
    found = judge(measured, [measured], [], tiny_plan, NO_STEPS)
    assert found["limit"] == limit and words in found["because"] and found["advice"]


def advice(plan: Plan, measured: dict[str, Any], *others: dict[str, Any], **more: Any) -> str:
    options, grid = more.get("options", NO_STEPS), more.get("grid", [])
    return " | ".join(judge(measured, [measured, *others], grid, plan, options)["advice"])


def test_a_faster_precision_is_named_only_if_it_was_faster(tiny_plan: Plan) -> None:
    slow, quick = row(precision="fp32", images_per_second=5.0), row()
    assert "--precision int8 (ran 2.00 times as fast, 99.80% of pixels as fp32)" in advice(tiny_plan, slow, quick)
    assert "--precision" not in advice(tiny_plan, quick, slow)
    assert "--precision" not in advice(tiny_plan, row(precision="fp32"), row(images_per_second=10.1))
    assert "--device cuda:0,1" in advice(tiny_plan, row(device="cuda:0"))


def test_steps_after_the_network_are_named_where_they_cost_most(tiny_plan: Plan) -> None:
    writing = row(share_of_engine=0.5, stage_seconds=seconds(write=19.5))
    assert "--postprocess none" in advice(tiny_plan, writing, options=InferOptions(postprocess="crf"))
    assert "--postprocess" not in advice(tiny_plan, writing)
    shared = row(share_of_engine=0.9, stage_seconds=seconds(write=6.0))
    assert "--postprocess none" in advice(tiny_plan, shared, options=InferOptions(postprocess="crf"))


def test_fewer_threads_than_cores_are_named(tiny_plan: Plan) -> None:
    shared = row(share_of_engine=0.9)
    assert "--threads 4" in advice(tiny_plan, shared, options=InferOptions(postprocess="none", threads=2))
    assert "--threads" not in advice(tiny_plan, shared)


def test_short_runs_and_small_batches(tiny_plan: Plan) -> None:
    waiting = {"share_of_engine": 0.6, "cpu_busy_share": 0.5}
    short = row(**waiting, wall_seconds=0.5, images_per_second=200.0, stage_seconds=seconds(engine=0.3, read=0.1))
    assert "--images 2000" in advice(tiny_plan, short)
    assert "--batch 8" in advice(tiny_plan, row(**waiting, batch=4))


def point(tile: int, batch: int, rate: float, spread: float = 0.01) -> dict[str, Any]:
    return {"tile": tile, "batch": batch, "images_per_second": rate, "spread": spread}


@pytest.mark.parametrize(
    ("best", "named"),
    [(point(256, 2, 12.0), True), (point(256, 2, 10.2), False), (point(256, 2, 12.0, spread=0.4), False)],
)
def test_a_point_of_the_grid_is_named_if_it_is_quicker_than_its_noise(
    tiny_plan: Plan, best: dict[str, Any], named: bool
) -> None:
    grid = [point(64, 1, 8.0), point(256, 1, 10.0), best]  # 256 cuts nothing, so it stands for the row's 512
    assert ("--tile 256 --batch 2 (ran 1.20" in advice(tiny_plan, row(tile=512), grid=grid)) == named
    assert "--tile" not in advice(tiny_plan, row(batch=8), grid=grid)  # nothing of the row's batch to compare with


def test_warnings() -> None:
    assert warn([row()]) == [] == warn([row(other_processors=None)])
    assert "12% apart" in warn([row(spread=0.12)])[0] and "20% apart" in warn([row(engine_spread=0.2)])[0]
    assert "1.7 processor(s)" in warn([row(other_processors=1.7)])[0]
    assert "a run took 0.50 s" in warn([row(wall_seconds=0.5)])[0]
    assert "cold" in warn([row(cold_images_per_second=None)])[0]
    assert len(warn([row(spread=0.12, other_processors=1.7), row(spread=0.5)])) == 3
