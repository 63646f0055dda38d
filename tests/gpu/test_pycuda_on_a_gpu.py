"""The runtime of TensorRT engines on a real GPU by the real pycuda, byte for byte the CPU's: skipped, saying so, where
either is missing. TensorRT itself is a stand-in whose engines copy the image to the logits, by PyTorch, on the stream
and the memory that they are given.
"""

from __future__ import annotations

from typing import Any

import pytest
from fake_execution import CLASSES
from gpu_fixtures import check_memory_is_given_back, gpu_here
from running import FakeEngine, entries, make_mixed_pictures, picture, results, run_stream

from histoseg_fast import _core
from histoseg_fast.engines import open_engine
from histoseg_fast.engines.trt import check
from histoseg_fast.images import write_png

torch = pytest.importorskip("torch")
pytest.importorskip("pycuda")
pytestmark = [
    pytest.mark.skipif(not gpu_here(), reason="there is no NVIDIA GPU"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU that CUDA can use here"),
    pytest.mark.skipif(not _core.cuda_built, reason="the core was built without CUDA kernels"),
]
OPTIONS = {"tile": 24, "stride": 2, "batch": 3, "readers": 4, "writers": 2}


class Memory:
    """Device memory that PyTorch makes a tensor of."""

    def __init__(self, address: int, shape: tuple[int, ...], kind: str):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": kind, "version": 3}


class Context:
    """An IExecutionContext that wants two bytes of scratch memory a pixel, and spoils them."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        n, h, w, _ = self.shape
        return 2 * n * h * w

    def set_device_memory(self, memory: int, size: int) -> None:
        self.scratch = memory, (self.update_device_memory_size_for_shapes(),)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        n, h, w, _ = self.shape
        rgb = torch.as_tensor(Memory(self.addresses["rgb"], self.shape, "|u1"), device="cuda")
        logits = torch.as_tensor(Memory(self.addresses["logits"], (n, CLASSES, h, w), "<f4"), device="cuda")
        scratch = torch.as_tensor(Memory(*self.scratch, "|u1"), device="cuda")
        with torch.cuda.stream(torch.cuda.ExternalStream(stream_handle)):
            scratch.fill_(0xA5)
            logits.copy_(rgb.permute(0, 3, 1, 2))
        return True


@pytest.fixture
def open_here(machine, tiny_plan, monkeypatch):
    """Opens an engine on the GPU."""
    monkeypatch.setattr(check, "SYNTHETIC_SIDE", 32)

    def open_with(lines: list[str], **more: Any) -> Any:
        machine.trt.create_context = lambda engine, strategy: Context()
        return open_engine(tiny_plan, device="cuda", report=lines.append, **more)

    return open_with


@pytest.fixture
def pictures(tmp_path):
    make_mixed_pictures(tmp_path / "in", 12)
    return tmp_path / "in"


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"overlay": True}, {"postprocess": "crf", "overlay": True}, {"batch": 1}], ids=str
)
def test_the_stream_gives_the_same_bytes(open_here, pictures, tmp_path, options, graphs):
    lines: list[str] = []
    run_stream(FakeEngine(), pictures, tmp_path / "plain", **{**OPTIONS, **options})
    with open_here(lines) as engine:
        engine._network.graphs = graphs
        for i in range(5):
            totals = run_stream(engine, pictures, tmp_path / str(i), **{**OPTIONS, **options})
            assert (totals.done, totals.failed) == (16, 0)
            assert results(tmp_path / str(i)) == results(tmp_path / "plain")
        assert bool(engine._network._replays) is graphs
    assert not [line for line in lines if "graph" in line]
    mine, wanted = entries(tmp_path / "0"), entries(tmp_path / "plain")
    assert all(mine[name]["mean_confidence"] == wanted[name]["mean_confidence"] for name in wanted)


def test_out_of_memory_halves_the_batch(open_here, tmp_path):
    for i in range(40):
        write_png(tmp_path / "in" / f"{i}.png", picture(i % 3, 1000, 1000))
    options = {**OPTIONS, "tile": 1024, "batch": 32}
    lines: list[str] = []
    with open_here(lines, tile=1024, batch=32) as engine:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        # A tile takes 18 MB: 32 of them are more than this, 8 of them in every slot are not.
        hog = torch.empty(max(0, free - (500 << 20)), dtype=torch.uint8, device="cuda")
        totals = run_stream(engine, tmp_path / "in", tmp_path / "out", **options)
        del hog
    torch.cuda.empty_cache()
    assert totals.done == 40 and any("out of memory" in line for line in lines)
    run_stream(FakeEngine(), tmp_path / "in", tmp_path / "plain", **options)
    assert results(tmp_path / "out") == results(tmp_path / "plain")


def test_memory_is_given_back(open_here, pictures, tmp_path):
    def run(i):
        with open_here([]) as engine:
            run_stream(engine, pictures, tmp_path / str(i), **OPTIONS)

    check_memory_is_given_back(run, 16 << 20)
