"""The PyTorch engine on device "cpu": the same classes as on a GPU, one step after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from random_networks import check_overflow_is_told, noise, plan_of
from running import entries, make_pictures, picture, results, run_stream

from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.engines.half_network import HalfNetwork
from histoseg_fast.engines.torch_cuda import TorchEngine, TorchMemory
from histoseg_fast.errors import EngineError, PlanError
from histoseg_fast.images import write_png
from histoseg_fast.models.architectures import ARCHITECTURES
from histoseg_fast.models.network import rebuild
from histoseg_fast.plan import MODEL, pack, unpack

TOLERANCE = 2e-5
"""Between two libraries' fp32, of the largest logit."""


def compare(mine, wanted, tolerance):
    """Equal within the tolerance, and equal classes wherever the two best are further apart than it."""
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(mine, wanted, atol=tolerance * scale, rtol=0)
    first, second = np.sort(wanted, 0)[:-3:-1]
    sure = first - second > 2 * tolerance * scale
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(mine.argmax(0)[sure], wanted.argmax(0)[sure])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_computes_what_the_cpu_engine_computes(arch):
    plan = plan_of(arch)
    image = noise(75, 101)
    tile = max(2 * plan.halo + 2 * plan.stride, 64)
    with open_engine(plan, device="cpu", precision="fp32") as exact:
        wanted = run_tiled(exact, plan, image)
    with TorchEngine(plan, "cpu", "fp32") as engine:
        assert (engine.device, engine.precision, engine.name) == ("cpu", "fp32", f"PyTorch {torch.__version__}")
        compare(run_tiled(engine, plan, image), wanted, TOLERANCE)
        compare(run_tiled(engine, plan, image, tile), wanted, TOLERANCE)
    with TorchEngine(plan, "cpu", "fp16") as engine:
        compare(run_tiled(engine, plan, image), wanted, 5e-3)


@pytest.mark.parametrize("arch", ["final", "fast"])
def test_fp16_keeps_its_last_convolution_in_fp32(arch):
    with TorchEngine(plan_of(arch), "cpu", "fp16") as engine:
        module = engine._network._module
        types = {name: t.dtype for name, t in module.named_parameters() if name.endswith("weight")}
        (last,) = [name for name in types if name.endswith("logits.weight")]
        assert types.pop(last) == torch.float32
        assert set(types.values()) == {torch.float16}
        assert module.module.scale.dtype == torch.float32


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_kernels_layers_are_pytorchs(arch):
    """Layer by layer with the kernels' threads one by one, and with PyTorch alone."""
    rgb, device = torch.from_numpy(noise(64, 96))[None], torch.device("cpu")
    with torch.inference_mode():
        mine, plain = (HalfNetwork(rebuild(plan_of(arch)), device, kernels)(rgb)[0] for kernels in (True, False))
    assert mine.dtype == plain.dtype == torch.float32 and mine.is_contiguous() and plain.is_contiguous()
    compare(mine.numpy(), plain.numpy(), 3e-3)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("arch", ["final", "fast"])
def test_values_beyond_fp16_never_end_as_sound_logits(arch, kernels):
    check_overflow_is_told(arch, "cpu", kernels)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder, 3, 64, 48)
    for i, (height, width) in enumerate([(120, 70), (5, 9), (60, 150)]):
        write_png(folder / f"other_{i}.png", picture(i, height, width))
    return folder


def test_the_stream_is_the_same_with_the_kernels_arithmetic_and_with_the_cpus(pictures, tmp_path, monkeypatch):
    plan = plan_of("one")
    options = {"stride": plan.stride, "halo": plan.halo, "tile": 80, "batch": 2}
    with TorchEngine(plan, "cpu", "fp32") as engine:
        assert run_stream(engine, pictures, tmp_path / "device", **options, overlay=True).done == 6
        assert run_stream(engine, pictures, tmp_path / "whole", **{**options, "tile": 256}, overlay=True).done == 6
        run_stream(engine, pictures, tmp_path / "crf", **options, postprocess="crf")
    start = TorchMemory.__init__

    def without_kernels(memory, device):
        start(memory, device)
        memory.kernels = False

    monkeypatch.setattr(TorchMemory, "__init__", without_kernels)
    with TorchEngine(plan, "cpu", "fp32") as engine:
        assert engine.name.endswith("stitching on the CPU")
        run_stream(engine, pictures, tmp_path / "host", **options, overlay=True)
        run_stream(engine, pictures, tmp_path / "host_crf", **options, postprocess="crf")
    assert results(tmp_path / "device") == results(tmp_path / "host")
    assert results(tmp_path / "crf") == results(tmp_path / "host_crf")
    for name, entry in entries(tmp_path / "device").items():
        whole = entries(tmp_path / "whole")[name]
        pixels = entry["height"] * entry["width"]
        assert sum(abs(entry["pixels"][c] - whole["pixels"][c]) for c in whole["pixels"]) <= pixels // 1000


def test_out_of_memory_halves_the_batch(pictures, tmp_path, monkeypatch):
    plan, lines = plan_of("one"), []
    options = {"stride": plan.stride, "halo": plan.halo, "tile": 80, "batch": 4}
    with TorchEngine(plan, "cpu", "fp32", lines.append) as engine:
        run_stream(engine, pictures, tmp_path / "plain", **options)
        module = engine._network._module

        def tight(rgb):
            if len(rgb) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
            return module(rgb)

        monkeypatch.setattr(engine._network, "_module", tight)
        run_stream(engine, pictures, tmp_path / "tight", **options)
        assert [line.rpartition(" ")[2] for line in lines][-1] == "1"
        assert results(tmp_path / "tight") == results(tmp_path / "plain")
        monkeypatch.setattr(
            engine._network, "_module", lambda rgb: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
        )
        with pytest.raises(
            EngineError, match=r"cpu has not the memory for one tile of .* .full.; use a smaller --tile"
        ):
            run_tiled(engine, plan, noise(16, 16))
        monkeypatch.setattr(
            engine._network, "_module", lambda rgb: (_ for _ in ()).throw(RuntimeError("CUDA error:\nx"))
        )
        with pytest.raises(EngineError, match=r"^PyTorch failed on cpu .CUDA error: x.$"):
            run_tiled(engine, plan, noise(16, 16))


class Graphs:
    """CUDA graphs of PyTorch that compute on the CPU what was captured."""

    def __init__(self, monkeypatch, network):
        self.made, self.open, self.fault = [], None, None
        forward = network._forward

        def captured(rgb):
            logits = forward(rgb)
            if self.open is not None:
                self.open.work = (forward, rgb, logits)
            return logits

        class Stream:
            def wait_stream(self, other):
                pass

        graphs = self

        class Graph:
            replays = 0

            def __init__(self):
                graphs.made.append(self)

            def replay(self):
                forward, rgb, logits = self.work
                self.replays += 1
                with torch.inference_mode():
                    logits.copy_(forward(rgb))

        @contextlib.contextmanager
        def graph(graph, *, pool, stream, capture_error_mode):
            assert pool == "pool" and capture_error_mode == "thread_local"
            if self.fault is not None:
                raise self.fault
            graphs.open = graph
            try:
                yield
            finally:
                graphs.open = None

        monkeypatch.setattr(network, "graphs", True)
        monkeypatch.setattr(network, "_forward", captured)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "current_stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


def test_shapes_that_come_again_are_replayed(pictures, tmp_path, monkeypatch):
    plan, lines = plan_of("one"), []
    options = {"stride": plan.stride, "halo": plan.halo, "tile": 60, "batch": 1}
    with TorchEngine(plan, "cpu", "fp32", lines.append) as engine:
        run_stream(engine, pictures, tmp_path / "plain", **options)
        graphs = Graphs(monkeypatch, engine._network)
        engine._network._seen.clear()
        run_stream(engine, pictures, tmp_path / "replayed", **options)
        assert len(graphs.made) >= 2 and all(graph.replays >= 1 for graph in graphs.made)
        assert results(tmp_path / "replayed") == results(tmp_path / "plain") and not lines


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (RuntimeError("CUDA error:\noperation not permitted"), "PyTorch failed on cpu (CUDA error: operation not"),
        (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
    ],
)
def test_a_capture_that_fails_costs_a_line(monkeypatch, fault, words):
    plan, lines = plan_of("one"), []
    image = noise(32, 32)
    with TorchEngine(plan, "cpu", "fp32", lines.append) as engine:
        wanted = run_tiled(engine, plan, image)
        Graphs(monkeypatch, engine._network).fault = fault
        for _ in range(3):
            np.testing.assert_array_equal(run_tiled(engine, plan, image), wanted)
        (line,) = lines
        assert line.startswith(f"going on without CUDA graphs: {words}") and not engine._network.graphs


def test_what_did_not_fit_is_let_go_before_memory_is_made(monkeypatch):
    """An error's frames hold what was computed so far: with it at hand, PyTorch could give none of that back."""
    plan, held = plan_of("one"), []
    with TorchEngine(plan, "cpu", "fp32") as engine:
        module = engine._network._module

        def tight(rgb):
            if not held:
                half_way = rgb.float()
                held.append(weakref.ref(half_way))
                raise torch.OutOfMemoryError("full")
            return module(rgb)

        gone = []
        monkeypatch.setattr(engine._network, "_module", tight)
        monkeypatch.setattr(engine._memory, "trim", lambda: gone.append(held[0]() is None))
        run_tiled(engine, plan, noise(16, 16))
    assert gone == [True]


# -- plans that do not fit -------------------------------------------------------------------------


def changed(plan, change, **manifest):
    model = onnx.load_from_string(plan.members[MODEL])
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    change(tensors)
    for node in model.graph.node:
        node.input[:] = [tensors[name].name if name in tensors else name for name in node.input]
    fields = {k: v for k, v in plan.manifest.items() if k not in ("format", "version", "members")}
    return unpack(pack(fields | manifest, {MODEL: model.SerializeToString()}))


def rename(tensors):
    tensors["head.logits.bias"].name = "elsewhere"


def reshape(tensors):
    tensors["head.logits.bias"].CopyFrom(numpy_helper.from_array(np.zeros(4, np.float32), "head.logits.bias"))


@pytest.mark.parametrize("change", [rename, reshape])
def test_tensors_that_do_not_fit(change):
    with pytest.raises(PlanError, match=r"does not hold the tensors of a network 'final'") as caught:
        rebuild(changed(plan_of("final"), change))
    assert str(caught.value).isprintable()


def test_plans_that_are_no_network_of_ours(tiny_plan):
    with pytest.raises(EngineError, match="PyTorch cannot rebuild a network 'tiny'; use --device cpu"):
        TorchEngine(tiny_plan, "cpu", "fp32")
    plan = plan_of("final")
    for data in (b"", b"\xff" * 64, plan.members[MODEL][:1000]):
        with pytest.raises(PlanError, match="does not hold the tensors"):
            rebuild(dataclasses.replace(plan, members={MODEL: data}))


def test_halves_are_read_as_they_are_stored():
    """The shipped form keeps large tensors in fp16."""
    plan = plan_of("fast")
    stored = {t.name: t for t in onnx.load_from_string(plan.members[MODEL]).graph.initializer}
    assert stored["stem.0.weight"].data_type == onnx.TensorProto.FLOAT16
    weights = rebuild(plan).state_dict()["network.stem.0.weight"]
    assert weights.dtype == torch.float32
    np.testing.assert_array_equal(weights.numpy(), numpy_helper.to_array(stored["stem.0.weight"]).astype(np.float32))
