"""Both GPU engines on a real GPU, end to end, against the CPU engine: skipped, saying so, where something is missing.

Libraries choose their algorithms by shape, the number of tiles included, so bytes are compared at one tile a batch.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
from gpu_fixtures import check_memory_is_given_back
from random_networks import check_overflow_is_told, noise, plan_of
from running import entries, make_pictures, picture, results, run_stream

from histoseg_fast import _core
from histoseg_fast.engines import devices, open_engine, run_tiled
from histoseg_fast.engines.trt.gpu import gpu_count
from histoseg_fast.errors import EngineError
from histoseg_fast.images import read_image, write_png
from histoseg_fast.pipeline.run import InferOptions, infer
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field


@pytest.fixture(params=["torch", "tensorrt"])
def library(request, monkeypatch):
    """One of the two; `open_engine` takes it."""
    monkeypatch.setenv(devices.LIBRARY_VARIABLE, request.param)
    try:
        devices.choose_gpus("cuda", print)
    except EngineError as error:
        pytest.skip(f"needs an NVIDIA GPU and {request.param} ({error})")
    return request.param


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 8, 200, 160)
    for i, (height, width) in enumerate([(600, 470), (5, 9), (260, 950), (7, 700)]):
        write_png(folder / f"other_{i}.png", picture(i, height, width))
    return folder


def stream_options(plan, **more):
    return {"stride": plan.stride, "halo": plan.halo, "tile": 160, "batch": 1, "readers": 4, "writers": 2, **more}


@pytest.mark.parametrize("arch", ["final", "fast"])
def test_values_beyond_fp16_never_end_as_sound_logits(library, arch):
    if library != "torch":
        pytest.skip("of PyTorch's fp16 network")
    check_overflow_is_told(arch, "cuda", kernels=True)


@pytest.mark.parametrize("arch", ["one", "final", "fast"])
def test_fp32_is_the_cpus(library, arch):
    plan = plan_of(arch)
    image = noise(301, 420)
    with open_engine(plan, device="cpu", precision="fp32") as exact:
        wanted = run_tiled(exact, plan, image)
    with open_engine(plan, device="cuda", precision="fp32") as engine:
        for tile in (1024, 2 * plan.halo + 100):
            logits = run_tiled(engine, plan, image, tile)
            np.testing.assert_allclose(logits, wanted, atol=1e-4 * np.abs(wanted).max(), rtol=0)


@pytest.mark.parametrize("name", ["final", "fast"])
def test_fp16_on_fields(library, name):
    plan = open_plan(name)
    field = make_field(0)[0]
    with open_engine(plan, device="cpu", precision="fp32") as exact, open_engine(plan, device="cuda") as engine:
        assert engine.precision == "fp16"
        same = run_tiled(engine, plan, field).argmax(0) == run_tiled(exact, plan, field).argmax(0)
        assert same.mean() >= 0.995


@pytest.mark.parametrize("options", [{}, {"overlay": True}, {"postprocess": "crf", "overlay": True}])
def test_the_stream_gives_the_same_bytes_stitched_here_or_there(library, pictures, tmp_path, monkeypatch, options):
    """And with CUDA graphs or without."""
    plan = plan_of("one")
    if not _core.cuda_built:
        pytest.skip("the core was built without CUDA kernels")
    for name in ("device", "eager", "host"):
        with open_engine(plan, device="cuda") as engine:
            if name == "eager":
                monkeypatch.setattr(engine._network, "graphs", False)
            if name == "host":
                monkeypatch.setattr(engine._memory, "kernels", False)
            assert run_stream(engine, pictures, tmp_path / name, **stream_options(plan, **options)).done == 12
            assert bool(engine._network._replays) is (name != "eager")
    assert results(tmp_path / "device") == results(tmp_path / "eager") == results(tmp_path / "host")
    device, host = entries(tmp_path / "device"), entries(tmp_path / "host")
    assert all(device[name]["mean_confidence"] == host[name]["mean_confidence"] for name in device)


def test_runs_repeat_to_the_same_bytes(library, pictures, tmp_path):
    """A race would show: many slots, every reader at work."""
    plan = plan_of("one")
    with open_engine(plan, device="cuda") as engine:
        for i in range(10):
            run_stream(engine, pictures, tmp_path / str(i), **stream_options(plan, readers=8, tile=128))
            assert results(tmp_path / str(i)) == results(tmp_path / "0")


@pytest.mark.parametrize("batch", [2, 5])
def test_batches_change_next_to_nothing(library, pictures, tmp_path, batch):
    plan = plan_of("one")
    with open_engine(plan, device="cuda", batch=batch) as engine:
        for n in (1, batch):
            run_stream(engine, pictures, tmp_path / str(n), **stream_options(plan, batch=n))
    for path in (tmp_path / "1" / "masks").iterdir():
        same = read_image(path) == read_image(tmp_path / str(batch) / "masks" / path.name)
        assert same.mean() >= 0.995 or same.size - same.sum() < 20


def test_infer_with_probabilities(library, pictures, tmp_path):
    plan = open_plan("fast")
    options = InferOptions(device="cuda", probabilities=True)
    totals, record = infer(plan, [str(pictures)], tmp_path / "gpu", options)
    infer(plan, [str(pictures)], tmp_path / "cpu", InferOptions(device="cpu", precision="fp32"))
    assert totals.done == 12 and record["device"] == "cuda:0"
    gpu, cpu = entries(tmp_path / "gpu"), entries(tmp_path / "cpu")
    for name in cpu:
        assert gpu[name]["mean_confidence"] == pytest.approx(cpu[name]["mean_confidence"], abs=0.02)


def test_out_of_memory_halves_the_batch(library, pictures, tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("another process has to take the memory, and PyTorch finds no GPU")
    # A layer of `final` takes and gives 0.4 GB a tile: 8 do not fit 2 GiB, one does. More than 12 would be refused by
    # TensorRT when it builds: 128 channels of them are 2^31 values.
    plan, lines = plan_of("final"), []
    with open_engine(plan, device="cuda", tile=1024, batch=8, report=lines.append) as engine:
        options = stream_options(plan, tile=1024, batch=8)
        for i in range(20):
            write_png(tmp_path / "in" / f"{i}.png", picture(i % 3, 1000, 1000))
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        hog = torch.empty(max(0, free - (2 << 30)), dtype=torch.uint8, device="cuda")
        totals = run_stream(engine, tmp_path / "in", tmp_path / "out", **options)
        del hog
    torch.cuda.empty_cache()
    assert totals.done == 20 and any("out of memory" in line for line in lines)


def test_memory_is_given_back(library, pictures, tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU to ask for its free memory")
    plan = plan_of("one")

    def run(i):
        with open_engine(plan, device="cuda") as engine:
            run_stream(engine, pictures, tmp_path / str(i), **stream_options(plan))

    check_memory_is_given_back(run, 64 << 20)


def test_another_thread_may_use_the_gpu(library, pictures, tmp_path):
    """The primary context is shared; another thread's work on the default stream harms nothing."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    plan, over = plan_of("one"), threading.Event()

    def work():
        weights = torch.randn(512, 512, device="cuda")
        while not over.is_set():
            weights = torch.tanh(weights @ weights)

    beside = threading.Thread(target=work)
    beside.start()
    try:
        with open_engine(plan, device="cuda") as engine:
            run_stream(engine, pictures, tmp_path / "beside", **stream_options(plan))
    finally:
        over.set()
        beside.join()
    with open_engine(plan, device="cuda") as engine:
        run_stream(engine, pictures, tmp_path / "alone", **stream_options(plan))
    assert results(tmp_path / "beside") == results(tmp_path / "alone")


def test_several_gpus(library, pictures, tmp_path):
    if gpu_count() < 2:
        pytest.skip("needs two GPUs")
    plan = plan_of("one")
    for device in ("cuda:0", "cuda:0,1"):
        with open_engine(plan, device=device) as engine:
            run_stream(engine, pictures, tmp_path / device, **stream_options(plan))
    assert results(tmp_path / "cuda:0") == results(tmp_path / "cuda:0,1")
