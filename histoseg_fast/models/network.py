"""The networks as torch modules, and the ImageNet weights of their first layers."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from histoseg_fast.errors import EngineError, PlanError, UsageError
from histoseg_fast.models import architectures
from histoseg_fast.models.architectures import IMAGENET_MEAN, IMAGENET_STD, Layer
from histoseg_fast.models.base import Network
from histoseg_fast.models.fast import FastNetwork
from histoseg_fast.models.norms import fold_norms
from histoseg_fast.plan import MODEL, Plan
from histoseg_fast.plans import SHIPPED, open_plan


def make_network(arch: str, classes: int = 3, dropout: float = 0.0, batch_norm: bool = False) -> Network:
    """The network `arch` with random weights. Raises UsageError if there is none of that name.

    `batch_norm` trains one of the paper's networks with batch norms, which `fold` removes; `fast` always has them.
    """
    architectures.check_architecture(arch)
    return FastNetwork(classes, dropout) if arch == "fast" else PaperNetwork(arch, classes, dropout, batch_norm)


class PaperNetwork(Network):
    """A network of the paper: normalised RGB (N, 3, H, W) float to logits (N, classes, H, W).

    H and W must be multiples of `stride`. Tensor names are `features.conv1_1.weight`, `head.up2.bias`
    and so on; they are the names in checkpoints and in the plan's ONNX member. In training, `dropout` is the share
    of channels that the last convolution does not see. With `batch_norm` each layer but the last has a batch norm
    (Ioffe and Szegedy, 2015) before its ReLU: training goes further in less time, and `fold` gives the paper's network.
    """

    def __init__(self, arch: str, classes: int = 3, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        self.arch, self.classes, self.stride = arch, classes, architectures.stride(arch)
        self.features, channels = _stack(architectures.features(arch), 3, batch_norm)
        self.head, _ = _stack(architectures.head(arch, classes), channels, batch_norm, logits=True, dropout=dropout)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # fan_out of a 2x2 stride-2 transposed convolution is what one output pixel sums over.
                mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
                nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
                nn.init.constant_(module.bias, 0)  # type: ignore[arg-type] # every layer has one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(x))
        return logits

    def fold(self) -> PaperNetwork:
        folded = PaperNetwork(self.arch, self.classes).to(next(self.parameters()))
        fold_norms(self, folded)
        return folded.eval()


def _stack(
    layers: tuple[Layer, ...], channels: int, batch_norm: bool, logits: bool = False, dropout: float = 0.0
) -> tuple[nn.Sequential, int]:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, layer in enumerate(layers):
        if dropout and i == len(layers) - 1:
            modules["dropout"] = nn.Dropout2d(dropout)
        if layer.kind == "pool":
            modules[layer.name] = nn.MaxPool2d(2)
            continue
        if layer.kind == "conv":
            modules[layer.name] = nn.Conv2d(channels, layer.channels, layer.kernel, padding=layer.kernel // 2)
        else:
            modules[layer.name] = nn.ConvTranspose2d(channels, layer.channels, 2, stride=2)
        channels = layer.channels
        if not logits or i < len(layers) - 1:
            if batch_norm:
                modules[f"{layer.name}_norm"] = nn.BatchNorm2d(channels)
            modules[f"{layer.name}_relu"] = nn.ReLU(inplace=True)
    return nn.Sequential(modules), channels


class UInt8Network(nn.Module):
    """The network as engines see it: uint8 RGB (N, H, W, 3) in, normalised inside, float32 logits (N, C, H, W) out."""

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: Network):
        super().__init__()
        self.network = network
        scale = 1.0 / (255.0 * torch.tensor(IMAGENET_STD))
        shift = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
        self.register_buffer("scale", scale.view(1, 3, 1, 1))
        self.register_buffer("shift", shift.view(1, 3, 1, 1))

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self.normalise(rgb))
        return logits.float()

    def normalise(self, rgb: torch.Tensor) -> torch.Tensor:
        """What the network sees of uint8 RGB (N, H, W, 3): float32 (N, 3, H, W), of ImageNet's mean and deviation."""
        return rgb.permute(0, 3, 1, 2).float() * self.scale + self.shift


# torchvision numbers VGG16's layers in one sequence; these are the convolutions that the paper's networks use.
_TORCHVISION = {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12}
# Gatys' activation-normalised VGG files number them so, behind a 1x1 convolution (0) that takes RGB in 0..1.
_NORMALISED = {"conv1_1": 2, "conv1_2": 5, "conv2_1": 9, "conv2_2": 12, "conv3_1": 16, "conv3_2": 19}


@dataclass(frozen=True)
class Loaded:
    """Names of the `layers` that were set. `unsettled`: their batch norms were not, `settle_norms` wants `biases`."""

    layers: list[str]
    unsettled: bool = False
    biases: dict[str, torch.Tensor] = field(default_factory=dict)


def load_features(network: Network, source: str) -> Loaded:
    """Load ImageNet weights into `network.features`, or a whole network into all of it; return what was set.

    A network without VGG16's layers starts from random weights for "imagenet" too.

    `source` is "imagenet" (torchvision's VGG16 file, downloaded once and checked against the hash in its
    name), "none", or a local file: torchvision's .pth (loaded without running pickled code), .safetensors
    or .npz with torchvision's names, an .npz of activation-normalised VGG weights (0 = 1x1 preprocessing), or a
    checkpoint or plan of the same architecture (pre-training). Raises UsageError when offline, PlanError when a file
    does not hold such weights.
    """
    if source == "none" or (source == "imagenet" and not isinstance(network, PaperNetwork)):
        return Loaded([])
    tensors = _imagenet() if source == "imagenet" else _read_tensors(source)
    if (whole := _load_whole(network, tensors, source)) is not None:
        return whole
    if not isinstance(network, PaperNetwork):
        raise PlanError(f"is no checkpoint of the network {network.arch!r}", where=source)
    names = {n.removeprefix("features."): t for n, t in tensors.items()}
    normalised = "0.weight" in names and tuple(names["0.weight"].shape) == (3, 3, 1, 1)
    numbers = _NORMALISED if normalised else _TORCHVISION
    loaded = []
    state = network.features.state_dict()
    for layer, number in numbers.items():
        if f"{layer}.weight" not in state or f"{number}.weight" not in names:
            continue
        for part in ("weight", "bias"):
            tensor = names.get(f"{number}.{part}")
            if tensor is None or tensor.shape != state[f"{layer}.{part}"].shape:
                raise PlanError(f"{number}.{part} has not the shape of VGG's {layer}", where=source)
            state[f"{layer}.{part}"] = tensor.float()
        loaded.append(layer)
    if not loaded:
        raise PlanError("holds no VGG convolutions", where=source, fix="give torchvision's vgg16 file")
    if normalised:
        bias = names.get("0.bias")
        if "conv1_1" not in loaded or bias is None or bias.shape != (3,):
            raise PlanError("holds 1x1 preprocessing (0) without its bias or without conv1_1 (2)", where=source)
        _fold_preprocessing(state, names)
    network.features.load_state_dict(state)
    return Loaded([f"features.{layer}" for layer in loaded], unsettled=True)


def _load_whole(network: Network, tensors: Mapping[str, torch.Tensor], source: str) -> Loaded | None:
    """Load `tensors` if their names are those of `network`, or of its folded form; None if they are not."""
    state = network.state_dict()
    folded = network.fold().state_dict().keys()
    if tensors.keys() not in (state.keys(), folded):
        if any(name.endswith("_norm.running_var") for name in tensors):
            raise PlanError("was trained with batch norms, or another network was", where=source, fix="--batch-norm")
        return None
    known = {name: tensor for name, tensor in tensors.items() if name in state}
    try:
        network.load_state_dict(known, strict=False)
    except RuntimeError as error:
        raise PlanError("is a checkpoint of another architecture", where=source) from error
    layers = sorted({name.rpartition(".")[0] for name in known})
    # `fast` has no bias before a norm; what its folded form holds there becomes part of the norm's shift.
    biases = {name.removesuffix(".bias"): tensor for name, tensor in tensors.items() if name not in known}
    return Loaded(layers, unsettled=tensors.keys() != state.keys(), biases=biases)


def is_plan(source: str) -> bool:
    """Whether `source` names a plan: a shipped one, or a file with that suffix."""
    return source in SHIPPED or source.endswith(".plan")


def rebuild(plan: Plan) -> UInt8Network:
    """The plan's network with its weights, fp32, on the CPU. Raises EngineError, PlanError if they do not fit."""
    arch = plan.manifest["arch"]
    if arch not in architectures.ARCHITECTURES:
        raise EngineError(f"PyTorch cannot rebuild a network {arch!r}", where=plan.path, fix="use --device cpu")
    network = UInt8Network(make_network(arch, len(plan.palette.names)).fold())
    try:
        found = onnx.load_from_string(plan.members[MODEL]).graph.initializer
        tensors = {tensor.name: tensor for tensor in found}
        state = {
            name: torch.from_numpy(numpy_helper.to_array(tensors[name.removeprefix("network.")]).astype(np.float32))
            for name in network.state_dict()
        }
        network.load_state_dict(state)
    except Exception as error:  # whatever a damaged model makes two readers raise
        reason = " ".join(str(error).split())[:200]
        raise PlanError(
            f"{MODEL} does not hold the tensors of a network {arch!r} ({reason})", where=plan.path
        ) from error
    return network.eval().requires_grad_(False)


def _fold_preprocessing(state: dict[str, torch.Tensor], names: Mapping[str, torch.Tensor]) -> None:
    """Fold x01 -> A x01 + b and our own normalisation (x01 = std * n + mean) into conv1_1."""
    matrix = names["0.weight"].double().squeeze(-1).squeeze(-1)
    bias = names["0.bias"].double()
    weight = state["conv1_1.weight"].double()
    shift = matrix @ torch.tensor(IMAGENET_MEAN, dtype=torch.float64) + bias
    state["conv1_1.bias"] = (state["conv1_1.bias"].double() + torch.einsum("oikl,i->o", weight, shift)).float()
    matrix = matrix * torch.tensor(IMAGENET_STD, dtype=torch.float64)
    state["conv1_1.weight"] = torch.einsum("oikl,ij->ojkl", weight, matrix).float()


def _imagenet() -> Mapping[str, torch.Tensor]:
    from torchvision.models import VGG16_Weights

    try:
        weights = VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True, weights_only=True)
        return dict(weights)
    except (OSError, HTTPException) as error:  # no network, a server's error, no room in the cache folder
        raise UsageError(
            f"VGG16's ImageNet weights could not be downloaded ({error})",
            fix="give a local copy with --weights FILE (torchvision's vgg16-397923af.pth), or --weights none",
        ) from error
    except RuntimeError as error:
        raise PlanError(f"the downloaded VGG16 file is damaged ({error})", fix="run again to download anew") from error


def _read_tensors(source: str) -> Mapping[str, torch.Tensor]:
    if is_plan(source):
        return rebuild(open_plan(source)).network.state_dict()
    path = Path(source)
    tensors = _read_file(path)
    if not isinstance(tensors, Mapping):
        raise PlanError("holds no named tensors", where=path, fix="give torchvision's vgg16 file")
    return {name: t for name, t in tensors.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}


def _read_file(path: Path) -> object:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(archive[name]) for name in archive.files}
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError("no such file", where=path, fix="--weights takes imagenet, none or a file") from None
    except pickle.UnpicklingError as error:  # its own text advises to run what the file holds
        raise PlanError("is not a file of plain tensors; code in a weights file is never run", where=path) from error
    except Exception as error:  # whatever a damaged or hostile file makes three readers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise PlanError(f"cannot be read as weights ({reason})", where=path) from error
