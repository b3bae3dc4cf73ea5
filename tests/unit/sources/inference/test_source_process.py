"""A source's generator in its own thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Literal

import pytest

from brokers.protocol.messages import JSON
from sources.inference.source_process import feed_from_source
from sources.inputs.source import Sample, SampleBuffer, Source
from tests.support.brokers.broker_kinds import WAIT_S


def samples(count: int) -> Iterator[Sample]:
    for index in range(count):
        yield Sample("fake", index, b"1", JSON)


class FakeSource(Source):
    def __init__(self, generate: Callable[[], Iterator[Sample]], live: bool = False) -> None:
        self.name = "fake"
        self.live = live
        self.closed = False
        self._generate = generate

    def samples(self) -> Iterator[Sample]:
        return self._generate()

    def close(self) -> None:
        self.closed = True


def run(source: FakeSource, keep: Literal["all", "latest"] = "all", limit: int | None = None) -> list[int]:
    """Run a source to its end; return the indices of the samples that a consumer received."""

    async def main() -> list[int]:
        buffer = SampleBuffer(keep)
        received: list[int] = []
        running = asyncio.create_task(feed_from_source(source, buffer, asyncio.Event(), limit))
        while (sample := await asyncio.wait_for(buffer.get(), WAIT_S)) is not None:
            received.append(sample.index)
        await running
        return received

    return asyncio.run(main())


@pytest.mark.parametrize(("limit", "count"), [(None, 50), (7, 7)])
def test_all_samples_up_to_the_limit_arrive_and_the_source_is_closed(limit: int | None, count: int) -> None:
    source = FakeSource(lambda: samples(50))
    assert run(source, limit=limit) == list(range(count))
    assert source.closed


def test_live_source_does_not_wait_for_its_consumer() -> None:
    received = run(FakeSource(lambda: samples(200), live=True), "latest")
    assert received[-1] == 199
    assert received == sorted(set(received))


def test_error_of_the_generator_is_raised() -> None:
    def generate() -> Iterator[Sample]:
        yield from samples(2)
        raise ValueError("the file is damaged")

    source = FakeSource(generate)
    with pytest.raises(ValueError, match="the file is damaged"):
        run(source)
    assert source.closed


def test_generator_runs_in_a_thread_named_after_its_source() -> None:
    names: list[str] = []

    def generate() -> Iterator[Sample]:
        names.append(threading.current_thread().name)
        yield from samples(1)

    run(FakeSource(generate))
    assert names == ["source-fake"]


def test_shutdown_closes_a_source_that_blocks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sources.inference.source_process._CLOSE_TIMEOUT_S", 0.01)
    go_on = threading.Event()

    def generate() -> Iterator[Sample]:
        go_on.wait(WAIT_S)
        yield from samples(0)

    async def main() -> None:
        shutdown = asyncio.Event()
        shutdown.set()
        await feed_from_source(source, SampleBuffer("all"), shutdown)

    source = FakeSource(generate)
    asyncio.run(main())
    go_on.set()
    assert source.closed
    assert "did not end" in caplog.text
