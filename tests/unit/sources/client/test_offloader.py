"""The offloader against a scripted worker, over the in-memory broker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.errors import BadPayload, DeadlinePassed, Disconnected, RequestFailed, UsageError
from brokers.protocol.messages import Failure, Message, Result, Task, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.stage_timing import Hop
from sources import Offloader
from sources.client.offloader import PREFETCH_PER_WORKER
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport
from tests.support.brokers.presence_records import make_worker_record
from tests.support.errors import raises_error
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

Respond = Callable[[Task], Result | Failure | None]


def succeed(task: Task) -> Result:
    return Result(request_id=task.request_id, content=task.content, attempt=task.attempt, hops=(Hop("head", "w"),))


def fail(task: Task, error: str = "ValueError", *, retry: bool = False) -> Failure:
    return Failure(
        request_id=task.request_id,
        stage="head",
        worker="w",
        error=error,
        reason="the reason",
        attempt=task.attempt,
        retry=retry,
    )


def refuse(task: Task) -> Failure:
    return fail(task, "Busy", retry=True)


def ignore(task: Task) -> None:
    """Never respond."""


class ScriptedWorker:
    """A worker of the first stage that responds to each task as `respond` says."""

    def __init__(self, hub: MemoryBroker, respond: Respond, capacity: int) -> None:
        self.tasks: list[Task] = []
        self.arrived = asyncio.Event()  # a task
        self._channel = MessageChannel(MemoryTransport(hub))
        self._respond = respond
        self._record = make_worker_record("w", pipeline="test", capacity=capacity)
        self._sending: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        await self._channel.open()
        await self._channel.subscribe(f"sparse/local/test/head/in/{self._record.worker}", self._on_message)
        await self._channel.transport.publish(self._record.topic, self._record.to_bytes(), qos=1, retain=True)

    def _on_message(self, topic: str, message: Message) -> None:
        assert isinstance(message, Task)
        self.tasks.append(message)
        self.arrived.set()
        if response := self._respond(message):
            self._sending.append(asyncio.create_task(self._channel.send(message.reply_to.topic, response)))

    async def stop(self) -> None:
        await asyncio.gather(*self._sending)
        await self._channel.close()


def with_worker(
    folder: Path,
    respond: Respond,
    test: Callable[[Offloader, ScriptedWorker], Coroutine[Any, Any, None]],
    *,
    capacity: int = 2,
    **options: Any,
) -> None:
    """Run a test with an offloader and a worker that is up."""

    async def main() -> None:
        hub = MemoryBroker()
        worker = ScriptedWorker(hub, respond, capacity)
        await worker.start()
        pipeline = load_pipeline(write_pipeline_file(folder, [stage_table("head", "double")]))
        async with Offloader(pipeline, transport=MemoryTransport(hub), **options) as offload:
            await test(offload, worker)
        await worker.stop()

    run_async(main())


def test_request_returns_its_result_latency_and_attempts(tmp_path: Path) -> None:
    responses: list[Callable[[Task], Result | Failure]] = [refuse, refuse, succeed, succeed]

    def respond(task: Task) -> Result | Failure:
        return responses.pop(0)(task)

    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        request = await offload.request(TensorContent({"x": from_array(2.0)}), source="door")
        assert isinstance(request.result.content, TensorContent)
        assert [task.attempt for task in worker.tasks] == [1, 2, 3]
        assert {task.source for task in worker.tasks} == {"door"}
        assert request.attempt == 3
        assert request.latency_ms >= 150  # two delays of the back-off
        assert [hop.stage for hop in request.result.hops] == ["head"]
        assert offload.retries_by_reason == {"Busy": 2}
        assert (await offload(np.array(3.0))).item() == 3.0

    with_worker(tmp_path, respond, test)


def test_values_come_back_in_the_library_they_came_in(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        assert isinstance(await offload(np.array([1.0, 2.0])), np.ndarray)
        assert set(await offload({"a": np.array(1), "b": np.array(2)})) == {"a", "b"}
        with pytest.raises(BadPayload, match="expected arrays"):
            await offload("text")

    with_worker(tmp_path, succeed, test)


def test_deadline_passes_while_worker_is_full(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        with pytest.raises(DeadlinePassed):
            await offload(np.array(1.0), deadline_ms=120)
        assert offload.failures_by_error == {"DeadlinePassed": 1}

    with_worker(tmp_path, refuse, test)


def test_deadline_passes_while_request_waits_for_a_slot(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        async with offload.slot():
            with pytest.raises(DeadlinePassed) as caught:
                await offload(np.array(1.0), deadline_ms=10)
            assert caught.value.fields["where"] == "the source, while it waited for a slot"
        assert worker.tasks == []
        assert offload.inflight_limit.in_flight == 0

    with_worker(tmp_path, succeed, test, window=1)


def test_request_in_a_held_slot_needs_no_other(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        async with offload.slot() as slot:
            await offload.request(TensorContent({"x": from_array(1.0)}), slot=slot)
            assert (offload.inflight_limit.in_flight, slot.nbytes) == (1, 8)
        assert (offload.inflight_limit.in_flight, offload.inflight_limit.nbytes) == (0, 0)

    with_worker(tmp_path, succeed, test, window=1)


def test_long_deadline_is_not_cut_to_the_wait_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.client.offloader.WORKER_WAIT_S", 0.0)

    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        assert (await offload(np.array(2.0), deadline_ms=60_000)).item() == 2.0

    with_worker(tmp_path, succeed, test)


def test_timeout_of_the_transport_is_no_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def time_out(*arguments: object, **options: object) -> None:
        raise TimeoutError("the socket timed out")

    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        monkeypatch.setattr(offload._first_stage, "send", time_out)
        for deadline_ms in (None, 60_000.0):
            with pytest.raises(TimeoutError, match="the socket timed out"):
                await offload(np.array(1.0), deadline_ms=deadline_ms)

    with_worker(tmp_path, succeed, test)


def test_abort_ends_requests_in_flight(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        pending = asyncio.create_task(offload(np.array(1.0)))
        await worker.arrived.wait()
        await offload.abort("the test ends")
        with pytest.raises(Disconnected, match="the test ends"):
            await pending
        with pytest.raises(Disconnected):
            await offload(np.array(1.0))

    with_worker(tmp_path, ignore, test)


def test_failure_of_a_stage_is_raised(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        with pytest.raises(RequestFailed) as caught:
            await offload(np.array(1.0))
        assert (caught.value.stage, caught.value.error, caught.value.reason) == ("head", "ValueError", "the reason")
        assert offload.failures_by_error == {"ValueError": 1}

    with_worker(tmp_path, fail, test)


def test_late_result_of_an_earlier_attempt_is_a_duplicate(tmp_path: Path) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        await offload(np.array(1.0))
        task = worker.tasks[0]
        await worker._channel.send(task.reply_to.topic, succeed(task))
        async with asyncio.timeout(WAIT_S):
            while not offload.counters["duplicates"]:  # noqa: ASYNC110 - a counter has no event
                await asyncio.sleep(0)
        assert offload.counters["results"] == 1

    with_worker(tmp_path, succeed, test)


@pytest.mark.parametrize(
    ("options", "window"), [({}, 5 + PREFETCH_PER_WORKER), ({"live": True}, 6), ({"window": 3}, 3)]
)
def test_window_follows_workers_unless_it_is_fixed(tmp_path: Path, options: dict[str, Any], window: int) -> None:
    async def test(offload: Offloader, worker: ScriptedWorker) -> None:
        assert offload.inflight_limit.limit == window

    with_worker(tmp_path, succeed, test, capacity=7, **options)  # a batch of 5, and 2 on their way


def test_missing_broker_address_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_BROKER", raising=False)
    with raises_error(UsageError, "NoBroker"):
        Offloader(write_pipeline_file(tmp_path, [stage_table("head", "double")]))
