"""A network of our own: a U-Net at half resolution that sees far more than the paper's, at an eighteenth of the cost.

An encoder and a decoder after Ronneberger et al. (U-Net, 2015), joined by addition as in LinkNet (Chaurasia and
Culurciello, 2017): additions fuse into the convolution before them, concatenations do not. Only 3x3 and 1x1
convolutions of 16n channels, strided ones, nearest upsampling and a pixel shuffle: all of them run in int8 and fp16.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from histoseg_fast.models.base import Network
from histoseg_fast.models.norms import fold_norms

WIDTHS = (32, 64, 128, 192, 256)
"""Channels at strides 2, 4, 8, 16 and 32."""
ENCODER_CONVOLUTIONS = (1, 2, 2, 2, 2)
"""3x3 convolutions of the encoder by level; the decoder has one a level. docs/networks.md says what decided it."""
STRIDE = 2 ** len(WIDTHS)


class FastNetwork(Network):
    """The network `fast`: normalised RGB (N, 3, H, W) float to logits (N, classes, H, W).

    H and W must be multiples of `stride`. `dropout` is the share of the deepest channels not seen in training.
    `folded` leaves the batch norms out: their work is in the weights and biases of the convolutions (`fold`).
    """

    joined = tuple(f"up.{level}.0" for level in range(len(WIDTHS) - 1))

    def __init__(self, classes: int = 3, dropout: float = 0.0, folded: bool = False):
        super().__init__()
        self.arch, self.classes, self.stride, self.folded = "fast", classes, STRIDE, folded
        layer = partial(_layer, folded=folded)
        self.stem = layer(3, WIDTHS[0], 4, stride=2)
        self.down = nn.ModuleList(layer(wide, deep, 2, stride=2) for wide, deep in pairwise(WIDTHS))
        self.encode = nn.ModuleList(
            nn.Sequential(*(layer(width, width, 3) for _ in range(count)))
            for width, count in zip(WIDTHS, ENCODER_CONVOLUTIONS, strict=True)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(layer(deep, wide, 1, relu=False) for wide, deep in pairwise(WIDTHS))
        self.decode = nn.ModuleList(layer(width, width, 3) for width in WIDTHS[:-1])
        self.logits = nn.Conv2d(WIDTHS[0], 4 * classes, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.encode[0](self.stem(x))
        skips = []
        for down, encode in zip(self.down, self.encode[1:], strict=True):
            skips.append(x)
            x = encode(down(x))
        x = self.dropout(x)
        for up, decode, skip in zip(reversed(self.up), reversed(self.decode), reversed(skips), strict=True):
            x = decode(F.relu(F.interpolate(up(x), scale_factor=2.0, mode="nearest") + skip))
        logits: torch.Tensor = self.shuffle(self.logits(x))
        return logits

    def fold(self) -> FastNetwork:
        folded = FastNetwork(self.classes, folded=True).to(self.logits.weight)
        fold_norms(self, folded)
        return folded.eval()


def _layer(
    channels: int, out: int, kernel: int, stride: int = 1, relu: bool = True, folded: bool = False
) -> nn.Sequential:
    """Convolution and batch norm, then a ReLU; the output has the input's size over the stride."""
    layers: list[nn.Module] = [nn.Conv2d(channels, out, kernel, stride, (kernel - stride + 1) // 2, bias=folded)]
    if not folded:
        layers.append(nn.BatchNorm2d(out))
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)
