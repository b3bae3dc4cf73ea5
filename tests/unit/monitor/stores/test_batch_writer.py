"""Points on their way to a store that is slow, fails, or hangs: nobody waits, nothing is lost while there is room."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from monitor.errors import BadStore
from monitor.stores import batch_writer as writers
from monitor.stores.batch_writer import BatchWriter
from tests.support.pipelines.processes import eventually


class Store:
    """Keeps what it is given, unless it shall fail or hang."""

    def __init__(self) -> None:
        self.kept: list[int] = []
        self.fails = False
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.closed = 0

    def write(self, points: Sequence[int]) -> None:
        self.goes_on.wait(30)
        if self.fails:
            raise BadStore("the store", "the disk is full")
        self.kept += points

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_EVERY_S", 0.02)
    monkeypatch.setattr(writers, "_FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(writers, "_LONGEST_WAIT_S", 0.02)


def test_all_is_written_in_order_before_the_end() -> None:
    store = Store()
    writer = BatchWriter(store, "the store")
    writer.start()
    for begin in range(0, 100_000, 1000):
        writer.add(range(begin, begin + 1000))
    writer.stop(10)
    assert store.kept == list(range(100_000))
    assert (writer.waiting, writer.dropped, writer.written, store.closed) == (0, 0, 100_000, 1)


def test_a_store_that_fails_for_a_while_loses_only_what_there_is_no_room_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = Store()
    store.fails = True
    writer = BatchWriter(store, "the store", queue_limit=100)
    writer.start()
    writer.add(range(150))
    eventually("a complaint", lambda: caplog.messages)
    assert (writer.waiting, writer.dropped) == (100, 50)
    store.fails = False
    eventually("the store to have them", lambda: writer.waiting == 0)
    writer.stop(10)
    assert store.kept == list(range(100))
    assert caplog.messages == ["telemetry in the store: the disk is full; it is tried again, 100 points wait"]


@pytest.mark.parametrize("trouble", ["hangs", "fails"])
def test_a_store_that_never_comes_back_ends_nothing_else(trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    if trouble == "hangs":
        store.goes_on.clear()
    store.fails = True
    writer = BatchWriter(store, "the store")
    writer.start()
    writer.add([1, 2, 3])
    writer.stop(0.2)
    store.goes_on.set()
    assert "the store did not take the last 3 points" in caplog.messages[-1]


def test_one_that_was_never_started_closes_its_store() -> None:
    store = Store()
    BatchWriter(store, "the store").stop(1)
    assert store.closed == 1


def test_what_a_store_can_make_nothing_of_is_dropped_and_holds_up_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Picky(Store):
        def write(self, points: Sequence[int]) -> None:
            if -1 in points:
                raise OverflowError("too large to keep")
            super().write(points)

    store = Picky()
    writer = BatchWriter(store, "the store")
    writer.start()
    writer.add([-1])
    eventually("the end of it", lambda: writer.dropped == 1)
    writer.add([1, 2])
    writer.stop(10)
    assert (store.kept, writer.waiting, writer.dropped, writer.written) == ([1, 2], 0, 1, 2)
    assert "the store cannot take 1 points" in caplog.text


def test_two_stores_that_are_told_to_leave_at_once_have_the_same_time() -> None:
    slow, quick = Store(), Store()
    slow.goes_on.clear()
    writers_of_both = [BatchWriter(slow, "slow"), BatchWriter(quick, "quick")]
    for writer in writers_of_both:
        writer.start()
        writer.add([1])
        writer.drain(5)
    eventually("the quick one", lambda: quick.closed)
    assert (quick.kept, slow.kept) == ([1], [])
    slow.goes_on.set()
    for writer in writers_of_both:
        writer.stop(5)
    assert slow.kept == [1]
