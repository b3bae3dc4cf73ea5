"""Writing to a store that is slow, fails or hangs: no caller waits, and nothing is lost while the queue has room."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from monitor.errors import BadStore
from monitor.stores import batch_writer
from monitor.stores.batch_writer import BatchWriter
from tests.support.pipelines.processes import eventually

DEADLINE_S = 60.0


class FakeStore:
    """Keeps items in memory; fails or hangs on request."""

    waiting = 0
    dropped = 0

    def __init__(self) -> None:
        self.items: list[int] = []
        self.fails = False
        self.unblocked = threading.Event()
        self.unblocked.set()
        self.close_count = 0

    def write(self, items: Sequence[int]) -> None:
        self.unblocked.wait(DEADLINE_S)
        if self.fails:
            raise BadStore("the store", "the disk is full")
        self.items += items

    def close(self) -> None:
        self.close_count += 1


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_INTERVAL_S", "_FIRST_RETRY_S", "_LONGEST_RETRY_S", "_RETRY_WHILE_STOPPING_S"):
        monkeypatch.setattr(batch_writer, name, 0.01)


def test_all_items_are_written_in_order_before_stop_returns() -> None:
    store = FakeStore()
    writer = BatchWriter(store, "the store")
    writer.start()
    for begin in range(0, 100_000, 1000):
        writer.add(range(begin, begin + 1000))
    writer.stop(DEADLINE_S)
    assert store.items == list(range(100_000))
    assert (writer.waiting, writer.dropped, store.close_count) == (0, 0, 1)


def test_failing_store_loses_only_what_exceeds_the_queue(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    store.fails = True
    writer = BatchWriter(store, "the store", queue_limit=100)
    writer.start()
    writer.add(range(150))
    eventually("a warning", lambda: caplog.messages)
    assert (writer.waiting, writer.dropped) == (100, 50)
    store.fails = False
    eventually("the items to be written", lambda: writer.waiting == 0)
    writer.stop(DEADLINE_S)
    assert store.items == list(range(100))
    assert caplog.messages == ["telemetry in the store: the disk is full; retrying, 100 points wait"]


def test_counts_include_those_of_the_store() -> None:
    store = FakeStore()
    store.waiting, store.dropped = 3, 4
    writer = BatchWriter(store, "the store", queue_limit=2)
    writer.add([1, 2, 3])
    assert (writer.waiting, writer.dropped) == (2 + 3, 1 + 4)
    writer.stop(0)


@pytest.mark.parametrize("hangs", [True, False])
def test_stop_gives_up_at_its_timeout(hangs: bool, caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    store.fails = True
    if hangs:
        store.unblocked.clear()
    writer = BatchWriter(store, "the store")
    writer.start()
    writer.add([1, 2, 3])
    writer.stop(0.1)
    store.unblocked.set()
    assert "the store did not accept the last 3 points" in caplog.messages[-1]


def test_writer_that_never_started_closes_its_store() -> None:
    store = FakeStore()
    BatchWriter(store, "the store").stop(1)
    assert store.close_count == 1


def test_items_that_a_store_cannot_hold_are_dropped(caplog: pytest.LogCaptureFixture) -> None:
    class PickyStore(FakeStore):
        def write(self, items: Sequence[int]) -> None:
            if -1 in items:
                raise OverflowError("too large")
            super().write(items)

    store = PickyStore()
    writer = BatchWriter(store, "the store")
    writer.start()
    writer.add([-1])
    eventually("the item to be dropped", lambda: writer.dropped == 1)
    writer.add([1, 2])
    writer.stop(DEADLINE_S)
    assert (store.items, writer.waiting, writer.dropped) == ([1, 2], 0, 1)
    assert "the store cannot store 1 points: dropped" in caplog.text


def test_writers_drain_at_the_same_time() -> None:
    slow, fast = FakeStore(), FakeStore()
    slow.unblocked.clear()
    writers = [BatchWriter(slow, "slow"), BatchWriter(fast, "fast")]
    for writer in writers:
        writer.start()
        writer.add([1])
        writer.drain(DEADLINE_S)
    eventually("the fast one", lambda: fast.close_count)
    assert (fast.items, slow.items) == ([1], [])
    slow.unblocked.set()
    for writer in writers:
        writer.stop(DEADLINE_S)
    assert slow.items == [1]
