"""The CUDA kernels' arithmetic without a GPU: every thread of a launch in turn, against the C++ stitcher and NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from kernels import (
    HOST,
    GatherCase,
    StitchCase,
    check_cores_outside,
    check_every_half,
    check_gather,
    check_stitch,
    gather_cases,
    random_cores,
    random_logits,
    stitch_cases,
)

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE
from histoseg_fast.tiling import TileGrid, pad_to_stride

SETTINGS = settings(deadline=None, max_examples=300)
FORMATS = list(itertools.product(["float32", "float16"], ["nchw", "nhwc"]))


@SETTINGS
@given(stitch_cases())
def test_stitch_is_the_cpus(case):
    check_stitch(HOST, case)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize(("dtype", "layout"), FORMATS)
def test_stitch_in_several_blocks_and_rounds(classes, dtype, layout):
    """More pieces than threads; a width whose rows begin at every alignment, and one whose do at none but the best."""
    random = np.random.default_rng(classes)
    for height, width in ((301, 259), (264, 512)):
        logits = random_logits(random, (2, classes, height, width), dtype, 3)
        cores = np.array([[0, 0, height, width], random_cores(random, 1, height, width)[0]], np.int32)
        check_stitch(HOST, StitchCase(logits, cores, layout))


def test_every_half():
    check_every_half(HOST)


def test_cores_outside_the_tile_are_cut_off():
    check_cores_outside(HOST)


@SETTINGS
@given(gather_cases())
@example(GatherCase(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 2), np.int32), (40, 40)))
def test_gather_is_slicing(case):
    check_gather(HOST, case)


@pytest.mark.parametrize(("height", "width"), [(150, 333), (61, 128), (3, 5)])
def test_gather_cuts_the_grid_of_an_image(height, width):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    grid = TileGrid.cover(height, width, 64, 8, 4)
    origins = [[row.outer, column.outer] for row in grid.rows for column in grid.columns[0]]
    padded = pad_to_stride(image, 4)
    case = GatherCase(image, np.array(origins, np.int32), grid.tile_shape(0, 0))
    check_gather(HOST, case)
    check_gather(HOST, GatherCase(padded, case.origins, case.shape))  # no pixel of any tile lies beyond the padding


def test_no_tiles_and_no_pixels():
    sums = {name: HOST.poisoned((2, 3), np.uint64) for name in ("counts", "confidence", "broken")}
    pointers = {f"{name}_ptr": block.address for name, block in sums.items()}
    numbers = {"dtype": "fp32", "layout": "nchw", "classes": 3, "w": 0, "probabilities_ptr": 0, "stream": 0}
    nothing = {"logits_ptr": 0, "ids_ptr": 0}
    cores = HOST.put(np.zeros((2, 4), np.int32))
    _core.emulate_stitch(n=0, h=4, cores_ptr=0, **pointers, **numbers, **nothing)
    before = sums["counts"].read().copy()
    _core.emulate_stitch(n=2, h=4, cores_ptr=cores.address, **pointers, **numbers, **nothing)
    assert before.all()
    assert not sums["counts"].read().any()
    _core.emulate_gather(0, 5, 5, 15, 0, 4, 4, 0, 0, 0)
    _core.emulate_gather(0, 5, 5, 15, 2, 0, 4, 0, 0, 0)


STITCH = {
    "logits_ptr": 64,
    "dtype": "fp32",
    "layout": "nchw",
    "n": 1,
    "classes": 3,
    "h": 8,
    "w": 8,
    "cores_ptr": 64,
    "ids_ptr": 64,
    "counts_ptr": 64,
    "confidence_ptr": 64,
    "broken_ptr": 64,
    "probabilities_ptr": 0,
    "stream": 0,
}
GATHER = {"image_ptr": 64, "image_h": 9, "image_w": 9, "image_stride": 27, "n": 1, "h": 4, "w": 4}
GATHER |= {"origins_ptr": 64, "tiles_ptr": 64, "stream": 0}
DECODE = {"rgb_ptr": 64, "h": 4, "w": 4, "channels": 3, "stride": 12, "palette": PAPER_PALETTE.array}
DECODE |= {"tolerance": 0.0, "ids_ptr": 64, "counters_ptr": 64, "stream": 0}


@pytest.mark.parametrize("launch", [_core.cuda_stitch, _core.emulate_stitch])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits_ptr", 0),
        ("logits_ptr", 66),
        ("dtype", "bf16"),
        ("layout", "NCHW"),
        ("n", -1),
        ("n", 65536),
        ("classes", 0),
        ("classes", 33),
        ("h", -1),
        ("h", 2**28),
        ("w", 2**60),
        ("cores_ptr", 0),
        ("cores_ptr", 65),
        ("ids_ptr", 0),
        ("counts_ptr", 68),
        ("confidence_ptr", 0),
        ("broken_ptr", 0),
        ("targets_ptr", 4),
    ],
)
def test_stitch_refuses(launch, name, value):
    with pytest.raises(ValueError, match=name.removesuffix("_ptr")):
        launch(**{**STITCH, name: value})


@pytest.mark.parametrize("launch", [_core.cuda_gather, _core.emulate_gather])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_ptr", 0),
        ("image_h", 0),
        ("image_w", 2**31),
        ("image_stride", 26),
        ("n", 65536),
        ("h", 2**28),
        ("w", -1),
        ("origins_ptr", 0),
        ("origins_ptr", 2),
        ("tiles_ptr", 0),
    ],
)
def test_gather_refuses(launch, name, value):
    with pytest.raises(ValueError, match=name):
        launch(**{**GATHER, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rgb_ptr", 0),
        ("h", -1),
        ("channels", 1),
        ("stride", 11),
        ("palette", np.zeros((3, 4), np.uint8)),
        ("tolerance", -1.0),
        ("ids_ptr", 0),
        ("counters_ptr", 4),
    ],
)
def test_decode_refuses(name, value):
    with pytest.raises(ValueError, match=name):
        _core.cuda_decode_labels(**{**DECODE, name: value})


def test_a_launch_without_a_gpu_says_why():
    import torch

    if _core.cuda_built and torch.cuda.is_available():
        pytest.skip("this machine can run the kernels")
    for launch, arguments in (
        (_core.cuda_stitch, STITCH),
        (_core.cuda_gather, GATHER),
        (_core.cuda_decode_labels, DECODE),
    ):
        words = "CUDA" if _core.cuda_built else "no CUDA kernels; install"
        with pytest.raises(RuntimeError, match=words) as caught:
            launch(**arguments)
        assert str(caught.value).startswith(launch.__name__.removeprefix("cuda_"))
