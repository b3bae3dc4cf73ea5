"""From samples to published and recorded results, with a scripted offloader."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import DeadlinePassed, Disconnected, RequestFailed
from brokers.protocol.messages import JSON, BinaryContent, Content, Result, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.stage_timing import Hop
from brokers.protocol.transport import Properties
from sources.client.inflight_limit import InflightLimit
from sources.client.offloader import Offloader
from sources.client.pending_request import PendingRequest
from sources.inference.inference_run import InferenceRun
from sources.inputs.source import Sample, SampleBuffer
from tests.support.brokers.broker_kinds import WAIT_S, run_async
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

Script = Callable[[int], Any]
Record = Callable[[Sample, dict[str, Any]], None]


class ScriptedOffloader:
    """Responds to the sample with payload `N` as `script(N)` says: a content, or an error to raise.

    None: respond when the test sets `go`.
    """

    def __init__(self, folder: Path, script: Script, window: int = 3) -> None:
        self.pipeline = load_pipeline(write_pipeline_file(folder, [stage_table("one", "double")]))
        self.inflight_limit = InflightLimit(lambda: window)
        self.slot = self.inflight_limit.slot
        self.channel = self.transport = self
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.in_flight = self.most_in_flight = 0
        self.full = asyncio.Event()
        self.go = asyncio.Event()
        self._script = script
        self._window = window

    async def publish(self, topic: str, payload: bytes, properties: Properties, *, qos: int) -> None:
        assert (properties.content_type, qos) == (JSON, 1)
        self.published.append((topic, json.loads(payload)))

    async def request(self, content: Content, *, source: str, slot: object, parent: object) -> PendingRequest:
        assert isinstance(content, BinaryContent)
        number = int(bytes(content.data))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        if self.in_flight == self._window:
            self.full.set()
        response = self._script(number)
        if response is None:
            await self.go.wait()
            response = tensor(number)
        for _ in range(1 if number % 2 else 100):  # so that requests do not finish in order
            await asyncio.sleep(0)
        self.in_flight -= 1
        if isinstance(response, Exception):
            raise response
        request = PendingRequest(content, source, request_id=b"r" * 16, attempt=1, latency_ms=20.0)
        request.result = Result(request_id=b"r" * 16, content=response, hops=(Hop("one", "w", compute_ms=5.0),))
        return request


def tensor(number: int) -> TensorContent:
    return TensorContent({"x": from_array(float(number))})


def samples(count: int, ack: Callable[[], None] | None = None) -> list[Sample]:
    return [Sample("door", index, str(index).encode(), JSON, ack=ack) for index in range(count)]


def make_run(
    offloader: ScriptedOffloader, inputs: list[Sample], record: Record, keep: Literal["all", "latest"] = "all"
) -> InferenceRun:
    buffer = SampleBuffer(keep)
    for sample in inputs:
        buffer.put_nowait(sample)
    buffer.close()
    return InferenceRun(cast(Offloader, offloader), buffer, record)


def run_samples(
    folder: Path, script: Script, inputs: list[Sample], record: Record | None = None
) -> tuple[ScriptedOffloader, InferenceRun, list[dict[str, Any]]]:
    """Run all samples; return the offloader, the run, and the results that were recorded."""
    recorded: list[dict[str, Any]] = []

    async def main() -> tuple[ScriptedOffloader, InferenceRun]:
        offloader = ScriptedOffloader(folder, script)
        run = make_run(offloader, inputs, record or (lambda sample, result: recorded.append(result)))
        await asyncio.wait_for(run.run(), WAIT_S)
        return offloader, run

    return (*asyncio.run(main()), recorded)


def test_results_are_recorded_in_order_and_published_as_they_come(tmp_path: Path) -> None:
    offloader, run, recorded = run_samples(tmp_path, tensor, samples(30))
    assert [result["index"] for result in recorded] == list(range(30))
    assert {topic for topic, _ in offloader.published} == {"sparse/local/results/door"}
    published = [result["index"] for _, result in offloader.published]
    assert sorted(published) == list(range(30))
    assert published != list(range(30))
    assert (run.stats.requests, run.stats.results) == (30, 30)
    assert offloader.most_in_flight == 3
    assert offloader.inflight_limit.in_flight == 0


def test_window_larger_than_the_record_queue_is_filled(tmp_path: Path) -> None:
    async def test() -> None:
        offloader = ScriptedOffloader(tmp_path, lambda _: None, window=100)
        running = asyncio.create_task(make_run(offloader, samples(150), lambda sample, result: None).run())
        await asyncio.wait_for(offloader.full.wait(), WAIT_S)
        offloader.go.set()
        await running
        assert offloader.most_in_flight == 100

    run_async(test())


def test_live_results_are_recorded_as_they_come(tmp_path: Path) -> None:
    recorded: list[str] = []

    async def test() -> None:
        offloader = ScriptedOffloader(tmp_path, lambda number: None if number == 0 else tensor(number))

        def record(sample: Sample, result: dict[str, Any]) -> None:
            recorded.append(sample.source)
            loop.call_soon_threadsafe(offloader.go.set)

        loop = asyncio.get_running_loop()
        inputs = [Sample(source, 0, str(number).encode(), JSON) for number, source in enumerate(("slow", "fast"))]
        await asyncio.wait_for(make_run(offloader, inputs, record, keep="latest").run(), WAIT_S)

    run_async(test())
    assert recorded == ["fast", "slow"]


def test_cancelled_run_releases_its_slots(tmp_path: Path) -> None:
    async def test() -> None:
        offloader = ScriptedOffloader(tmp_path, lambda _: None)
        running = asyncio.create_task(make_run(offloader, samples(10), lambda sample, result: None).run())
        await asyncio.wait_for(offloader.full.wait(), WAIT_S)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert offloader.inflight_limit.in_flight == 0

    run_async(test())


def test_result_has_these_fields(tmp_path: Path) -> None:
    _, _, (result,) = run_samples(tmp_path, tensor, samples(1))
    assert result.pop("age_ms") >= 0
    assert result == {
        "source": "door",
        "index": 0,
        "pipeline": "test",
        "request": b"r".hex() * 16,
        "values": {"x": 0.0},
        "latency_ms": 20.0,
        "attempts": 1,
        "time": {
            "stages": [
                {"stage": "one", "worker": "w", "queue_ms": 0.0, "decode_ms": 0.0, "compute_ms": 5.0, "encode_ms": 0.0}
            ],
            "network_ms": 15.0,
        },
        "dropped": 0,
    }


def test_each_failure_is_a_result_with_its_error(tmp_path: Path) -> None:
    responses: list[Any] = [
        RequestFailed("ab", "tail", "w1", "BadPayload", "no picture"),
        DeadlinePassed("cd", 50.0, "the source"),
        TensorContent({"x": from_array(1.0)}, {"format": "detections"}),  # metadata that does not fit the tensors
        TensorContent({"x": from_array(1.0)}),
    ]
    _, run, recorded = run_samples(tmp_path, responses.__getitem__, samples(4))
    failed, late, malformed, succeeded = recorded
    assert {key: failed[key] for key in ("request", "error", "stage", "worker", "reason")} == {
        "request": "ab", "error": "BadPayload", "stage": "tail", "worker": "w1", "reason": "no picture",
    }  # fmt: skip
    assert (late["request"], late["error"]) == ("cd", "DeadlinePassed")
    assert malformed["error"] == "BadPayload"
    assert "error" not in succeeded
    summary = run.stats.summary()
    assert summary["failures"] == {"BadPayload": 2, "DeadlinePassed": 1}
    assert (summary["requests"], summary["results"], summary["lost"]) == (4, 1, 0)


@pytest.mark.parametrize(
    ("response", "acknowledged"),
    [
        (tensor(0), True),
        (DeadlinePassed("cd", 50.0, "the source"), True),
        (ZeroDivisionError("a bug"), True),  # else it would be redelivered forever
        (Disconnected("memory://", "shutdown"), False),  # the broker redelivers it to the next gateway
    ],
)
def test_sample_is_acknowledged_once_its_result_is_published(tmp_path: Path, response: Any, acknowledged: bool) -> None:
    acks: list[bool] = []
    run_samples(tmp_path, lambda _: response, samples(1, ack=lambda: acks.append(True)))
    assert bool(acks) == acknowledged


def test_rejection_is_published_counted_and_recorded(tmp_path: Path) -> None:
    recorded: list[dict[str, Any]] = []
    rejection = {"source": "door", "index": 7, "error": "BadPayload", "reason": "no picture"}

    async def test() -> None:
        offloader = ScriptedOffloader(tmp_path, tensor)
        run = make_run(offloader, [], lambda sample, result: recorded.append(result))
        assert await run.reject("door", rejection)
        await asyncio.wait_for(run.run(), WAIT_S)
        assert offloader.published == [("sparse/local/results/door", rejection)]
        assert run.stats.failures == {"BadPayload": 1}

    run_async(test())
    assert recorded == [rejection]


def test_failure_to_record_one_result_does_not_stop_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[int] = []

    def record(sample: Sample, result: dict[str, Any]) -> None:
        if sample.index == 1:
            raise OSError("the disk is full")
        recorded.append(sample.index)

    run_samples(tmp_path, tensor, samples(4), record)
    assert recorded == [0, 2, 3]
    assert "could not record a result" in caplog.text


def test_slow_recorder_holds_the_run_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.inference.inference_run._UNRECORDED_LIMIT", 2)
    requested: list[int] = []
    limit_reached, go = threading.Event(), threading.Event()

    def script(number: int) -> TensorContent:
        requested.append(number)
        return tensor(number)

    def record(sample: Sample, result: dict[str, Any]) -> None:
        if sample.index == 0:
            limit_reached.wait(WAIT_S)
            time.sleep(0.02)  # for further requests, if nothing held them back
        assert go.is_set() or len(requested) == 5, requested  # the window, and two that wait for the recorder
        go.set()

    def wait_for_limit(number: int) -> TensorContent:
        if number == 4:
            limit_reached.set()
        return script(number)

    _, run, _ = run_samples(tmp_path, wait_for_limit, samples(40), record)
    assert go.is_set()
    assert (len(requested), run.stats.results) == (40, 40)
