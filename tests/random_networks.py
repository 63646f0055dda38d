"""All networks with random weights, exported once for all tests that need them (an export takes seconds)."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from histoseg_fast.compiling.export import export_onnx
from histoseg_fast.compiling.halo import measure
from histoseg_fast.engines.half_network import HalfNetwork
from histoseg_fast.models.architectures import IMAGENET_MEAN, IMAGENET_STD, PAPER_ARCHITECTURES
from histoseg_fast.models.network import make_network, rebuild
from histoseg_fast.plan import MODEL, Plan, pack, unpack
from histoseg_fast.training.checkpoint import write_checkpoint

NAMES, COLOURS = ["background", "cancer", "stroma"], [[0, 0, 0], [255, 0, 0], [0, 255, 0]]


@functools.cache
def network(arch: str) -> nn.Module:
    """The network as trained, with random weights, biases and running statistics, the same every time."""
    torch.manual_seed(7)
    made = make_network(arch)
    with torch.no_grad():
        for name, tensor in made.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return made.eval()


@functools.cache
def folded(arch: str) -> nn.Module:
    """`network(arch)` as it runs: without batch norms."""
    return network(arch) if arch in PAPER_ARCHITECTURES else network(arch).fold()


@functools.cache
def exported(arch: str) -> onnx.ModelProto:
    """`folded(arch)` as ONNX."""
    return export_onnx(folded(arch))


@functools.cache
def plan_of(arch: str) -> Plan:
    """A verified plan of `network(arch)`."""
    receptive = measure(exported(arch))
    manifest = {
        **{"name": arch, "arch": arch, "precision": "auto", "precisions": {"fp32": {"agreement": 1.0}}},
        **{"stride": receptive.stride, "halo": receptive.halo, "tile": {"default": max(256, 4 * receptive.halo)}},
        "classes": [{"name": n, "colour": c} for n, c in zip(NAMES, COLOURS, strict=True)],
        **{key: {} for key in ("normalisation", "training", "scores", "made_with")},
    }
    return unpack(pack(manifest, {MODEL: exported(arch).SerializeToString(deterministic=True)}))


def checkpoint(path: Path, arch: str, /, **changes: object) -> Path:
    """A checkpoint file of `network(arch)`; `changes` go into its description."""
    description = {"arch": arch, "classes": NAMES, "colours": COLOURS, "training": {}, "scores": {}}
    description["normalisation"] = {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    write_checkpoint(path, network(arch).state_dict(), description | changes)
    return path


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """An RGB image of random pixels: the hardest for seams."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def check_overflow_is_told(arch: str, device: str, kernels: bool) -> None:
    """What grows beyond fp16 leaves no pixel with logits that all look sound, whatever a ReLU makes of NaN."""
    module = rebuild(plan_of(arch))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.mul_(30 if name.endswith("weight") else 1)
    rgb = torch.from_numpy(noise(64, 96))[None].to(device)
    with torch.inference_mode():
        logits = HalfNetwork(module, torch.device(device), kernels)(rgb)
    assert not torch.isfinite(logits).all(dim=1).any()
