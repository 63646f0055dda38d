"""The networks in fp16 for GPUs, layer by layer: with our kernels where PyTorch would go over memory more than once.

What PyTorch does one pass after the other, and each of our kernels or cuDNN's in one: the first convolution's
normalisation and padding of channels; bias and ReLU; 2x2 pooling; the transposed convolution's placement; upsampling,
addition and ReLU; the last convolution in fp32 with its casts, bias and pixel shuffle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from histoseg_fast import _core
from histoseg_fast.models.fast import FastNetwork
from histoseg_fast.models.network import UInt8Network

_FIRST = ((3, (3, 3), (1, 1), 64), (3, (4, 4), (2, 2), 32))
"""Channels, kernel, stride and outputs of the convolutions that `cuda_first` can be."""
_KERNEL_CHANNELS, _KERNEL_OUTPUTS = 32, 16
"""What `cuda_logits` takes in, and the most that it gives out."""


class Layers:
    """Layers by PyTorch alone, on any device: float16 (N, C, H, W), channels last, to the same; logits are float32."""

    def first(self, rgb: torch.Tensor, module: UInt8Network, conv: nn.Conv2d) -> torch.Tensor:
        """The first convolution and its ReLU, of uint8 (N, H, W, 3)."""
        return self.conv(module.normalise(rgb).half(), conv)

    def conv(self, x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
        """A convolution and its ReLU."""
        return F.relu(F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding))

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """The largest of each 2x2 of what a ReLU left."""
        return F.max_pool2d(x, 2)

    def up(self, x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
        """A transposed convolution, 2x2 with stride 2, and its ReLU."""
        return F.relu(F.conv_transpose2d(x, conv.weight, conv.bias, conv.stride))

    def join(self, x: torch.Tensor, conv: nn.Conv2d, skip: torch.Tensor) -> torch.Tensor:
        """The ReLU of `skip` plus a 1x1 convolution of `x` that is made twice as large."""
        x = F.conv2d(x, conv.weight, conv.bias)
        return F.relu(F.interpolate(x, scale_factor=2.0, mode="nearest") + skip)

    def logits(self, x: torch.Tensor, conv: nn.Conv2d, shuffle: int) -> torch.Tensor:
        """The last convolution, in fp32, and the pixel shuffle by `shuffle` behind it: float32, channels first."""
        x = F.conv2d(x.float(), conv.weight, conv.bias, padding=conv.padding)
        return F.pixel_shuffle(x, shuffle).contiguous()


class KernelLayers(Layers):
    """Layers by our kernels and cuDNN; on "cpu" by what the kernels compute, without a GPU, for tests."""

    def __init__(self, module: UInt8Network, device: torch.device):
        """module : the network, on `device`; the weights that a kernel wants in another order are made from it here."""
        self._cuda = device.type == "cuda"
        self._prefix = "cuda_" if self._cuda else "emulate_"
        self._scale, self._shift = module.scale.flatten().tolist(), module.shift.flatten().tolist()
        self._weights: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
        for conv in module.modules():
            if isinstance(conv, nn.ConvTranspose2d):
                self._weights[conv] = _spread_weights(conv)
            elif isinstance(conv, nn.Conv2d) and _is_first(conv):
                self._weights[conv] = _first_weights(conv)
            elif isinstance(conv, nn.Conv2d) and _is_last(module, conv) and _is_logits(conv):
                self._weights[conv] = _split_weights(conv)

    def first(self, rgb: torch.Tensor, module: UInt8Network, conv: nn.Conv2d) -> torch.Tensor:
        if conv not in self._weights:
            return super().first(rgb, module, conv)
        n, h, w, _ = rgb.shape
        stride, kernel = conv.stride[0], conv.kernel_size[0]
        x = _empty((n, h // stride, w // stride, conv.out_channels), rgb)
        self._launch("first", rgb, n, h, w, kernel, self._scale, self._shift, *self._weights[conv], x)
        return x.permute(0, 3, 1, 2)

    def conv(self, x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
        if not self._cuda:
            return super().conv(x, conv)
        fused: Callable[..., torch.Tensor] = torch.cudnn_convolution_relu
        return fused(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        pixels = _pixels(x)
        n, h, w, channels = pixels.shape
        assert h % 2 == w % 2 == 0, "tiles are multiples of the network's stride"
        pooled = _empty((n, h // 2, w // 2, channels), x)
        self._launch("pool", pixels, n, h // 2, w // 2, channels, pooled)
        return pooled.permute(0, 3, 1, 2)

    def up(self, x: torch.Tensor, conv: nn.ConvTranspose2d) -> torch.Tensor:
        blocks = F.linear(_pixels(x), *self._weights[conv])
        n, h, w, _ = blocks.shape
        spread = _empty((n, 2 * h, 2 * w, conv.out_channels), x)
        self._launch("spread", blocks, n, h, w, conv.out_channels, spread)
        return spread.permute(0, 3, 1, 2)

    def join(self, x: torch.Tensor, conv: nn.Conv2d, skip: torch.Tensor) -> torch.Tensor:
        low = F.linear(_pixels(x), conv.weight.flatten(1), conv.bias)
        pixels = _pixels(skip)
        joined = torch.empty_like(pixels)
        self._launch("join", low, pixels, *pixels.shape, joined)
        return joined.permute(0, 3, 1, 2)

    def logits(self, x: torch.Tensor, conv: nn.Conv2d, shuffle: int) -> torch.Tensor:
        if conv not in self._weights:
            return super().logits(x, conv, shuffle)
        pixels, (weights, bias) = _pixels(x), self._weights[conv]
        n, h, w, _ = pixels.shape
        classes = conv.out_channels // shuffle**2
        logits = torch.empty((n, classes, h * shuffle, w * shuffle), dtype=torch.float32, device=x.device)
        self._launch("logits", pixels, n, h, w, weights, bias, conv.out_channels, shuffle, logits)
        return logits

    def _launch(self, name: str, *arguments: Any) -> None:
        """Queue a kernel on PyTorch's current stream; tensors are handed over by their address."""
        numbers = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]
        stream = torch.cuda.current_stream().cuda_stream if self._cuda else 0
        kernel: Callable[..., None] = getattr(_core, self._prefix + name)
        kernel(*numbers, stream)


class HalfNetwork(nn.Module):
    """`module` in fp16 up to its last convolution: uint8 RGB (N, H, W, 3) to float32 logits (N, C, H, W)."""

    def __init__(self, module: UInt8Network, device: torch.device, kernels: bool):
        super().__init__()
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and not _is_last(module, conv):
                conv.half()
        self.module = module.to(device).to(memory_format=torch.channels_last)
        self.layers = KernelLayers(self.module, device) if kernels else Layers()

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        network = self.module.network
        return self._fast(network, rgb) if isinstance(network, FastNetwork) else self._paper(network, rgb)

    def _paper(self, network: Any, rgb: torch.Tensor) -> torch.Tensor:
        layers, x = self.layers, rgb
        for i, layer in enumerate([*network.features, *network.head]):
            if i == 0:
                x = layers.first(rgb, self.module, layer)
            elif layer is network.head.logits:
                x = layers.logits(x, layer, 1)
            elif isinstance(layer, nn.Conv2d):
                x = layers.conv(x, layer)
            elif isinstance(layer, nn.ConvTranspose2d):
                x = layers.up(x, layer)
            elif isinstance(layer, nn.MaxPool2d):
                x = layers.pool(x)
        return x

    def _fast(self, network: Any, rgb: torch.Tensor) -> torch.Tensor:
        layers = self.layers
        x = layers.first(rgb, self.module, network.stem[0])
        skips: list[torch.Tensor] = []
        for down, encode in zip((None, *network.down), network.encode, strict=True):
            if down is not None:
                skips.append(x)
                x = layers.conv(x, down[0])
            for layer in encode:
                x = layers.conv(x, layer[0])
        for up, decode, skip in zip(reversed(network.up), reversed(network.decode), reversed(skips), strict=True):
            x = layers.conv(layers.join(x, up[0], skip), decode[0])
        return layers.logits(x, network.logits, network.shuffle.upscale_factor)


def _is_last(module: UInt8Network, conv: nn.Module) -> bool:
    network: Any = module.network
    return conv is (network.logits if isinstance(network, FastNetwork) else network.head.logits)


def _is_logits(conv: nn.Conv2d) -> bool:
    """Whether `cuda_logits` can be this convolution."""
    small = conv.in_channels == _KERNEL_CHANNELS and conv.out_channels <= _KERNEL_OUTPUTS
    return small and (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (1, 1), (1, 1))


def _is_first(conv: nn.Conv2d) -> bool:
    """Whether `cuda_first` can be this convolution."""
    shape = conv.in_channels, conv.kernel_size, conv.stride, conv.out_channels
    return shape in _FIRST and conv.padding == (1, 1)


def _first_weights(conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """In the order of `cuda_first`, and its bias."""
    assert conv.bias is not None
    channels = 8 // conv.stride[0]
    weight = F.pad(conv.weight, (0, 4 - conv.kernel_size[1], 0, 0, 0, channels - conv.in_channels))
    return weight.permute(2, 3, 1, 0).contiguous(), conv.bias.float()


def _spread_weights(conv: nn.ConvTranspose2d) -> tuple[torch.Tensor, torch.Tensor]:
    """As a matrix (2 * 2 * out, in) whose products `cuda_spread` puts in place, and its bias."""
    assert conv.bias is not None
    return conv.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous(), conv.bias.repeat(4)


def _split_weights(conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
    """As two parts in fp16 that add up to the fp32 weights, in the order of `cuda_logits`, and its bias."""
    assert conv.bias is not None
    most = _KERNEL_OUTPUTS if conv.out_channels > _KERNEL_OUTPUTS // 2 else _KERNEL_OUTPUTS // 2
    weight = F.pad(conv.weight.permute(2, 3, 1, 0), (0, most - conv.out_channels))
    high = weight.half()
    return torch.cat([high, (weight - high.float()).half()], -1).contiguous(), conv.bias


def _pixels(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C), dense, of a tensor with its channels last."""
    return x.permute(0, 2, 3, 1).contiguous()


def _empty(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device=like.device)
