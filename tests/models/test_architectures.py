"""The networks as data, layer by layer against the paper's figures."""

from __future__ import annotations

import subprocess
import sys

import pytest

from histoseg_fast.errors import UsageError
from histoseg_fast.models.architectures import (
    ARCHITECTURES,
    PAPER_ARCHITECTURES,
    check_architecture,
    features,
    head,
    stride,
)

TWO_BLOCKS = "conv3x3 64, conv3x3 64, pool, conv3x3 128, conv3x3 128"
LAYERS = {
    "one": f"{TWO_BLOCKS} | up 128, conv11x11 64, conv9x9 48, conv3x3 32, conv3x3 3",
    "two": f"{TWO_BLOCKS} | up 128, conv9x9 64, conv7x7 48, conv5x5 32, conv3x3 3",
    "three": f"{TWO_BLOCKS} | up 128, conv3x3 256, conv3x3 256, conv3x3 128, conv3x3 128, conv3x3 64, conv3x3 32, "
    "conv3x3 3",
    "final": f"{TWO_BLOCKS}, pool, conv3x3 256, conv3x3 256 | conv3x3 256, up 256, conv3x3 256, up 128, conv3x3 64, "
    "conv3x3 32, conv3x3 3",
}


def text(layers):
    shown = {"conv": "conv{0.kernel}x{0.kernel} {0.channels}", "up": "up {0.channels}", "pool": "pool"}
    return ", ".join(shown[layer.kind].format(layer) for layer in layers)


def cost(arch, height, width):
    """Multiply-accumulates, counted from the layers."""
    channels, total = 3, 0
    for layer in (*features(arch), *head(arch, 3)):
        if layer.kind == "pool":
            height, width = height // 2, width // 2
            continue
        if layer.kind == "up":
            height, width = height * 2, width * 2
        taps = layer.kernel**2 if layer.kind == "conv" else 1  # a 2x2 stride-2 output pixel sums over one input pixel
        total += height * width * taps * channels * layer.channels
        channels = layer.channels
    assert channels == 3
    return total


def test_the_four_networks():
    assert set(PAPER_ARCHITECTURES) == set(LAYERS) and set(ARCHITECTURES) == {*LAYERS, "fast"}


@pytest.mark.parametrize("arch", LAYERS)
def test_layers(arch):
    assert f"{text(features(arch))} | {text(head(arch, 3))}" == LAYERS[arch]
    layers = (*features(arch), *head(arch, 3))
    assert len({layer.name for layer in layers}) == len(layers)
    assert stride(arch) == (4 if arch == "final" else 2)
    assert sum(layer.kind == "up" for layer in layers) == sum(layer.kind == "pool" for layer in layers)


def test_the_last_layer_has_the_classes():
    assert [head(arch, 7)[-1].channels for arch in PAPER_ARCHITECTURES] == [7] * 4


def test_cost_of_the_final_network():
    assert round(cost("final", 720, 1128) / 1e9) == 386


def test_unknown_architecture():
    with pytest.raises(UsageError, match="'five'; choose one of one, two, three, final, fast"):
        check_architecture("five")


def test_no_torch_needed():
    code = "import sys, histoseg_fast.models.architectures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
