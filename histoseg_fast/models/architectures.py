"""The networks of the paper (figures 2 to 6) as data: no torch, so that inference can read it.

A network is VGG16's first convolutions ("features"), then a head of convolutions and 2x2 transposed
convolutions of stride 2 that returns to the input's size. Every convolution is padded "same" and every
layer is followed by a ReLU, except the last, which gives the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from histoseg_fast.errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of RGB in 0..1; what torchvision's VGG16 weights were trained with."""


@dataclass(frozen=True)
class Layer:
    """One layer: `kind` conv (odd `kernel`, same padding), up (2x2 transposed, stride 2) or pool (2x2 max)."""

    kind: Literal["conv", "up", "pool"]
    name: str
    channels: int = 0
    kernel: int = 2


def _vgg16(*blocks: tuple[int, int]) -> tuple[Layer, ...]:
    """VGG16 (Simonyan and Zisserman, 2015): (convolutions, channels) a block, a pooling between blocks."""
    layers: list[Layer] = []
    for block, (count, channels) in enumerate(blocks, start=1):
        if block > 1:
            layers.append(Layer("pool", f"pool{block - 1}"))
        layers += [Layer("conv", f"conv{block}_{i}", channels, 3) for i in range(1, count + 1)]
    return tuple(layers)


def _head(*layers: tuple[Literal["conv", "up"], int, int]) -> tuple[Layer, ...]:
    """(kind, kernel, channels) in order from the input; the number of classes is appended by `head`."""
    return tuple(Layer(kind, f"{kind}{i}", channels, kernel) for i, (kind, kernel, channels) in enumerate(layers, 1))


_TWO_BLOCKS = _vgg16((2, 64), (2, 128))
_FEATURES = {"one": _TWO_BLOCKS, "two": _TWO_BLOCKS, "three": _TWO_BLOCKS, "final": _vgg16((2, 64), (2, 128), (2, 256))}
_HEADS = {
    "one": _head(("up", 2, 128), ("conv", 11, 64), ("conv", 9, 48), ("conv", 3, 32)),
    "two": _head(("up", 2, 128), ("conv", 9, 64), ("conv", 7, 48), ("conv", 5, 32)),
    "three": _head(("up", 2, 128), *(("conv", 3, c) for c in (256, 256, 128, 128, 64, 32))),
    # Figure 6 prints the second "up" as "2x2 Conv"; the text, and the output's size, want a transposed one.
    "final": _head(
        ("conv", 3, 256), ("up", 2, 256), ("conv", 3, 256), ("up", 2, 128), ("conv", 3, 64), ("conv", 3, 32)
    ),
}

PAPER_ARCHITECTURES = tuple(_FEATURES)
"""The paper's experiments one to three and its final network."""
ARCHITECTURES = (*PAPER_ARCHITECTURES, "fast")
"""Names for `--arch`: the paper's networks, and one of our own (`models.fast`)."""


def check_architecture(arch: str) -> None:
    """Raise UsageError, naming the known ones, if `arch` is not an architecture."""
    if arch not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {arch!r}", fix="choose one of " + ", ".join(ARCHITECTURES))


def features(arch: str) -> tuple[Layer, ...]:
    """The VGG16 layers that `arch` (one of the paper's) starts with, from the input up."""
    return _FEATURES[arch]


def head(arch: str, classes: int) -> tuple[Layer, ...]:
    """The layers of `arch` (one of the paper's) above VGG16; the last has `classes` channels and no ReLU."""
    return (*_HEADS[arch], Layer("conv", "logits", classes, 3))


def stride(arch: str) -> int:
    """Pixels of input to one cell of the deepest feature map; image sides are padded to a multiple of it."""
    return 1 << sum(layer.kind == "pool" for layer in features(arch))
