"""What the tests of the layers' kernels share: cases, and checks on a GPU or, thread by thread, on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from kernels import Machine

SPECIAL = np.array([0, -0.0, 65504, 6e-8, 1, np.inf, np.nan, -np.nan], np.float16)


@dataclass(frozen=True)
class LayerCase:
    """Sides of a layer's output (for `spread` and `logits`: of its input); `seed` draws the values."""

    n: int
    h: int
    w: int
    channels: int
    seed: int

    @property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def halves(self, *shape: int, least: float = -1.0) -> np.ndarray:
        """Random values with some special ones among them."""
        random = self.random
        values = (random.uniform(least, 1, shape) * 10.0 ** random.integers(-6, 5, shape)).astype(np.float16)
        special = random.random(shape) < 0.05
        values[special] = random.choice(SPECIAL, special.sum())
        return values


@st.composite
def layer_cases(draw: st.DrawFn) -> LayerCase:
    sides = st.integers(1, 9) | st.sampled_from([31, 32, 33, 70])
    channels = draw(st.sampled_from([8, 16, 32, 64, 192]))
    return LayerCase(draw(st.integers(1, 3)), draw(sides), draw(sides), channels, draw(st.integers(0, 2**32)))


def launch(machine: Machine, name: str, shape: tuple[int, ...], dtype: type, *arguments: Any) -> np.ndarray:
    """The output of a kernel, whose bytes were poison before: arrays are put into the machine's memory."""
    blocks = [machine.put(a) if isinstance(a, np.ndarray) else a for a in arguments]
    output = machine.poisoned(shape, dtype)
    machine.kernel(name)(*(getattr(block, "address", block) for block in blocks), output.address, 0)
    return output.read()


def same_bits(mine: np.ndarray, wanted: np.ndarray) -> None:
    """Equal; any NaN is as good as another."""
    np.testing.assert_array_equal(mine, wanted)
    assert mine.dtype == wanted.dtype


def check_first(machine: Machine, case: LayerCase, side: int) -> None:
    """Against float64; the order of the sums is the kernel's own, so that a result may round to the half beside."""
    random, stride, channels = case.random, side - 2, 64 if side == 3 else 32
    scale, shift = [0.017, 0.0175, 0.0174], [-2.1, -2.0, -1.8]
    rgb = random.integers(0, 256, (case.n, case.h * stride, case.w * stride, 3), np.uint8)
    normal = (rgb.astype(np.float32) * np.float32(scale) + np.float32(shift)).astype(np.float16)
    padded = np.pad(normal.astype(np.float64), ((0, 0), (1, 1 + stride), (1, 1 + stride), (0, 0)))
    weights = np.zeros((side, 4, 8 // stride, channels), np.float16)
    weights[:, :side, :3] = random.standard_normal((side, side, 3, channels))
    bias = random.standard_normal(channels).astype(np.float32)
    sums = np.zeros((case.n, case.h, case.w, channels))
    for i in range(side**2):
        y, x = divmod(i, side)
        part = padded[:, y : y + case.h * stride : stride, x : x + case.w * stride : stride]
        sums += part @ weights[y, x, :3].astype(np.float64)
    wanted = np.maximum(sums + bias, 0)
    n, h, w, _ = rgb.shape
    mine = launch(machine, "first", wanted.shape, np.float16, rgb, n, h, w, side, scale, shift, weights, bias)
    np.testing.assert_allclose(mine, wanted, atol=1e-4, rtol=2**-10)


def check_pool(machine: Machine, case: LayerCase) -> None:
    sides = case.n, case.h, case.w, case.channels
    values = case.halves(case.n, 2 * case.h, 2 * case.w, case.channels, least=0.0)
    wanted = values.reshape(case.n, case.h, 2, case.w, 2, case.channels).max((2, 4))
    same_bits(launch(machine, "pool", wanted.shape, np.float16, values, *sides), wanted)


def check_spread(machine: Machine, case: LayerCase) -> None:
    sides = case.n, case.h, case.w, case.channels
    values = case.halves(case.n, case.h, case.w, 2, 2, case.channels)
    wanted = values.transpose(0, 1, 3, 2, 4, 5).reshape(case.n, 2 * case.h, 2 * case.w, case.channels)
    same_bits(launch(machine, "spread", wanted.shape, np.float16, values, *sides), np.maximum(wanted, np.float16(0)))


def check_join(machine: Machine, case: LayerCase) -> None:
    low = case.halves(case.n, case.h, case.w, case.channels)
    skip = case.halves(case.n, 2 * case.h, 2 * case.w, case.channels)[:, ::-1].copy()
    with np.errstate(over="ignore", invalid="ignore"):
        sums = low.repeat(2, 1).repeat(2, 2).astype(np.float32) + skip.astype(np.float32)
        wanted = np.maximum(sums.astype(np.float16), np.float16(0))
    same_bits(launch(machine, "join", skip.shape, np.float16, low, skip, *skip.shape), wanted)


def check_logits(machine: Machine, case: LayerCase, outputs: int, shuffle: int) -> None:
    """Against float64; the order of the sums is the kernel's own."""
    random, classes, most = case.random, outputs // shuffle**2, 16 if outputs > 8 else 8
    values = random.uniform(-3, 3, (case.n, case.h, case.w, 32)).astype(np.float16)
    weights = random.standard_normal((3, 3, 32, most)).astype(np.float32)
    weights[..., outputs:] = 0
    high = weights.astype(np.float16)
    split = np.concatenate([high, (weights - high).astype(np.float16)], -1)
    bias = random.standard_normal(outputs).astype(np.float32)
    padded = np.pad(values.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    sums = np.zeros((case.n, case.h, case.w, most))
    for i in range(9):
        y, x = divmod(i, 3)
        sums += padded[:, y : y + case.h, x : x + case.w] @ weights[y, x].astype(np.float64)
    sums = (sums[..., :outputs] + bias).reshape(case.n, case.h, case.w, classes, shuffle, shuffle)
    wanted = sums.transpose(0, 3, 1, 4, 2, 5).reshape(case.n, classes, case.h * shuffle, case.w * shuffle)
    sides = case.n, case.h, case.w
    mine = launch(machine, "logits", wanted.shape, np.float32, values, *sides, split, bias, outputs, shuffle)
    np.testing.assert_allclose(mine, wanted, atol=1e-3, rtol=0)


def check_layers(machine: Machine, case: LayerCase) -> None:
    """Every layer, in each of its builds."""
    check_first(machine, case, 3)
    check_first(machine, case, 4)
    check_pool(machine, case)
    check_spread(machine, case)
    check_join(machine, case)
    for outputs, shuffle in ((3, 1), (8, 2), (16, 1), (12, 2)):
        check_logits(machine, case, outputs, shuffle)


def check_broken_values(machine: Machine) -> None:
    """An infinity or NaN of the input reaches every logit that sees it, and no other."""
    for value in (np.inf, np.nan):
        values = np.zeros((1, 40, 40, 32), np.float16)
        values[0, 20, 20, 7] = value
        split = np.ones((3, 3, 32, 16), np.float16)
        arguments = values, 1, 40, 40, split, np.zeros(3, np.float32), 3, 1
        mine = launch(machine, "logits", (1, 3, 40, 40), np.float32, *arguments)
        broken = np.zeros((40, 40), bool)
        broken[19:22, 19:22] = True
        assert (np.isfinite(mine[0]) == ~broken).all()
