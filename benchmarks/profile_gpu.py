"""Where the PyTorch engine's fp16 network spends its time: microseconds an image of each kernel, by torch.profiler.

    python benchmarks/profile_gpu.py [--engine final] [--batch 4] [--device cuda]

On made-up fields of 1128x720, without CUDA graphs, whose kernels the profiler sees as one. On "cpu" the operators of
the same layers by PyTorch alone, which shows that the script runs and nothing about a GPU.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from histoseg_fast.engines.half_network import HalfNetwork
from histoseg_fast.models.network import rebuild
from histoseg_fast.plan import Plan
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field
from histoseg_fast.tiling import pad_to_stride

RUNS = 3


def kernel_times(plan: Plan, field: np.ndarray, batch: int, device: str) -> list[tuple[str, float, float]]:
    """(kernel, microseconds an image, calls a run), the longest first, on uint8 (h, w, 3) repeated `batch` times."""
    on_gpu = device.startswith("cuda")
    network = HalfNetwork(rebuild(plan), torch.device(device), kernels=on_gpu)
    rgb = torch.from_numpy(pad_to_stride(field, plan.stride)).repeat(batch, 1, 1, 1).to(device)
    wait = torch.cuda.synchronize if on_gpu else torch.cpu.synchronize
    settings = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True)
    with torch.inference_mode(), settings:
        network(rgb)
        wait()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
            for _ in range(RUNS):
                network(rgb)
            wait()
    rows = []
    for event in found.key_averages():
        total = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if total > 0:
            rows.append((event.key, total / RUNS / batch, event.count / RUNS))
    return sorted(rows, key=lambda row: -row[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="final")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    rows = kernel_times(open_plan(arguments.engine), make_field(0)[0], arguments.batch, arguments.device)
    for name, microseconds, calls in [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]:
        print(f"{microseconds:>10.1f} us {calls:>5.0f} x  {name[:100]}")


if __name__ == "__main__":
    main()
