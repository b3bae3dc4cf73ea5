"""The in-flight limit: its size in requests and bytes, priorities, and the order of waiters."""

from __future__ import annotations

import asyncio

import pytest

from brokers.protocol.messages import Priority
from brokers.protocol.stage_timing import Hop
from sources.client.inflight_limit import AdaptiveConcurrency, InflightLimit
from tests.support.brokers.broker_kinds import run_async


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


class Holders:
    """Tasks that acquire a slot each and hold it until they are released."""

    def __init__(self, limit: InflightLimit) -> None:
        self.limit = limit
        self.order: list[str] = []  # in which they got their slots
        self.tasks: list[asyncio.Task[None]] = []
        self._held: asyncio.Queue[asyncio.Event] = asyncio.Queue()

    async def start(self, *names: str, priority: Priority = "interactive", nbytes: int = 0) -> None:
        for name in names:
            self.tasks.append(asyncio.create_task(self._hold(name, priority, nbytes)))
        await settle()

    async def _hold(self, name: str, priority: Priority, nbytes: int) -> None:
        async with self.limit.slot(priority) as slot:
            slot.add_bytes(nbytes)
            self.order.append(name)
            released = asyncio.Event()
            self._held.put_nowait(released)
            await released.wait()

    async def release(self, count: int = 1) -> None:
        """Release the slots that were acquired first."""
        for _ in range(count):
            self._held.get_nowait().set()
            await settle()


def test_released_slot_goes_to_next_waiter() -> None:
    async def test() -> None:
        holders = Holders(InflightLimit(lambda: 2))
        await holders.start("a", "b", "c", "d", "e")
        assert holders.order == ["a", "b"]
        assert (holders.limit.in_flight, holders.limit.waiting) == (2, 3)
        await holders.release()
        assert holders.order == ["a", "b", "c"]
        await holders.release(4)
        assert holders.order == ["a", "b", "c", "d", "e"]
        assert (holders.limit.in_flight, holders.limit.waiting) == (0, 0)

    run_async(test())


def test_growing_limit_admits_waiters() -> None:
    async def test() -> None:
        size = 1
        holders = Holders(InflightLimit(lambda: size))
        await holders.start("a", "b", "c", "d", "e")
        size = 4
        holders.limit.wake_next()
        await settle()
        assert holders.order == ["a", "b", "c", "d"]
        await holders.release(5)

    run_async(test())


def test_interactive_requests_go_before_background_ones() -> None:
    async def test() -> None:
        holders = Holders(InflightLimit(lambda: 1))
        await holders.start("first")
        for name in "abCdE":
            await holders.start(name, priority="interactive" if name.isupper() else "background")
        await holders.release(6)
        assert holders.order == ["first", "C", "E", "a", "b", "d"]

    run_async(test())


def test_bytes_in_flight_are_bounded_and_oversized_request_goes_alone() -> None:
    async def test() -> None:
        holders = Holders(InflightLimit(lambda: 10, limit_bytes=100))
        await holders.start("large", nbytes=500)
        await holders.start("next")
        assert holders.order == ["large"]
        await holders.release()
        assert holders.order == ["large", "next"]
        await holders.release()
        assert holders.limit.nbytes == 0

    run_async(test())


def test_slot_is_released_when_its_holder_fails() -> None:
    async def test() -> None:
        limit = InflightLimit(lambda: 1)
        try:
            async with limit.slot() as slot:
                slot.add_bytes(7)
                raise ZeroDivisionError
        except ZeroDivisionError:
            assert (limit.in_flight, limit.nbytes) == (0, 0)

    run_async(test())


def test_cancelled_waiter_passes_its_turn_on() -> None:
    async def test() -> None:
        holders = Holders(InflightLimit(lambda: 1))
        await holders.start("holder", "cancelled", "next")
        holders._held.get_nowait().set()
        while not holders.limit._waiters.notified:  # noqa: ASYNC110 - woken, and not run yet
            await asyncio.sleep(0)
        holders.tasks[1].cancel()
        await settle()
        assert holders.order == ["holder", "next"]
        assert (holders.limit.in_flight, holders.limit.waiting) == (1, 0)
        await holders.release()

    run_async(test())


def test_waiters_are_served_in_order_of_arrival() -> None:
    """Although the limit is checked at other times, and requests arrive just as another one is woken."""

    async def test() -> None:
        holders = Holders(InflightLimit(lambda: 2))
        await holders.start(*"012345")
        for name in "6789":
            holders.limit.wake_next()  # there is no further slot
            await settle()
            holders._held.get_nowait().set()
            await holders.start(name)
        await holders.release(6)
        assert holders.order == list("0123456789")

    run_async(test())


def after_results(
    *stages_ms: float, workers: int = 1, way_back_ms: float = 2.0, queue_ms: float = 0.0
) -> AdaptiveConcurrency:
    concurrency = AdaptiveConcurrency(lambda stage: workers)
    hops = [Hop(str(index), "w", queue_ms=queue_ms, compute_ms=ms) for index, ms in enumerate(stages_ms)]
    for _ in range(50):
        concurrency.observe(hops, sum(stages_ms) + way_back_ms + queue_ms * len(stages_ms))
    return concurrency


@pytest.mark.parametrize(
    ("stages_ms", "limit"),
    [((100.0,), 2), ((100.0, 100.0, 100.0), 4), ((10.0, 100.0, 10.0), 2), ((50.0, 100.0, 50.0), 3)],
)
def test_limit_is_latency_over_slowest_stage_plus_one(stages_ms: tuple[float, ...], limit: int) -> None:
    assert after_results(*stages_ms).limit(10) == limit


def test_more_workers_raise_the_limit() -> None:
    assert after_results(100.0, workers=4).limit(10) == 5


def test_queueing_time_does_not_raise_the_limit() -> None:
    assert after_results(100.0, queue_ms=500.0).limit(10) == 2


def test_network_time_raises_the_limit_to_its_bound() -> None:
    assert after_results(100.0, way_back_ms=300.0).limit(10) == 5
    assert after_results(100.0, way_back_ms=3000.0).limit(10) == 10


def test_limit_before_first_result_is_the_bound() -> None:
    assert AdaptiveConcurrency(lambda stage: 1).limit(7) == 7
