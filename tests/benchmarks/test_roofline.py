"""The roofline's arithmetic: by hand on a small network, and against PyTorch's own count on the shipped ones."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from benchmark_scripts import ROOT, benchmark
from torch import nn

from histoseg_fast.models.network import rebuild
from histoseg_fast.plans import open_plan

roofline = benchmark("roofline")
Card, Pass = roofline.Card, roofline.Pass


def test_a_small_network_by_hand(tiny_plan):
    """conv 3x3 3 -> 8, pool, conv 5x5 8 -> 8, up 2x2 8 -> 8, conv 3x3 8 -> 3, on one image of 30x20 (stride 2)."""
    made = roofline.network_passes(tiny_plan, 20, 30)
    pixels, few = 600, 150
    found = [(p.name, p.macs, p.precision, sum(p.reads.values()), sum(p.writes.values()), p.weights) for p in made]
    assert found == [
        ("Cast + Transpose + Mul + Add + Cast", 0, "", 3 * pixels, 2 * 3 * pixels, 2 * 4),
        ("a", 9 * 3 * 8 * pixels, "fp16", 2 * 3 * pixels, 2 * 8 * pixels, 2 * 9 * 3 * 8),
        ("MaxPool", 0, "", 2 * 8 * pixels, 2 * 8 * few, 0),
        ("b", 25 * 64 * few, "fp16", 2 * 8 * few, 2 * 8 * few, 2 * 25 * 64),
        ("up", 4 * 64 * few, "fp16", 2 * 8 * few, 4 * 8 * pixels, 2 * 4 * 64),  # with the cast to fp32 behind it
        ("logits", 9 * 8 * 3 * pixels, "fp32", 4 * 8 * pixels, 4 * 3 * pixels, 4 * (9 * 8 * 3 + 3)),
        ("stitch", 0, "", 4 * 3 * pixels, pixels, 0),
    ]


def test_batches_share_their_weights_and_sides_are_padded(tiny_plan):
    one, four = (roofline.network_passes(tiny_plan, 19, 29, batch) for batch in (1, 4))
    for single, batch in zip(one, four, strict=True):
        assert (batch.macs, batch.weights) == (4 * single.macs, single.weights)
        assert sum(batch.reads.values()) == 4 * sum(single.reads.values())
    assert one == roofline.network_passes(tiny_plan, 20, 30)


@pytest.mark.parametrize("name", ["final", "fast"])
def test_operations_are_what_pytorch_counts(name):
    total = 0

    def count(module, inputs, output):
        nonlocal total
        places = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
        total += module.weight.numel() * places.shape[-1] * places.shape[-2]

    plan = open_plan(name)
    network = rebuild(plan).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    network(torch.empty(1, 736, 1152, 3, dtype=torch.uint8, device="meta"))
    assert sum(one.macs for one in roofline.network_passes(plan, 736, 1152)) == total


@pytest.mark.parametrize("name", ["final", "fast"])
def test_every_tensor_is_written_before_it_is_read(name):
    plan = open_plan(name)
    fused, unfused = (roofline.network_passes(plan, 720, 1128, fused=joined) for joined in (True, False))
    for passes in (fused, unfused):
        there = {"rgb": passes[0].reads["rgb"]}
        for one in passes:
            assert one.reads.items() <= there.items() and not there.keys() & one.writes.keys()
            there |= one.writes
        assert all(name == "rgb" or any(name in one.reads for one in passes) for name in there if name != "classes")
    for total in ("macs", "weights"):
        assert sum(getattr(one, total) for one in fused) == sum(getattr(one, total) for one in unfused)
    assert sum(one.bytes for one in fused) < sum(one.bytes for one in unfused)
    assert sum(one.precision == "fp16" for one in fused) == {"final": 12, "fast": 22}[name]


CARD = Card(flops=1000.0, bandwidth=10.0)
CHAIN = [
    Pass("a", 2500, "fp16", {"x": 10}, {"y": 40}),  # 5 s of compute, 5 s of memory
    Pass("b", 1000, "fp32", {"y": 40}, {"z": 10}, weights=10),  # 4 s at half the rate, 6 s of memory
    Pass("pool", 0, "", {"z": 10}, {"w": 10}),  # 2 s of memory
]


def test_seconds_are_the_larger_of_the_two():
    assert [one.compute_seconds(CARD) for one in CHAIN] == [5.0, 4.0, 0.0]
    assert [one.memory_seconds(CARD) for one in CHAIN] == [5.0, 6.0, 2.0]
    assert [one.intensity for one in CHAIN] == [100.0, pytest.approx(2000 / 60), 0.0]
    found = roofline.measure(CHAIN, 2, CARD)
    assert found["predicted_seconds"] == 13.0 and found["predicted_images_a_second"] == 2 / 13
    assert [row["bound"] for row in found["passes"]] == ["memory", "memory", "memory"]
    assert found["memory_bound_share"] == 1.0 and (found["compute_seconds"], found["memory_seconds"]) == (9.0, 13.0)
    slow = roofline.measure(CHAIN, 2, Card(flops=500.0, bandwidth=10.0))
    assert [row["bound"] for row in slow["passes"]] == ["compute", "compute", "memory"]
    assert slow["predicted_seconds"] == 10 + 8 + 2 and slow["memory_bound_share"] == 0.1


def test_what_joining_passes_saves():
    assert roofline.joined_seconds(CHAIN, 0, CARD) == 0.0
    assert roofline.joined_seconds(CHAIN, 1, CARD) == 5 + 6 - 9  # 30 bytes are left of 110: now compute counts
    assert roofline.joined_seconds(CHAIN, 2, CARD) == 6 + 2 - 6  # 60 bytes, 4 s of compute
    skip = [*CHAIN, Pass("c", 0, "", {"w": 10, "y": 40}, {"v": 10})]
    assert roofline.joined_seconds(skip, 1, CARD) == 5 + 6 - 9  # y is written still: 7 s of memory
    assert roofline.joined_seconds([CHAIN[0], CHAIN[2]], 1, CARD) == 0.0  # it takes nothing from there


def test_the_command(tiny_plan_path, tmp_path, monkeypatch, capsys):
    target = tmp_path / "roofline.json"
    options = ["--height", "20", "--width", "30", "--batch", "2", "--tflops", "1", "--terabytes", "0.5"]
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--engine", str(tiny_plan_path), *options, "--json", str(target)])
    roofline.main()
    found = json.loads(target.read_text())
    assert (found["batch"], found["flops_a_second"], found["bytes_a_second"]) == (2, 1e12, 5e11)
    lines = capsys.readouterr().out.splitlines()
    assert "predicted, not measured" in lines[0] and len(lines) == 2 + len(found["passes"]) + 2


@pytest.mark.parametrize("name", ["final", "fast"])
def test_the_page_says_what_the_script_says(name):
    """docs/roofline.md, its first table: batches of 4 on the script's own card."""
    found = roofline.measure(roofline.network_passes(open_plan(name), 720, 1128, 4), 4, Card(790e12, 4.8e12))
    text = (ROOT / "docs" / "roofline.md").read_text(encoding="utf-8")
    images = round(found["predicted_images_a_second"], -2 if name == "fast" else 0)
    micro = 1e6 / 4
    for words in (
        f"**{micro * found['predicted_seconds']:.0f} us, {images:,.0f} images/s**",
        f"TFLOP: {micro * found['compute_seconds']:.0f} us",
        f"{found['bytes'] / 4e6:.0f} MB: {micro * found['memory_seconds']:.0f} us",
        f" {found['memory_bound_share']:.0%} |".replace("%", " %"),
    ):
        assert words in text
