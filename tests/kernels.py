"""What the tests of the CUDA kernels share: cases, and checks that run on a GPU or, thread by thread, on the host.

Memory is handed to kernels by address, inside poisoned bytes on both sides: a byte that a kernel should not have
written shows up wherever it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.tiling import reflect_indices

POISON = 0xA5
MARGIN = 64


class Block:
    """An array in a machine's memory, `offset` bytes past a multiple of 64, poison around it."""

    def __init__(self, machine: Machine, array: np.ndarray, offset: int = 0) -> None:
        self.machine, self.shape, self.dtype = machine, array.shape, array.dtype
        self.start, self.end = MARGIN + offset, MARGIN + offset + array.nbytes
        content = np.full(self.end + MARGIN, POISON, np.uint8)
        content[self.start : self.end] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.holder, base = machine.upload(content)
        self.address = base + self.start

    def read(self) -> np.ndarray:
        """What the array holds now; the poison around it must be untouched."""
        content = self.machine.download(self.holder)
        assert (content[: self.start] == POISON).all()
        assert (content[self.end :] == POISON).all()
        return content[self.start : self.end].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Machine:
    """Where kernels run: those of `_core` whose names begin with `prefix`. `upload` copies bytes and gives their holder
    and an address that 64 divides.
    """

    prefix: str
    upload: Callable[[np.ndarray], tuple[Any, int]]
    download: Callable[[Any], np.ndarray]

    def kernel(self, name: str) -> Callable[..., None]:
        """One of the kernels: "stitch", "pool" and so on."""
        kernel: Callable[..., None] = getattr(_core, self.prefix + name)
        return kernel

    def put(self, array: np.ndarray, offset: int = 0) -> Block:
        return Block(self, array, offset)

    def poisoned(self, shape: tuple[int, ...], dtype: type = np.uint8, offset: int = 0) -> Block:
        array = np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, POISON, np.uint8)
        return Block(self, array.view(dtype).reshape(shape), offset)


def upload_to_host(content: np.ndarray) -> tuple[np.ndarray, int]:
    memory = np.empty(content.size + MARGIN, np.uint8)
    memory = memory[-memory.ctypes.data % MARGIN :][: content.size]
    memory[:] = content
    return memory, memory.ctypes.data


HOST = Machine("emulate_", upload_to_host, np.copy)


@dataclass(frozen=True)
class StitchCase:
    """Logits (n, C, h, w), float32 or float16; cores (n, 4); `skew` is the logits' offset in memory in values."""

    logits: np.ndarray
    cores: np.ndarray
    layout: str = "nchw"
    skew: int = 0
    probabilities: bool = True
    band: bool = False


def random_logits(random: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        return (random.uniform(-1, 1, shape) * scale).astype(np.float32).astype(dtype)


def random_cores(random: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    rows = np.sort(random.integers(0, height + 1, (count, 2)), 1)
    columns = np.sort(random.integers(0, width + 1, (count, 2)), 1)
    return np.stack([rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], 1).astype(np.int32)


@st.composite
def stitch_cases(draw: st.DrawFn) -> StitchCase:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    classes = draw(st.sampled_from([1, 2, 3, 3, 4, 5, 32]))
    height = draw(st.integers(1, 9) | st.sampled_from([64, 130]))
    width = draw(st.integers(1, 40) | st.sampled_from([64, 96, 148, 255]))
    shape = (draw(st.integers(1, 3)), classes, height, width)
    dtype = draw(st.sampled_from(["float32", "float16"]))
    logits = random_logits(random, shape, dtype, draw(st.sampled_from([0, 1e-3, 1, 30, 1e4, 3e38])))
    if draw(st.booleans()):
        logits = np.round(logits)  # ties
    if draw(st.booleans()):
        for value in (np.nan, np.inf, -np.inf):
            logits[random.random(shape) < 0.02] = value
    cores = random_cores(random, shape[0], height, width)
    if draw(st.booleans()):
        cores[0] = 0, 0, height, width
    return StitchCase(
        logits,
        cores,
        draw(st.sampled_from(["nchw", "nhwc"])),
        draw(st.sampled_from([0, 0, 0, 1, 4])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def stitch_on(machine: Machine, case: StitchCase, stream: int = 0) -> tuple[np.ndarray, ...]:
    """ids (or the band of pasted cores), counts, confidence, broken, probabilities of one launch."""
    n, classes, h, w = case.logits.shape
    array = case.logits if case.layout == "nchw" else case.logits.transpose(0, 2, 3, 1)
    logits = machine.put(array, case.skew * case.logits.itemsize)
    cores = machine.put(case.cores)
    ids = machine.poisoned(band_shape(case) if case.band else (n, h, w))
    counts, confidence = (machine.poisoned((n, classes), np.uint64) for _ in range(2))
    broken = machine.poisoned((n,), np.uint64)
    planes = machine.poisoned(case.logits.shape)
    corners = [[ids.address + row * ids.shape[1] + column, ids.shape[1]] for row, column in band_corners(case)]
    targets = machine.put(np.array(corners, np.int64))
    machine.kernel("stitch")(
        logits_ptr=logits.address,
        dtype="fp16" if case.logits.dtype == np.float16 else "fp32",
        layout=case.layout,
        n=n,
        classes=classes,
        h=h,
        w=w,
        cores_ptr=cores.address,
        ids_ptr=0 if case.band else ids.address,
        counts_ptr=counts.address,
        confidence_ptr=confidence.address,
        broken_ptr=broken.address,
        probabilities_ptr=planes.address if case.probabilities else 0,
        stream=stream,
        targets_ptr=targets.address if case.band else 0,
    )
    return tuple(block.read() for block in (ids, counts, confidence, broken, planes))


def band_shape(case: StitchCase) -> tuple[int, int]:
    return len(case.logits) * case.logits.shape[2], case.logits.shape[3] + 5


def band_corners(case: StitchCase) -> list[tuple[int, int]]:
    """Where each core is pasted in the band: one below the other, at different columns."""
    return [(i * case.logits.shape[2], i % 6) for i in range(len(case.logits))]


def stitch_on_cpu(case: StitchCase) -> tuple[np.ndarray, ...]:
    """The same by the C++ stitcher."""
    n, classes, h, w = case.logits.shape
    ids = np.full(band_shape(case) if case.band else (n, h, w), POISON, np.uint8)
    counts, confidence = np.zeros((n, classes), np.uint64), np.zeros((n, classes), np.uint64)
    broken, planes = np.zeros(n, np.uint64), np.full(case.logits.shape, POISON, np.uint8)
    for i, (top, left, bottom, right) in enumerate(case.cores.tolist()):
        row, column = band_corners(case)[i]
        pasted = ids[row:, column:][: bottom - top, : right - left] if case.band else ids[i, top:bottom, left:right]
        probabilities = planes[i, :, top:bottom, left:right] if case.probabilities else None
        logits = np.ascontiguousarray(case.logits[i], np.float32)
        core = (top, left, bottom, right)
        broken[i] = _core.stitch(logits, core, pasted, counts[i], confidence[i], probabilities)
    return ids, counts, confidence, broken, planes


def check_stitch(machine: Machine, case: StitchCase, stream: int = 0) -> None:
    """Every byte and every sum as the C++ stitcher has them."""
    names = ("ids", "counts", "confidence", "broken", "probabilities")
    for name, mine, wanted in zip(names, stitch_on(machine, case, stream), stitch_on_cpu(case), strict=True):
        np.testing.assert_array_equal(mine, wanted, name)


def check_every_half(machine: Machine) -> None:
    """All 65536 halves against a class of zeros."""
    values = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    logits = np.stack([np.zeros_like(values), values])[None]
    for layout in ("nchw", "nhwc"):
        check_stitch(machine, StitchCase(logits, np.array([[0, 0, 256, 256]], np.int32), layout))


def check_cores_outside(machine: Machine) -> None:
    """What a wrong core has outside its tile is cut off: nothing there is read or written."""
    logits = random_logits(np.random.default_rng(0), (5, 3, 8, 24), "float32", 3)
    wrong = [[-2, -9, 4, 11], [3, 5, 99, 99], [6, 6, 2, 2], [99, 99, 120, 120], [-9, -9, -3, -3]]
    inside = [[0, 0, 4, 11], [3, 5, 8, 24], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    mine = stitch_on(machine, StitchCase(logits, np.array(wrong, np.int32)))
    wanted = stitch_on_cpu(StitchCase(logits, np.array(inside, np.int32)))
    for one, other in zip(mine, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@dataclass(frozen=True)
class GatherCase:
    """An image (H, W, 3) with rows `gap` bytes longer than it, tiles (h, w) at origins (n, 2), offsets in memory."""

    image: np.ndarray
    origins: np.ndarray
    shape: tuple[int, int]
    gap: int = 0
    offset: int = 0
    tiles_offset: int = 0


@st.composite
def gather_cases(draw: st.DrawFn) -> GatherCase:
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    height = draw(st.integers(1, 20) | st.sampled_from([100, 200]))
    width = draw(st.integers(1, 20) | st.sampled_from([100, 256, 333]))
    shape = draw(st.integers(1, 12) | st.just(70)), draw(st.integers(1, 40) | st.sampled_from([128, 200]))
    n = draw(st.integers(1, 3))
    beyond = draw(st.sampled_from([1, 2]))  # tiles may begin where only reflections are
    origins = np.stack([random.integers(0, beyond * height, n), random.integers(0, beyond * width, n)], 1)
    return GatherCase(
        random.integers(0, 256, (height, width, 3), np.uint8),
        origins.astype(np.int32),
        shape,
        draw(st.sampled_from([0, 0, 1, 4, 7, 16])),
        draw(st.sampled_from([0, 0, 1, 4, 8, 12])),
        draw(st.sampled_from([0, 0, 3, 8])),
    )


def check_gather(machine: Machine, case: GatherCase, stream: int = 0) -> None:
    """Every tile as slicing the reflected image gives it."""
    (height, width), (h, w), n = case.image.shape[:2], case.shape, len(case.origins)
    rows = np.full((height, 3 * width + case.gap), POISON, np.uint8)
    rows[:, : 3 * width] = case.image.reshape(height, -1)
    image, origins = machine.put(rows, case.offset), machine.put(case.origins)
    tiles = machine.poisoned((n, h, w, 3), offset=case.tiles_offset)
    machine.kernel("gather")(
        image_ptr=image.address,
        image_h=height,
        image_w=width,
        image_stride=rows.shape[1],
        n=n,
        h=h,
        w=w,
        origins_ptr=origins.address,
        tiles_ptr=tiles.address,
        stream=stream,
    )
    for tile, (y, x) in zip(tiles.read(), case.origins.tolist(), strict=True):
        wanted = case.image[reflect_indices(height, y + h)[y:]][:, reflect_indices(width, x + w)[x:]]
        np.testing.assert_array_equal(tile, wanted)
