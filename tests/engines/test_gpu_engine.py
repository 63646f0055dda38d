"""The GPU engines' batches on fake GPUs that run their streams in any order CUDA would allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from fake_cuda import POISON
from fake_execution import rgb_as_logits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from histoseg_fast import _core
from histoseg_fast.engines import gpu as gpu_module
from histoseg_fast.engines import open_engine, run_tiled
from histoseg_fast.engines.base import Slot, Wants
from histoseg_fast.engines.trt.memory import PycudaMemory
from histoseg_fast.errors import EngineError

MANY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def images(n, h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, h, w, 3), np.uint8)


def fill(slot, batch, seed=0):
    """Put a batch with random cores into a slot."""
    n, h, w, _ = batch.shape
    random = np.random.default_rng(seed)
    slot.reshape(n, h, w)[...] = batch
    rows, columns = (np.sort(random.integers(0, side + 1, (n, 2)), 1) for side in (h, w))
    slot.cores[...] = np.stack([rows[:, 0], columns[:, 0], rows[:, 1], columns[:, 1]], 1)


def stitched(slot, index, probabilities):
    """Everything that `stitch` gives for a tile."""
    core = tuple(slot.cores[index].tolist())
    shape = core[2] - core[0], core[3] - core[1]
    classes, counts, confidence = np.full(shape, POISON, np.uint8), np.ones(3, np.uint64), np.ones(3, np.uint64)
    planes = np.full((3, *shape), POISON, np.uint8) if probabilities else None
    broken = slot.stitch(index, core, classes, counts, confidence, planes)
    return broken, classes, counts, confidence, planes


def check(slot, batch):
    """A slot that is done holds what the CPU's stitcher makes of the logits."""
    twin = Slot()
    twin.reshape(*batch.shape[:3])
    twin.cores[...] = slot.cores
    twin.logits = rgb_as_logits(batch)
    for i in range(len(batch)):
        mine, wanted = (stitched(one, i, slot.wants.probabilities) for one in (slot, twin))
        for one, other in zip(mine, wanted, strict=True):
            np.testing.assert_array_equal(one, other)


BATCHES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8)
REPEATED = st.lists(st.sampled_from([(1, 8, 8), (3, 8, 8), (2, 16, 6), (6, 4, 4)]), min_size=6, max_size=12)


@MANY
@given(BATCHES | REPEATED, st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 999))
def test_what_comes_back_is_the_cpus_whatever_order_the_streams_run_in(
    gpus, tiny_plan, shapes, depth, probabilities, logits, kernels, seed
):
    cuda = gpus.start(seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PycudaMemory, "kernels", kernels)
        engine = gpus.open(tiny_plan)
        assert engine.name.endswith("stitching on the CPU") is not kernels
        slots = engine.slots(depth)
        waiting = []
        shapes = [(n, h + h % 2, w + w % 2) for n, h, w in shapes]  # the network's stride is 2
        for i, (shape, slot) in enumerate(zip(shapes, itertools.cycle(slots), strict=False)):
            if len(waiting) == depth:
                first, batch = waiting.pop(0)
                engine.wait(first)
                check(first, batch)
            batch = images(*shape, seed=i)
            slot.wants = Wants(probabilities, logits)
            fill(slot, batch, i)
            engine.submit(slot)
            waiting.append((slot, batch))
        for slot, batch in waiting:
            engine.wait(slot)
            assert (slot.logits is not None) == (logits or not kernels)
            check(slot, batch)
        engine.close()
    cuda.check_nothing_left()
    assert cuda.library.graphs == 0 and gpus.lines == []


@pytest.mark.parametrize("missing", range(4))
def test_an_event_that_nobody_waits_for_is_found_out(gpus, tiny_plan, monkeypatch, missing):
    """The test above can fail: without one of the four waits, some order of the streams gives something else."""
    calls, wait = itertools.count(), PycudaMemory.wait

    def forget(memory, stream, event):
        if next(calls) % 4 != missing:
            wait(memory, stream, event)

    gpus.start()
    engine = gpus.open(tiny_plan)
    engine._most = 1  # so that a slot's buffers are used again within a batch
    monkeypatch.setattr(PycudaMemory, "wait", forget)
    (slot,) = engine.slots(1)
    found = 0
    for i in range(40):
        batch = images(4, 8, 8, i)
        fill(slot, batch, i)
        engine.submit(slot)
        engine.wait(slot)
        try:
            check(slot, batch)
        except AssertionError:
            found += 1
    assert found


def test_copies_do_not_come_back_as_logits_unless_they_are_wanted(gpus, tiny_plan):
    """A byte a pixel and the sums."""
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    fill(slot, images(4, 32, 32))
    engine.submit(slot)
    assert sum(region.size for region in cuda.gpus[0].pinned.values()) < 4 * 32 * 32 * (3 + 1) + 1024
    engine.wait(slot)
    engine.close()


# -- graphs ----------------------------------------------------------------------------------------


def run(engine, slot, *shape, seed=0):
    batch = images(*shape, seed=seed)
    fill(slot, batch, seed)
    engine.submit(slot)
    engine.wait(slot)
    check(slot, batch)


def test_a_shape_that_comes_again_becomes_a_graph(gpus, tiny_plan):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    calls = cuda.gpus[0].calls
    (slot,) = engine.slots(1)
    run(engine, slot, 2, 8, 8)
    assert (calls["launch"], calls["enqueue"]) == (0, 1)
    run(engine, slot, 2, 8, 8, seed=1)
    assert (calls["launch"], calls["enqueue"]) == (1, 3)  # once to settle the shape, once into the graph
    for seed in range(2, 6):
        run(engine, slot, 2, 8, 8, seed=seed)
    run(engine, slot, 1, 8, 8)
    assert (calls["launch"], calls["enqueue"]) == (5, 4)


def test_graphs_are_made_anew_when_their_memory_had_to_grow(gpus, tiny_plan):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    for side in (8, 16, 8, 64, 8, 16, 64):
        for seed in range(3):
            run(engine, slot, 1, side, side, seed=seed)
    assert cuda.library.graphs == 3
    engine.close()
    assert cuda.library.graphs == 0


def test_there_are_only_so_many_graphs_and_remembered_shapes(gpus, tiny_plan, monkeypatch):
    monkeypatch.setattr(gpu_module, "MAX_GRAPHS", 2)
    monkeypatch.setattr(gpu_module, "MAX_SEEN", 4)
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    for _ in range(3):
        for height in range(20, 2, -2):
            for seed in range(2):
                run(engine, slot, 1, height, 6, seed=seed)
    assert cuda.library.graphs == 2 and len(engine._network._seen) <= 4


@pytest.mark.parametrize("call", ["begin_capture", "end_capture", "instantiate"])
def test_without_graphs_it_goes_on(gpus, tiny_plan, call):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    cuda.gpus[0].faults[call] = 1
    (slot,) = engine.slots(1)
    for seed in range(4):
        run(engine, slot, 2, 8, 8, seed=seed)
    (line,) = gpus.lines
    assert line.startswith("going on without CUDA graphs: cu") and "not permitted" in line
    assert cuda.gpus[0].calls["launch"] == 0
    engine.close()
    cuda.check_nothing_left()


def test_no_memory_for_a_graph_is_no_lack_of_memory_for_a_tile(gpus, tiny_plan):
    """A graph has its own copy of the input; a batch without one fits as before."""
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    run(engine, slot, 1, 8, 8)
    cuda.gpus[0].memory = sum(region.size for region in cuda.gpus[0].device.values())
    for seed in range(1, 4):
        run(engine, slot, 1, 8, 8, seed=seed)
    (line,) = gpus.lines
    assert line.startswith("going on without CUDA graphs: CUDA failed on cuda:0 (cuMemAlloc failed: out of memory")
    engine.close()
    cuda.check_nothing_left()


# -- out of memory ---------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_says_so_and_goes_on(gpus, tiny_plan):
    """At the third batch, which is larger."""
    side, pixel = 32, 64 + 3 + 1 + 12  # scratch, input, classes, logits
    cuda = gpus.start(memory=side * side * pixel * 3)
    engine = gpus.open(tiny_plan)
    slots = engine.slots(3)
    for seed, (n, slot) in enumerate([(1, slots[0]), (2, slots[1]), (4, slots[2])]):
        fill(slot, images(n, side, side, seed), seed)
        engine.submit(slot)
    assert gpus.lines == ["cuda:0 is out of memory with 4 tiles in a batch; going on with 2"]
    for seed, (n, slot) in enumerate([(1, slots[0]), (2, slots[1]), (4, slots[2])]):
        engine.wait(slot)
        check(slot, images(n, side, side, seed))
    for seed in range(3):
        run(engine, slots[0], 4, side, side, seed=seed)
    engine.close()
    cuda.check_nothing_left()


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 5])
def test_out_of_memory_anywhere(gpus, tiny_plan, n, nth):
    """Whichever allocation it is, of the engine's or of a graph's."""
    cuda = gpus.start()
    engine = gpus.open(tiny_plan, batch=8)
    (slot,) = engine.slots(1)
    cuda.gpus[0].faults["mem_alloc"] = nth
    for seed in range(4):
        run(engine, slot, n, 8, 8, seed=seed)
    assert cuda.gpus[0].faults["mem_alloc"] == 0 or cuda.gpus[0].calls["mem_alloc"] < nth
    engine.close()
    cuda.check_nothing_left()


def test_one_tile_that_does_not_fit_is_an_error(gpus, tiny_plan):
    cuda = gpus.start(memory=100_000)
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    fill(slot, images(3, 64, 48))
    with pytest.raises(EngineError, match=r"cuda:0 has not the memory for one tile of 48x64 .*--tile"):
        engine.submit(slot)
    run(engine, slot, 2, 8, 8)  # a smaller one does fit
    engine.close()
    cuda.check_nothing_left()


def test_no_page_locked_memory_is_an_error(gpus, tiny_plan):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    cuda.gpus[0].faults["pagelocked_empty"] = 1
    with pytest.raises(EngineError, match="page-locked memory are to be had; use a smaller --batch"):
        slot.reshape(4, 1024, 1024)
    run(engine, slot, 2, 8, 8)
    engine.close()
    cuda.check_nothing_left()


def test_a_slot_that_could_not_grow_is_used_again(gpus, tiny_plan):
    """What it had is freed by then: nothing may point there."""
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    run(engine, slot, 4, 16, 16)
    cuda.gpus[0].faults["pagelocked_empty"] = 1
    with pytest.raises(EngineError, match="page-locked"):
        slot.reshape(8, 16, 16)
    assert slot.input.size == slot.cores.size == 0
    run(engine, slot, 2, 16, 16)
    engine.close()
    cuda.check_nothing_left()


# -- failures --------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_engine_takes_runs_in_parts(gpus, tiny_plan):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan, batch=5)
    (slot,) = engine.slots(1)
    run(engine, slot, 13, 8, 8)
    assert cuda.gpus[0].calls["stitch"] == 3


def test_a_tile_larger_than_the_engine_takes_is_an_error(gpus, tiny_plan):
    gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    slot.reshape(1, 8, 1130)
    with pytest.raises(EngineError, match="tiles of 2 to 1128 pixels a side, not 1130x8; use --tile 1128 or less"):
        engine.submit(slot)


@pytest.mark.parametrize("fault", ["no context", "no enqueue"])
def test_tensorrt_failing_is_an_error_with_its_reason(gpus, tiny_plan, fault):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    gpus.trt.faults.add(fault)
    (slot,) = engine.slots(1)
    fill(slot, images(1, 8, 8))
    with pytest.raises(EngineError, match=r"illegal memory access|Code 2: OutOfMemory") as caught:
        engine.submit(slot)
    assert str(caught.value).isprintable()
    engine.close()
    cuda.check_nothing_left()


def test_an_engine_that_tensorrt_does_not_take_is_an_error(gpus, tiny_plan):
    cuda = gpus.start()
    gpus.open(tiny_plan).close()
    gpus.trt.faults.add("deserialise returns None")
    with pytest.raises(EngineError, match=r"TensorRT 11.4.0.106 rejects the engine .*magicTag") as caught:
        gpus.open(tiny_plan)
    assert str(caught.value).isprintable() and "rejects" in gpus.lines[0]  # why the one in the cache is built anew
    cuda.check_nothing_left()


def test_a_device_that_fails_while_it_runs_is_an_error_and_closing_still_works(gpus, tiny_plan):
    cuda = gpus.start()
    engine = gpus.open(tiny_plan)
    (slot,) = engine.slots(1)
    fill(slot, images(1, 8, 8))
    engine.submit(slot)
    cuda.gpus[0].dead = "an illegal memory access was encountered"
    with pytest.raises(EngineError, match=r"CUDA failed on cuda:0 .*illegal memory access"):
        engine.wait(slot)
    with pytest.raises(EngineError, match=r"CUDA failed on cuda:0 .*illegal memory access"):
        engine.submit(slot)
    engine.close()
    assert cuda.stack == []


def test_the_kernels_errors_are_one_line(gpus, tiny_plan, monkeypatch):
    def fail(**_):
        raise RuntimeError("stitch: no kernel image is available\nfor execution on the device")

    gpus.start()
    engine = gpus.open(tiny_plan)
    monkeypatch.setattr(_core, "cuda_stitch", fail)
    (slot,) = engine.slots(1)
    fill(slot, images(1, 8, 8))
    with pytest.raises(EngineError, match=r"stitching failed .stitch: no kernel image is available for execution"):
        engine.submit(slot)


# -- slots and plans -------------------------------------------------------------------------------


def test_run_tiled_gives_the_logits_and_leaves_no_memory_behind(gpus, tiny_plan):
    with open_engine(tiny_plan, device="cpu", precision="fp32") as exact:

        def network(rgb):
            return np.stack([run_tiled(exact, tiny_plan, tile) for tile in rgb])

        cuda = gpus.start(network=network)
        engine = gpus.open(tiny_plan)
        before = len(cuda.gpus[0].pinned), len(cuda.gpus[0].device)
        image = images(1, 150, 131)[0]
        for tile in (64, 200):
            np.testing.assert_array_equal(
                run_tiled(engine, tiny_plan, image, tile), run_tiled(exact, tiny_plan, image, tile)
            )
        assert len(cuda.gpus[0].pinned) == before[0]
        engine.close()
        cuda.check_nothing_left()


def test_what_the_engine_says_of_itself(gpus, tiny_plan):
    gpus.start(2)
    with gpus.open(tiny_plan, "cuda:1") as engine:
        assert (engine.device, engine.precision) == ("cuda:1", "fp16")
        assert engine.name == "TensorRT 11.4.0.106 on NVIDIA H200"


def test_two_gpus_share_one_queue(gpus, tiny_plan):
    cuda = gpus.start(2)
    engine = gpus.open(tiny_plan, "cuda:1,0")
    assert (engine.device, engine.depth) == ("cuda:1,0", 2 * gpu_module.DEPTH)
    assert engine.name == "TensorRT 11.4.0.106 on NVIDIA H200"
    slots = engine.slots(5)
    for seed, slot in enumerate(slots):
        fill(slot, images(2, 8, 8, seed), seed)
        engine.submit(slot)
    for seed, slot in enumerate(slots):
        engine.wait(slot)
        check(slot, images(2, 8, 8, seed))
    assert [gpu.calls["stitch"] for gpu in cuda.gpus] == [2, 3]
    engine.close()
    cuda.check_nothing_left()
