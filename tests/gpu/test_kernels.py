"""The CUDA kernels on a GPU: the same checks that tests/cuda runs thread by thread on the host."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from kernels import (
    GatherCase,
    Machine,
    StitchCase,
    check_cores_outside,
    check_every_half,
    check_gather,
    check_stitch,
    gather_cases,
    random_cores,
    random_logits,
    stitch_cases,
    stitch_on_cpu,
)
from layer_kernels import LayerCase, check_broken_values, check_layers, layer_cases

from histoseg_fast import _core
from histoseg_fast.labels import PAPER_PALETTE

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not _core.cuda_built, reason="the core was built without CUDA kernels"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU that CUDA can use here"),
]
SETTINGS = settings(deadline=None, max_examples=300)


def upload(content):
    memory = torch.from_numpy(content).cuda()
    return memory, memory.data_ptr()


def download(memory):
    torch.cuda.synchronize()
    return memory.cpu().numpy()


GPU = Machine("cuda_", upload, download)


@SETTINGS
@given(stitch_cases())
def test_stitch_is_the_cpus(case):
    check_stitch(GPU, case)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 32])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_large_tiles(classes, dtype, layout):
    random = np.random.default_rng(classes)
    for height, width in ((301, 259), (1024, 768)):
        logits = random_logits(random, (2, classes, height, width), dtype, 3)
        cores = np.array([[0, 0, height, width], random_cores(random, 1, height, width)[0]], np.int32)
        check_stitch(GPU, StitchCase(logits, cores, layout))


def test_every_half():
    check_every_half(GPU)


def test_cores_outside_the_tile_are_cut_off():
    check_cores_outside(GPU)


@SETTINGS
@given(gather_cases())
def test_gather_is_slicing(case):
    check_gather(GPU, case)


def test_gather_from_a_large_image():
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (2000, 3001, 3), np.uint8)
    origins = np.stack([random.integers(0, 2000, 8), random.integers(0, 3001, 8)], 1).astype(np.int32)
    check_gather(GPU, GatherCase(image, origins, (512, 512)))


@SETTINGS
@given(layer_cases())
def test_layers(case):
    check_layers(GPU, case)


def test_large_layers():
    check_layers(GPU, LayerCase(2, 264, 420, 64, 0))


def test_broken_values_reach_the_logits():
    check_broken_values(GPU)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("tolerance", [0.0, 30.0, 500.0])
def test_decode_labels_is_the_cpus(channels, tolerance):
    random = np.random.default_rng(channels)
    label = random.integers(0, 256, (65, 77, channels), np.uint8)
    exact = random.random((65, 77)) < 0.5
    label[exact, :3] = PAPER_PALETTE.array[random.integers(0, len(PAPER_PALETTE.array), exact.sum())]
    ids, approximate, unmatched, _ = _core.decode_labels(label, PAPER_PALETTE.array, tolerance)
    rgb, mine, counters = GPU.put(label), GPU.poisoned((65, 77)), GPU.put(np.array([5, 7], np.uint64))
    _core.cuda_decode_labels(
        rgb.address, 65, 77, channels, 77 * channels, PAPER_PALETTE.array, tolerance, mine.address, counters.address, 0
    )
    np.testing.assert_array_equal(mine.read(), ids)
    assert counters.read().tolist() == [5 + approximate, 7 + unmatched]


def test_a_launch_only_queues_work_on_its_stream():
    random = np.random.default_rng(0)
    logits = random_logits(random, (1, 3, 64, 64), "float32", 3)
    case = StitchCase(logits, np.array([[0, 0, 64, 64]], np.int32))
    check_stitch(GPU, case)  # the first launch loads the kernels, which may wait for the device
    blocks = [GPU.put(logits), GPU.put(case.cores), GPU.poisoned((1, 64, 64))]
    sums = [GPU.poisoned((1, 3), np.uint64), GPU.poisoned((1, 3), np.uint64), GPU.poisoned((1,), np.uint64)]
    addresses = [block.address for block in (*blocks, *sums)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    _core.cuda_stitch(addresses[0], "fp32", "nchw", 1, 3, 64, 64, *addresses[1:], 0, stream.cuda_stream)
    assert not stream.query()
    stream.synchronize()
    ids, counts, confidence, broken, _ = stitch_on_cpu(case)
    for block, wanted in zip((blocks[2], *sums), (ids, counts, confidence, broken), strict=True):
        np.testing.assert_array_equal(block.read(), wanted)
