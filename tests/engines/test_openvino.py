"""The CPU engine: tiles, batches and threads never change an answer; which precision runs."""

from __future__ import annotations

import numpy as np
import openvino as ov
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from random_networks import noise, plan_of
from tiny_plans import changed

from histoseg_fast import engines, machine
from histoseg_fast.engines import choose_precision, open_engine, run_tiled
from histoseg_fast.engines import openvino as openvino_module
from histoseg_fast.engines.base import Wants
from histoseg_fast.errors import EngineError, UsageError
from histoseg_fast.machine import cpu_precisions
from histoseg_fast.models.architectures import ARCHITECTURES
from histoseg_fast.plan import DEFAULT_GATE
from histoseg_fast.plans import open_plan
from histoseg_fast.synthetic import make_field

GATE = DEFAULT_GATE["agreement"]
FEW = settings(max_examples=3, derandomize=True, deadline=None)
MANY = settings(max_examples=40, deadline=None)
needs_bf16 = pytest.mark.skipif("bf16" not in cpu_precisions(), reason="this CPU has no native bf16")


@pytest.fixture(scope="module")
def fp32(tiny_plan):
    with open_engine(tiny_plan, precision="fp32") as engine:
        yield engine


LARGE_KERNELS = ("one", "two")
"""Networks with kernels of 7x7 and more: OpenVINO sums them in an order that on some CPUs depends on the size."""


def check_tiled(engine, plan, height, width, tile, seed=0):
    image = noise(height, width, seed)
    whole, tiled = run_tiled(engine, plan, image), run_tiled(engine, plan, image, tile)
    assert whole.shape == (3, height, width) and np.isfinite(whole).all()
    if plan.name not in LARGE_KERNELS:
        np.testing.assert_array_equal(tiled, whole)
    np.testing.assert_allclose(tiled, whole, atol=2e-5, rtol=0)
    clear = np.diff(np.sort(whole, axis=0)[-2:], axis=0)[0] > 4e-5
    np.testing.assert_array_equal(tiled.argmax(0)[clear], whole.argmax(0)[clear])


# -- tiled = whole ---------------------------------------------------------------------------------


@MANY
@given(st.integers(1, 600), st.integers(1, 600), st.integers(20, 400), st.integers(0, 99))
@example(1, 1, 20, 0)
@example(600, 599, 21, 1)
@example(1, 600, 20, 2)
@example(37, 128, 36, 3)
def test_tiled_equals_whole_for_a_tiny_network(tiny_plan, fp32, height, width, tile, seed):
    check_tiled(fp32, tiny_plan, height, width, max(tile, 20 if height * width < 40_000 else 60), seed)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiled_equals_whole(arch):
    plan = plan_of(arch)
    least = 2 * plan.halo + 2 * plan.stride
    sides = st.integers(1, max(130, least + 40))
    with open_engine(plan, precision="fp32") as engine:

        @FEW
        @given(sides, sides, st.integers(0, 40))
        @example(1, 1, 0)
        @example(3, least + 9, 1)
        @example(least + 30, least + 1, 0)
        def check(height, width, more):
            check_tiled(engine, plan, height, width, least + more)

        check()


@pytest.mark.parametrize(("height", "width"), [(600, 599), (600, 1), (3, 597)])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tiled_equals_whole_at_full_size(arch, height, width):
    plan = plan_of(arch)
    with open_engine(plan, precision="fp32") as engine:
        check_tiled(engine, plan, height, width, 480 if arch == "fast" else 320)


def test_the_halo_is_needed():
    """The test above can fail: with a stride less of halo the numbers differ."""
    plan = plan_of("final")
    short = changed(plan, halo=plan.halo - 2 * plan.stride)
    image = noise(16, 140)
    with open_engine(plan, precision="fp32") as engine:
        assert not np.array_equal(run_tiled(engine, short, image, 72), run_tiled(engine, plan, image))


@needs_bf16
@pytest.mark.parametrize("arch", ["three", "final"])
def test_tile_sizes_agree_in_bf16(arch):
    plan = plan_of(arch)
    image = noise(150, 171)
    with open_engine(plan, precision="bf16") as engine:
        whole = run_tiled(engine, plan, image).argmax(0)
        for tile in (80, 112):
            assert (run_tiled(engine, plan, image, tile).argmax(0) == whole).mean() >= 0.9999


@needs_bf16
def test_bf16_is_near_fp32_but_not_it(tiny_plan):
    image = noise(64, 64)
    with open_engine(tiny_plan, precision="bf16") as engine, open_engine(tiny_plan, precision="fp32") as exact:
        assert (engine.precision, exact.precision) == ("bf16", "fp32")
        near, logits = run_tiled(engine, tiny_plan, image), run_tiled(exact, tiny_plan, image)
    assert not np.array_equal(near, logits)
    assert np.abs(near - logits).max() < 0.05 * np.abs(logits).max()


# -- batches, threads, slots -----------------------------------------------------------------------


def run(engine, slot, images):
    slot.reshape(*images.shape[:3])[...] = images
    slot.wants = Wants(logits=True)
    engine.submit(slot)
    engine.wait(slot)
    return slot.logits.copy()


@pytest.mark.parametrize("arch", ["tiny", "two", "final"])
def test_batches_and_threads_give_the_same_bits(tiny_plan, arch):
    plan = tiny_plan if arch == "tiny" else plan_of(arch)
    images = noise(5 * 64, 48).reshape(5, 64, 48, 3)
    results = []
    for threads in (1, 2, 3, 0):
        with open_engine(plan, precision="fp32", threads=threads) as engine:
            (slot,) = engine.slots(1)
            for batch in (1, 2, 5) if threads in (0, 1) else (5,):
                parts = [run(engine, slot, images[i : i + batch]) for i in range(0, 5, batch)]
                results.append(np.concatenate(parts))
    assert all(result.tobytes() == results[0].tobytes() for result in results)


def test_a_slot_is_reused_for_larger_and_smaller_batches(tiny_plan, fp32):
    (slot,) = fp32.slots(1)
    shapes = [(1, 64, 64), (3, 20, 40), (1, 2, 2), (2, 128, 130), (1, 64, 64), (1, 2, 600), (4, 64, 64)]
    for i, shape in enumerate(shapes):
        images = noise(shape[0] * shape[1], shape[2], i).reshape(*shape, 3)
        for image, logits in zip(images, run(fp32, slot, images), strict=True):
            np.testing.assert_array_equal(logits, run_tiled(fp32, tiny_plan, image))


def test_slots_run_beside_each_other(tiny_plan, fp32):
    slots, images = fp32.slots(3), [noise(40 + 2 * i, 50, i) for i in range(3)]
    for slot, image in zip(slots, images, strict=True):
        slot.reshape(1, *image.shape[:2])[0] = image
        slot.wants = Wants(logits=True)
        fp32.submit(slot)
    for slot, image in reversed(list(zip(slots, images, strict=True))):
        fp32.wait(slot)
        assert slot.logits.dtype == np.float32
        np.testing.assert_array_equal(slot.logits[0], run_tiled(fp32, tiny_plan, image))


@pytest.mark.parametrize("precision", ["fp32", "int8", pytest.param("bf16", marks=needs_bf16)])
def test_a_pixel_shuffle_at_the_end_is_skipped_and_nothing_changes(precision, monkeypatch):
    """Logits, classes, probabilities and sums, of whole tiles and of cores with odd edges."""
    plan = open_plan("fast")
    images = np.stack([make_field(seed, 160, 96)[0] for seed in range(2)])
    with open_engine(plan, precision=precision) as skipping:
        monkeypatch.setattr(openvino_module, "without_shuffle", lambda model: (model, False))
        with open_engine(plan, precision=precision) as plain:
            slots = [engine.slots(1)[0] for engine in (skipping, plain)]
            logits = [run(engine, slot, images) for engine, slot in zip((skipping, plain), slots, strict=True)]
            assert [slot.result.shape for slot in slots] == [(2, 3, 2, 2, 48, 80), (2, 3, 96, 160)]
            assert logits[0].tobytes() == logits[1].tobytes() and len(np.unique(logits[0].argmax(1))) > 1
            for core in ((0, 0, 96, 160), (32, 64, 95, 133), (7, 9, 8, 160)):
                found = []
                for slot in slots:
                    height, width = core[2] - core[0], core[3] - core[1]
                    outputs = np.zeros((height, width), np.uint8), np.zeros(3, np.uint64), np.zeros(3, np.uint64)
                    planes = np.zeros((3, height, width), np.uint8)
                    assert slot.stitch(1, core, *outputs, planes) == 0
                    found.append([array.tobytes() for array in (*outputs, planes)])
                assert found[0] == found[1]
            slots[0].reshape(2, 96, 160)[...] = images
            with pytest.raises(AssertionError):
                slots[0].stitch(1, core, *outputs, planes)  # what it held is of another batch
            slots[0].wants = Wants()
            skipping.submit(slots[0])
            skipping.wait(slots[0])
            assert slots[0].logits is None  # put in order only where they are wanted
            assert slots[0].stitch(1, core, *outputs, planes) == 0


@pytest.mark.parametrize(("mode", "block"), [("DCR", 2), ("CRD", 4)])
def test_other_shuffles_stay_in_the_graph(mode, block):
    """And give what onnx says they give."""
    weights = noise(3 * block**2, 1).reshape(-1, 3, 1, 1).astype(np.float32)
    nodes = [
        helper.make_node("Transpose", ["image"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["planes"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["x"], ["small"], kernel_shape=[block] * 2, strides=[block] * 2),
        helper.make_node("Conv", ["small", "w"], ["many"]),
        helper.make_node("DepthToSpace", ["many"], ["logits"], blocksize=block, mode=mode),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "h", "w", 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_graph(nodes, "g", [image], [logits], [numpy_helper.from_array(weights, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    rgb = noise(16, 24)[None]
    wanted = ReferenceEvaluator(model).run(None, {"image": rgb})[0]
    found, shuffled = openvino_module.without_shuffle(ov.Core().read_model(model.SerializeToString()))
    assert not shuffled
    exact = ov.Core().compile_model(found, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(exact([rgb])[0], wanted, rtol=1e-5, atol=1e-3)


def test_reshape_keeps_memory_that_is_large_enough(fp32):
    (slot,) = fp32.slots(1)
    first = slot.reshape(2, 10, 10)
    assert first.shape == (2, 10, 10, 3) and first.dtype == np.uint8 and first.flags.c_contiguous
    assert np.shares_memory(slot.reshape(1, 4, 6), first)
    assert slot.logits is None


def test_what_the_engine_says_of_itself(fp32):
    assert (fp32.device, fp32.precision) == ("cpu", "fp32") and fp32.name.startswith("OpenVINO 20")


# -- the choice of device and precision ------------------------------------------------------------


@pytest.mark.parametrize(
    ("here", "fixed", "agreement", "wanted", "chosen"),
    [
        ("fp32 bf16", "auto", GATE, "auto", "bf16"),
        ("fp32 bf16", "auto", GATE - 1e-6, "auto", "fp32"),
        ("fp32 bf16", "auto", None, "auto", "fp32"),
        ("fp32", "auto", 1.0, "auto", "fp32"),
        ("fp32 bf16", "bf16", 0.5, "auto", "bf16"),
        ("fp32 bf16", "fp32", 1.0, "auto", "fp32"),
        ("fp32", "bf16", 1.0, "auto", "fp32"),
        ("fp32 bf16", "int8", 1.0, "auto", "fp32"),
        ("fp32 bf16", "auto", 0.1, "bf16", "bf16"),
        ("fp32 bf16", "bf16", 1.0, "fp32", "fp32"),
        ("fp32", "bf16", 1.0, "bf16", EngineError),
        ("fp32 bf16", "auto", 1.0, "int4", UsageError),
        ("fp32 bf16", "auto", 1.0, "", UsageError),
    ],
)
def test_choice_of_precision(tiny_plan, monkeypatch, here, fixed, agreement, wanted, chosen):
    monkeypatch.setattr(engines, "cpu_precisions", lambda: tuple(here.split()))
    monkeypatch.setattr(engines, "fastest", lambda plan, passed, measure: passed[-1])
    measured = {"fp32": {"agreement": 1.0}} | ({} if agreement is None else {"bf16": {"agreement": agreement}})
    plan = changed(tiny_plan, precision=fixed, precisions=measured)
    if isinstance(chosen, str):
        assert choose_precision(plan, wanted) == chosen
    else:
        with pytest.raises(chosen, match=r"--precision auto or fp32|choose one of auto, fp32"):
            choose_precision(plan, wanted)


RANGES = {"inputs": {"b": 4.0, "up": 9.0}, "outputs": {}}
ALL = "fp32 bf16 int8"


@pytest.mark.parametrize(
    ("here", "ranges", "fixed", "measured", "wanted", "chosen"),
    [
        (ALL, RANGES, "auto", {"bf16": 1.0, "int8": GATE}, "auto", "int8"),
        (ALL, RANGES, "auto", {"bf16": 0.1, "int8": GATE}, "auto", "int8"),
        (ALL, RANGES, "auto", {"bf16": 1.0, "int8": GATE - 1e-6}, "auto", "bf16"),
        (ALL, RANGES, "auto", {"bf16": 1.0}, "auto", "bf16"),
        (ALL, RANGES, "auto", {"bf16": 0.5, "int8": 0.5}, "auto", "fp32"),
        (ALL, RANGES, "int8", {}, "auto", "int8"),
        (ALL, RANGES, "bf16", {"int8": 1.0}, "auto", "bf16"),
        (ALL, RANGES, "fp16", {"int8": 1.0}, "auto", "fp32"),  # of a GPU
        (ALL, RANGES, "fp32", {"int8": 0.1}, "int8", "int8"),
        ("fp32 bf16", RANGES, "auto", {"bf16": 1.0, "int8": 1.0}, "auto", "bf16"),
        ("fp32 bf16", RANGES, "int8", {"int8": 1.0}, "auto", "fp32"),
        ("fp32 bf16", RANGES, "auto", {"int8": 1.0}, "int8", "this CPU has no native int8; .*auto or fp32 or bf16$"),
        (ALL, None, "auto", {"bf16": 1.0, "int8": 1.0}, "auto", "bf16"),
        (ALL, None, "int8", {"int8": 1.0}, "auto", "fp32"),
        (ALL, None, "auto", {"int8": 1.0}, "int8", "was compiled without int8; .*auto or fp32 or bf16$"),
    ],
)
def test_choice_of_int8(tiny_plan, monkeypatch, here, ranges, fixed, measured, wanted, chosen):
    monkeypatch.setattr(engines, "cpu_precisions", lambda: tuple(here.split()))
    monkeypatch.setattr(engines, "fastest", lambda plan, passed, measure: passed[-1])
    precisions = {name: {"agreement": value} for name, value in {"fp32": 1.0, **measured}.items()}
    plan = changed(tiny_plan, precision=fixed, precisions=precisions, **({"int8": ranges} if ranges else {}))
    if " " not in chosen:
        assert choose_precision(plan, wanted) == chosen
    else:
        with pytest.raises(EngineError, match=chosen):
            choose_precision(plan, wanted)


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ("", "fp32"),
        ("avx2 avx512f", "fp32"),
        ("avx_vnni", "fp32 int8"),
        ("avx512_vnni", "fp32 int8"),
        ("avx512_bf16", "fp32 bf16"),
        ("avx512_vnni amx_bf16", ALL),
        ("amx_int8 amx_bf16", ALL),
    ],
)
def test_what_a_cpu_runs(monkeypatch, flags, precisions):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset(flags.split()))
    assert machine.cpu_precisions() == tuple(precisions.split())


def test_devices(tiny_plan):
    with pytest.raises(UsageError, match="'tpu'; choose one of auto, cpu, cuda"):
        open_engine(tiny_plan, device="tpu")
    with open_engine(tiny_plan, device="cpu", precision="fp32") as engine:
        assert engine.device == "cpu"
