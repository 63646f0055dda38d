"""Many images in one run leave nothing behind in the process: a small benchmarks/soak.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from benchmark_scripts import benchmark
from running import FakeEngine, run_stream

IMAGES = 300
MORE_BYTES = 24 << 20
"""Of RSS from the first quarter to the last: what the allocator keeps, not what images leave; their pixels, class maps
and logits are ten times as much."""


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
def test_files_and_memory_stay_where_they_are(tiny_plan_path: Path, capsys, monkeypatch, tmp_path: Path) -> None:
    soak = benchmark("soak")
    monkeypatch.setattr(soak, "FIELDS", 4)
    report = tmp_path / "soak.json"
    arguments = ["soak.py", "--images", str(IMAGES), "--engine", str(tiny_plan_path), "--precision", "fp32"]
    monkeypatch.setattr("sys.argv", [*arguments, "--seconds", "0.01", "--json", str(report)])
    soak.main()
    assert f"{IMAGES} images of 4 sizes" in capsys.readouterr().out
    found = json.loads(report.read_text())
    first, last = found["first_quarter"], found["last_quarter"]
    assert last["files"] <= first["files"] + 1 and last["threads"] <= first["threads"]
    assert last["rss_bytes"] < first["rss_bytes"] + MORE_BYTES
    assert first["images_per_second"] > 0 < last["images_per_second"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="reads /proc")
def test_no_file_stays_open_whatever_happens_to_its_image(tmp_path: Path) -> None:
    """Done, skipped and failed in every way, in one process."""
    soak = benchmark("soak")
    folder = tmp_path / "in"
    soak.make_links(folder, 90)
    good = (folder / "000000.png").read_bytes()
    for i in range(30):
        (folder / f"cut{i}.png").write_bytes(good[: len(good) // 2])
        (folder / f"head{i}.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff")
        (folder / f"gone{i}.png").symlink_to(folder / "nowhere")
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        totals = run_stream(FakeEngine(), folder, tmp_path / "out", readers=2, writers=2)
    assert (totals.done, totals.skipped, totals.failed) == (0, 90, 90)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_figures_of_a_run_that_leaks() -> None:
    """What would be printed, if it did."""
    soak = benchmark("soak")
    samples = [soak.Sample(i / 10, 10 * i, 10**8 + 4096 * 10 * i, 20 + i // 10, 9) for i in range(1, 101)]
    found = soak.summary(samples, 1000)
    assert found["rss_bytes_per_image"] == pytest.approx(4096)
    assert found["files_per_1000_images"] == pytest.approx(10, rel=0.05)
    assert found["speed_change_over_run"] == pytest.approx(0, abs=1e-9)
    assert found["first_quarter"]["images_per_second"] == pytest.approx(100)
    slowing = [soak.Sample(s.seconds * (1 + s.seconds / 10), s.images, s.rss, s.files, 9) for s in samples]
    assert soak.summary(slowing, 1000)["speed_change_over_run"] < -0.3
    with pytest.raises(SystemExit, match="more images"):
        soak.summary(samples[:2], 1000)
