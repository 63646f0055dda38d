"""benchmarks/bench_gpu.py on fake GPUs: that every step of it runs, and what its shares are shares of."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from benchmark_scripts import benchmark

from histoseg_fast.engines.gpu import GpuEngine
from histoseg_fast.synthetic import make_field

benchmark("roofline")
bench = benchmark("bench_gpu")


@pytest.fixture
def small(gpus, monkeypatch):
    """A fake GPU, small fields, few runs."""
    cuda = gpus.start()
    field = make_field(0)[0][:30, :40]
    for name, value in {
        "make_field": lambda seed: (np.roll(field, seed, 0), None),
        "matrix_rate": lambda device: 1e12,
        "copy_rate": lambda device: 1e9,
        "STITCH_TILES": 3,
        "REPEATS": 2,
    }.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench.stitch_rate, "__defaults__", (3,))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Fake")
    return cuda


def test_every_step_runs(small, tiny_plan, tiny_plan_path, tmp_path, monkeypatch, capsys):
    target = tmp_path / "bench.json"
    options = ["--engine", str(tiny_plan_path), "--images", "9", "--batches", "1", "4", "--json", str(target)]
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *options])
    bench.main()
    small.check_nothing_left()
    found = json.loads(target.read_text())
    assert found["run"]["images_done"] == 9 and found["run"]["postprocess"]["crf"] is None
    assert found["run"]["arguments"]["postprocess"] == "none"
    assert found["operations"] == 2 * (9 * 3 * 8 * 1200 + (25 + 4) * 64 * 300 + 9 * 8 * 3 * 1200)
    assert found["limit_seconds"] == found["operations"] / 1e12 < found["roofline_seconds"]
    alone = min(row["network_seconds"] for row in found["batches"].values())
    assert found["shares"]["network"] == pytest.approx(found["limit_seconds"] / alone)
    assert found["shares"]["stitch"] == pytest.approx(found["stitch_rate"] / 1e9)
    used = found["batches"][str(found["run"]["batch"])]["network_seconds"]
    assert found["shares"]["busy"] == pytest.approx(used / found["stream_seconds"])
    assert 0 < found["stream_seconds"] < found["whole_seconds"]
    text = capsys.readouterr().out
    assert "NVIDIA Fake; tiny, TensorRT 11.4.0.106 on NVIDIA H200, fp16" in text and "; 55% wanted)" in text


def test_the_window_is_from_the_first_batch_in_to_the_last_out(monkeypatch):
    class Engine:
        def submit(self, slot):
            clock.append(None)

        wait = submit

    clock: list[None] = []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: 10.0 + len(clock))
    window, engine = bench.Window(), Engine()
    window.watch(engine, 0, None)
    for call in (engine.submit, engine.submit, engine.wait, engine.wait):
        call(None)
    assert window.seconds == 4.0


def test_the_stitch_kernel_runs_on_the_logits_it_was_given(small, gpus, tiny_plan, monkeypatch):
    whole, seen = GpuEngine._stitch, []

    def stitch(engine, slot, tiles, logits):
        seen.append((tiles, logits.size, slot.cores.tolist()))
        whole(engine, slot, tiles, logits)

    monkeypatch.setattr(GpuEngine, "_stitch", stitch)
    with gpus.open(tiny_plan) as engine:
        assert bench.stitch_rate(engine, 6, 8, 2) > 0
    assert set(map(repr, seen)) == {repr((2, 2 * 3 * 6 * 8 * 4, [[0, 0, 6, 8]] * 2))}
    small.check_nothing_left()
