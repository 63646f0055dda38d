"""Training steps a second with and without torch.compile, in one run, steps alternating.

python benchmarks/bench_training.py [--arch final] [--batch 4] [--crop 224] [--steps 8]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from histoseg_fast.models.network import UInt8Network, make_network
from histoseg_fast.training.options import TrainingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="final")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=224)
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    options = TrainingOptions(arch=arguments.arch, batch=arguments.batch, crop=arguments.crop)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    steps = {name: make_step(options, device, compiled) for name, compiled in (("eager", False), ("compiled", True))}
    first = {name: step() for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.steps):
        for name, step in steps.items():
            seconds[name].append(step())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{options.arch} on {device}, {options.batch} crops of {options.crop}, {options.autocast_dtype(device)}")
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.3f} to {max(seconds[name]):.3f} s a step"
        print(f"{name:>9}: {1 / median:.2f} steps/s ({spread}; the first took {first[name]:.1f} s)")
    print(f"compiled is {medians['eager'] / medians['compiled']:.2f} times as fast as eager")


def make_step(options: TrainingOptions, device: torch.device, compiled: bool):
    """A function that trains one step on random pixels and returns its seconds."""
    network = make_network(options.arch).to(device, memory_format=torch.channels_last)
    model = UInt8Network(network).to(device)
    forward = torch.compile(model) if compiled else model
    optimiser = torch.optim.Adam(network.parameters(), lr=options.lr)
    shape = (options.batch, options.crop, options.crop)
    rgb = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, device=device)
    ids = torch.randint(0, 3, shape, device=device)
    loss, dtype = options.make_loss(), options.autocast_dtype(device)

    def step() -> float:
        started = time.perf_counter()
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(rgb)
        value = loss(logits, ids)
        value.backward()
        optimiser.step()
        value.item()  # waits for the device
        return time.perf_counter() - started

    return step


if __name__ == "__main__":
    main()
