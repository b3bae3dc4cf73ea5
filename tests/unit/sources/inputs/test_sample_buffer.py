"""Samples that wait: all of them, or the newest of each source; never a backlog without end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest

from brokers.protocol.messages import JSON
from sources.inputs import sample_buffer as module
from sources.inputs.sample import Sample
from sources.inputs.sample_buffer import SampleBuffer


def sample(index: int, source: str = "a") -> Sample:
    return Sample(source, index, b"1", JSON)


def run(keep: Literal["all", "latest"], play: Callable[[SampleBuffer], Awaitable[None]]) -> SampleBuffer:
    async def main() -> SampleBuffer:
        intake = SampleBuffer(keep)
        await asyncio.wait_for(play(intake), 10)
        return intake

    return asyncio.run(main())


async def drain(intake: SampleBuffer) -> list[tuple[str, int]]:
    taken = []
    while (found := await intake.get()) is not None:
        taken.append((found.source, found.index))
    return taken


def test_all_are_given_out_in_order() -> None:
    async def play(intake: SampleBuffer) -> None:
        for index in range(5):
            intake.put_nowait(sample(index))
        intake.close()
        assert await drain(intake) == [("a", index) for index in range(5)]

    assert run("all", play).dropped.total() == 0


def test_a_source_that_can_wait_waits() -> None:
    async def play(intake: SampleBuffer) -> None:
        await intake.put(sample(0))
        second = asyncio.create_task(intake.put(sample(1)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        assert (await intake.get()) is not None
        await second
        intake.close()
        assert await drain(intake) == [("a", 1)]

    run("all", play)


def test_the_newest_takes_the_place_of_the_older_and_is_counted() -> None:
    async def play(intake: SampleBuffer) -> None:
        for index in range(4):
            await intake.put(sample(index))
        intake.close()
        assert await drain(intake) == [("a", 3)]

    assert run("latest", play).dropped == {"superseded": 3}


def test_no_source_starves_another() -> None:
    """A fast source keeps the place in the queue that its first sample had, and no second one."""

    async def play(intake: SampleBuffer) -> None:
        for source, index in (("fast", 0), ("slow", 0), ("fast", 1), ("fast", 2)):
            intake.put_nowait(sample(index, source))
        intake.close()
        assert await drain(intake) == [("fast", 2), ("slow", 0)]

    run("latest", play)


def test_a_backlog_is_bounded_and_loses_its_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKLOG_LIMIT", 3)

    async def play(intake: SampleBuffer) -> None:
        for index in range(5):
            intake.put_nowait(sample(index))
        intake.close()
        assert await drain(intake) == [("a", 2), ("a", 3), ("a", 4)]

    assert run("all", play).dropped == {"backlog_full": 2}


def test_the_end_wakes_both_who_takes_and_who_puts() -> None:
    async def play(intake: SampleBuffer) -> None:
        taking = asyncio.create_task(intake.get())
        await asyncio.sleep(0)
        intake.close()
        assert await taking is None
        await intake.put(sample(0))
        await intake.put(sample(1))  # returns, although nobody has taken the first

    run("all", play)
