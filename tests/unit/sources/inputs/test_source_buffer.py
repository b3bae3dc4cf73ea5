"""The sample buffer: every sample in order, or the newest of each source; always bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal

import pytest

from brokers.protocol.messages import JSON
from sources.inputs import source as source_module
from sources.inputs.source import Sample, SampleBuffer


def sample(index: int, source: str = "a", ack: Callable[[], None] | None = None) -> Sample:
    return Sample(source, index, b"1", JSON, ack=ack)


def run(keep: Literal["all", "latest"], test: Callable[[SampleBuffer], Awaitable[None]]) -> SampleBuffer:
    async def main() -> SampleBuffer:
        buffer = SampleBuffer(keep)
        await asyncio.wait_for(test(buffer), 60)
        return buffer

    return asyncio.run(main())


async def drain(buffer: SampleBuffer) -> list[tuple[str, int]]:
    received = []
    while (taken := await buffer.get()) is not None:
        received.append((taken.source, taken.index))
    return received


def test_samples_come_out_in_order() -> None:
    async def test(buffer: SampleBuffer) -> None:
        for index in range(5):
            buffer.put_nowait(sample(index))
        buffer.close()
        assert await drain(buffer) == [("a", index) for index in range(5)]

    assert run("all", test).dropped.total() == 0


def test_samples_with_one_index_are_all_kept() -> None:
    async def test(buffer: SampleBuffer) -> None:
        for _ in range(3):
            buffer.put_nowait(sample(0))
        buffer.close()
        assert await drain(buffer) == [("a", 0)] * 3

    assert run("all", test).dropped.total() == 0


def test_put_waits_until_the_buffer_is_empty() -> None:
    async def test(buffer: SampleBuffer) -> None:
        await buffer.put(sample(0))
        second = asyncio.create_task(buffer.put(sample(1)))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not second.done()
        assert (await buffer.get()) is not None
        await second
        buffer.close()
        assert await drain(buffer) == [("a", 1)]

    run("all", test)


def test_newest_sample_replaces_older_one_of_its_source() -> None:
    async def test(buffer: SampleBuffer) -> None:
        for index in range(4):
            await buffer.put(sample(index))
        buffer.close()
        assert await drain(buffer) == [("a", 3)]

    assert run("latest", test).dropped == {"superseded": 3}


def test_fast_source_does_not_starve_a_slow_one() -> None:
    async def test(buffer: SampleBuffer) -> None:
        for source, index in (("fast", 0), ("slow", 0), ("fast", 1), ("fast", 2)):
            buffer.put_nowait(sample(index, source))
        buffer.close()
        assert await drain(buffer) == [("fast", 2), ("slow", 0)]

    run("latest", test)


@pytest.mark.parametrize(("name", "limit"), [("BACKLOG_LIMIT", 3), ("BACKLOG_LIMIT_BYTES", 3)])
def test_full_backlog_drops_its_oldest_sample(monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(source_module, name, limit)

    async def test(buffer: SampleBuffer) -> None:
        for index in range(5):
            buffer.put_nowait(sample(index))
        buffer.close()
        assert await drain(buffer) == [("a", 2), ("a", 3), ("a", 4)]

    assert run("all", test).dropped == {"backlog_full": 2}


def test_samples_that_await_acknowledgement_are_never_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "BACKLOG_LIMIT", 1)

    async def test(buffer: SampleBuffer) -> None:
        for index in range(4):
            buffer.put_nowait(sample(index, ack=(lambda: None) if index < 2 else None))
        buffer.close()
        assert await drain(buffer) == [("a", 0), ("a", 1), ("a", 3)]

    assert run("all", test).dropped == {"backlog_full": 1}


def test_close_wakes_consumer_and_producer() -> None:
    async def test(buffer: SampleBuffer) -> None:
        consumer = asyncio.create_task(buffer.get())
        await asyncio.sleep(0)
        buffer.close()
        assert await consumer is None
        await buffer.put(sample(0))
        await buffer.put(sample(1))  # returns, although the first was not taken

    run("all", test)
