"""Requests in flight: how many, how many bytes, and who goes next."""

from __future__ import annotations

import asyncio

from sources.client.inflight_limit import InflightLimit


async def settled() -> None:
    """Let everything that can go on go on."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_no_more_enter_than_there_is_room_for_and_each_that_leaves_lets_one_in() -> None:
    async def test() -> None:
        window = InflightLimit(lambda: 2)
        entering = [asyncio.create_task(window.acquire()) for _ in range(5)]
        await settled()
        assert [task.done() for task in entering] == [True, True, False, False, False]
        assert (window.in_flight, window.waiting) == (2, 3)
        window.release()
        await settled()
        assert [task.done() for task in entering] == [True, True, True, False, False]
        window.release()
        window.release()
        await settled()
        assert all(task.done() for task in entering)

    asyncio.run(test())


def test_a_window_that_grows_lets_all_in_that_it_has_room_for() -> None:
    async def test() -> None:
        size = 1
        window = InflightLimit(lambda: size)
        entering = [asyncio.create_task(window.acquire()) for _ in range(5)]
        await settled()
        size = 4
        window.wake_next()
        await settled()
        assert sum(task.done() for task in entering) == 4
        for task in entering:
            task.cancel()

    asyncio.run(test())


def test_what_somebody_waits_for_goes_before_what_nobody_does() -> None:
    async def test() -> None:
        window = InflightLimit(lambda: 1)
        await window.acquire()
        order: list[str] = []

        async def enter(name: str, *, urgent: bool) -> None:
            await window.acquire("interactive" if urgent else "background")
            order.append(name)
            window.release()

        tasks = [asyncio.create_task(enter(name, urgent=name.isupper())) for name in "abCdE"]
        await settled()
        window.release()
        await asyncio.gather(*tasks)
        assert order == ["C", "E", "a", "b", "d"]

    asyncio.run(test())


def test_bytes_in_flight_are_bounded_and_one_that_is_too_large_goes_alone() -> None:
    async def test() -> None:
        window = InflightLimit(lambda: 10, limit_bytes=100)
        await window.acquire()
        window.add_bytes(500)
        waiting = asyncio.create_task(window.acquire())
        await settled()
        assert not waiting.done()
        window.release(500)
        await settled()
        assert waiting.done()

    asyncio.run(test())


def test_one_that_gives_up_as_it_is_called_leaves_its_turn_to_the_next() -> None:
    async def test() -> None:
        window = InflightLimit(lambda: 1)
        await window.acquire()
        gives_up, stays = (asyncio.create_task(window.acquire()) for _ in range(2))
        await settled()
        window.release()  # calls the first, which is cancelled before it can go on
        gives_up.cancel()
        await settled()
        assert gives_up.cancelled()
        assert stays.done()
        assert (window.in_flight, window.waiting) == (1, 0)

    asyncio.run(test())


def test_nobody_overtakes_whatever_happens_meanwhile() -> None:
    """A window that is looked at each second, one that comes just as another is called: who came first goes first."""

    async def test() -> None:
        window = InflightLimit(lambda: 2)
        order: list[int] = []

        async def enter(number: int) -> None:
            await window.acquire()
            order.append(number)

        tasks = [asyncio.create_task(enter(number)) for number in range(6)]
        await settled()
        for number in range(6, 12):
            window.wake_next()  # there is no more room than before
            await settled()
            window.release()  # calls the next
            tasks.append(asyncio.create_task(enter(number)))
            await settled()
        for _ in range(6):
            window.release()
            await settled()
        assert order == list(range(12))

    asyncio.run(test())
