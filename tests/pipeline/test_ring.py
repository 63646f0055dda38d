"""The ring of batch slots: bounded, ordered, and never waiting on itself."""

from __future__ import annotations

import threading

import pytest
from running import PATIENCE, FakeEngine

from histoseg_fast.errors import EngineError
from histoseg_fast.pipeline.ring import Ring, Stopped, Tile


def tile(row: int) -> Tile:
    return Tile(None, row, 0, (0, 1, 2 + row, 3))


def test_places_of_one_batch_share_a_slot_and_it_is_submitted_when_all_are_filled() -> None:
    engine = FakeEngine()
    ring = Ring(engine, depth=2, batch=2)
    first, second = ring.take((4, 6)), ring.take((4, 6))
    assert first[0] is second[0] and (first[1], second[1]) == (0, 1)
    assert first[2].shape == (4, 6, 3) and first[2].base is not None
    ring.fill(second[0], 1, tile(1))
    assert engine.submits == 0
    ring.fill(first[0], 0, tile(0))
    assert engine.submits == 1
    batch = ring.next()
    assert [t.row for t in batch.tiles] == [0, 1]
    assert batch.slot.cores.tolist() == [[0, 1, 2, 3], [0, 1, 3, 3]]


def test_batches_come_in_the_order_of_their_places_not_of_their_filling() -> None:
    """A slow reader in the first batch must not let the next batch, of the same image, go ahead."""
    engine = FakeEngine()
    ring = Ring(engine, depth=3, batch=2)
    slow, quick = ring.take((4, 4)), ring.take((4, 4))
    ring.fill(quick[0], quick[1], tile(0))
    for row in (1, 2):
        batch, index, _ = ring.take((4, 4))
        ring.fill(batch, index, tile(row))
    assert engine.submits == 0
    ring.fill(slow[0], slow[1], None)
    ring.finish()
    order = []
    while (batch := ring.next()) is not None:
        order += [t.row for t in batch.tiles if t is not None]
        ring.release(batch)
    assert order == [0, 1, 2]


def test_another_shape_closes_the_batch_and_only_its_filled_places_run() -> None:
    ring = Ring(FakeEngine(), depth=2, batch=8)
    for shape, row in (((4, 4), 0), ((4, 4), 1), ((6, 4), 2)):
        batch, index, _ = ring.take(shape)
        ring.fill(batch, index, tile(row))
    batch = ring.next()
    assert batch.slot.input.shape == (2, 4, 4, 3) and len(batch.tiles) == len(batch.slot.cores) == 2
    ring.finish()
    assert ring.next().slot.input.shape == (1, 6, 4, 3)


def test_take_waits_while_every_slot_is_in_use_and_goes_on_after_a_release() -> None:
    ring = Ring(FakeEngine(), depth=1, batch=1)
    batch, index, _ = ring.take((4, 4))
    ring.fill(batch, index, tile(0))
    got = threading.Event()
    waiter = threading.Thread(target=lambda: (ring.take((4, 4)), got.set()), daemon=True)
    waiter.start()
    assert not got.wait(0.2)
    ring.release(ring.next())
    assert got.wait(PATIENCE)
    waiter.join(PATIENCE)


def test_while_the_engine_takes_a_batch_others_are_filled_and_follow_in_order() -> None:
    """Readers must not wait for a GPU's queue; nor may what they fill meanwhile go ahead, or be forgotten."""
    entered, leave = threading.Event(), threading.Event()

    def hold(call: int) -> None:
        if call == 1:
            entered.set()
            assert leave.wait(PATIENCE)

    ring = Ring(FakeEngine(on_submit=hold), depth=4, batch=2)

    def put(row: int) -> None:
        batch, index, _ = ring.take((4, 4))
        ring.fill(batch, index, tile(row))

    put(0)
    submitter = threading.Thread(target=put, args=(1,), daemon=True)
    submitter.start()
    assert entered.wait(PATIENCE)
    others = threading.Thread(target=lambda: [put(row) for row in (2, 3, 4)], daemon=True)
    others.start()
    others.join(PATIENCE)
    assert not others.is_alive() and submitter.is_alive()
    ring.finish()
    leave.set()
    submitter.join(PATIENCE)
    order = []
    while (batch := ring.next()) is not None:
        order.append([t.row for t in batch.tiles if t is not None])
        ring.release(batch)
    assert order == [[0, 1], [2, 3], [4]]


def test_a_ring_that_is_stopped_while_the_engine_takes_a_batch_waits_for_that_batch_and_submits_no_more() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold(call: int) -> None:
        entered.set()
        assert leave.wait(PATIENCE)

    engine = FakeEngine(on_submit=hold)
    ring = Ring(engine, depth=2, batch=1)

    def put(row: int) -> None:
        batch, index, _ = ring.take((4, 4))
        ring.fill(batch, index, tile(row))

    submitter = threading.Thread(target=put, args=(0,), daemon=True)
    submitter.start()
    assert entered.wait(PATIENCE)
    put(1)
    ring.stop()
    leave.set()
    submitter.join(PATIENCE)
    ring.drain()
    assert (engine.submits, engine.waits) == (1, 1)


@pytest.mark.parametrize("wait", ["take", "next"])
def test_stop_wakes_who_waits(wait: str) -> None:
    ring = Ring(FakeEngine(), depth=1, batch=1)
    if wait == "take":
        ring.take((4, 4))
    raised = threading.Event()

    def work() -> None:
        try:
            ring.take((4, 4)) if wait == "take" else ring.next()
        except Stopped:
            raised.set()

    waiter = threading.Thread(target=work, daemon=True)
    waiter.start()
    ring.stop()
    assert raised.wait(PATIENCE)
    waiter.join(PATIENCE)


def test_drain_waits_for_every_submitted_batch_and_hides_no_earlier_error() -> None:
    def fail(call: int) -> None:
        raise EngineError("gone") if call == 1 else RuntimeError("gone too")

    engine = FakeEngine(on_wait=fail)
    ring = Ring(engine, depth=2, batch=1)
    for row in range(2):
        batch, index, _ = ring.take((4, 4))
        ring.fill(batch, index, tile(row))
    ring.stop()
    ring.drain()
    assert engine.waits == 2
