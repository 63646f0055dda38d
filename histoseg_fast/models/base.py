"""What every network of the package is, to training, compiling and engines."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import nn


class Network(nn.Module):
    """Normalised RGB (N, 3, H, W) float to logits (N, classes, H, W); H and W are multiples of `stride`."""

    arch: str
    classes: int
    stride: int
    joined: ClassVar[tuple[str, ...]] = ()
    """Names of the convolutions whose outputs are added to others before a ReLU."""

    @abstractmethod
    def fold(self) -> Network:
        """The same function, for inference, without batch norms: they become part of the layers before them."""
