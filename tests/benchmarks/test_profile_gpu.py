"""benchmarks/profile_gpu.py on the CPU: that it runs, and that its sum is that of its lines."""

from __future__ import annotations

import sys

import pytest
from benchmark_scripts import benchmark

from histoseg_fast.synthetic import make_field

profile_gpu = benchmark("profile_gpu")


@pytest.mark.parametrize("engine", ["fast"])
def test_every_convolution_of_the_network_is_in_the_table(engine, monkeypatch, capsys):
    field = make_field(0)[0][:64, :96]
    monkeypatch.setattr(profile_gpu, "make_field", lambda seed: (field, None))
    monkeypatch.setattr(sys, "argv", ["profile_gpu.py", "--engine", engine, "--batch", "2", "--device", "cpu"])
    profile_gpu.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    times, names = [float(row[0]) for row in rows], [row[-1] for row in rows]
    assert names[-1] == "all" and times[:-1] == sorted(times[:-1], reverse=True)
    assert times[-1] == pytest.approx(sum(times[:-1]), abs=0.1 * len(times))
    (convolutions,) = [int(row[2]) for row in rows if row[-1] == "aten::convolution"]
    assert convolutions == 23
