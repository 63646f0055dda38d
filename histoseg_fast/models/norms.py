"""Batch norms: folded into the layers before them for inference, and put behind trained layers for more training."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

Convolution = nn.Conv2d | nn.ConvTranspose2d


def norm_pairs(network: nn.Module) -> Iterator[tuple[str, Convolution, nn.BatchNorm2d]]:
    """Each convolution of `network` that a batch norm follows, with its name and that norm."""
    name, convolution = "", None
    for found, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert convolution is not None
            yield name, convolution, module
        name, convolution = found, module if isinstance(module, Convolution) else None


def fold_norms(trained: nn.Module, folded: nn.Module) -> None:
    """Give `folded`, the same network without batch norms, what `trained` computes in evaluation.

    Layers go by their names; a batch norm's running statistics go into weight and bias of the layer before it.
    """
    state = {name: tensor for name, tensor in trained.state_dict().items() if name in folded.state_dict()}
    with torch.no_grad():
        for name, layer, norm in norm_pairs(trained):
            assert norm.running_mean is not None and norm.running_var is not None
            transposed = isinstance(layer, nn.ConvTranspose2d)
            state[f"{name}.weight"], state[f"{name}.bias"] = fuse_conv_bn_weights(
                layer.weight,
                layer.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
                transposed,
            )
    folded.load_state_dict(state)


def freeze_norms(network: nn.Module) -> None:
    """Batch norms use and keep their running statistics, until `network.train()` is called again."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def take_statistics(network: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give batch norms the running statistics in `state`, a state dict of the same network."""
    network.load_state_dict({name: state[name] for name, _ in network.named_buffers()}, strict=False)


def settle_norms(network: nn.Module, layers: Collection[str], biases: dict[str, torch.Tensor], x: torch.Tensor) -> None:
    """Set the norms behind `layers` so that on `x` they pass on what comes, plus `biases[layer]` where there is one.

    So layers that were trained without norms go on from where they were. `x` is normalised RGB (N, 3, H, W) float;
    mean and variance of what it makes become each norm's shift, scale and running statistics.
    """
    hooks = []
    for name, _, norm in norm_pairs(network):
        if name not in layers:
            continue

        def settle(norm: nn.BatchNorm2d, given: tuple[torch.Tensor, ...], name: str = name) -> None:
            variance, mean = torch.var_mean(given[0].float(), (0, 2, 3))
            state = {"weight": (variance + norm.eps).sqrt(), "bias": mean + biases.get(name, 0.0)}
            norm.load_state_dict({**state, "running_mean": mean, "running_var": variance}, strict=False)

        hooks.append(norm.register_forward_pre_hook(settle))
    with torch.no_grad():
        network.eval()(x)
    for hook in hooks:
        hook.remove()
