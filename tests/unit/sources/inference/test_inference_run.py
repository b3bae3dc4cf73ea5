"""From samples to reports: in order, within the window, each with an answer; the offloader is one that tests steer."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import DeadlinePassed, RequestFailed
from brokers.protocol.messages import JPEG, JSON, SAFETENSORS, BinaryContent, Content, TensorContent
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.stage_timing import Hop
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Properties
from sources.client.inflight_limit import InflightLimit
from sources.client.offloader import OffloadResult
from sources.inference.inference_run import InferenceRun, SampleResult, run_source, sample_content
from sources.inputs.sample import Sample
from sources.inputs.sample_buffer import SampleBuffer
from sources.inputs.source import Source
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

Ask = Callable[[int], Any]


class Line:
    """Keeps what is published."""

    def __init__(self) -> None:
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.transport = self

    async def publish(self, topic: str, payload: bytes, properties: Properties, *, qos: int) -> None:
        assert (properties.content_type, qos) == (JSON, 1)
        self.published.append((topic, json.loads(payload)))


class Offload:
    """Answers as `ask` says: a content, or an error to raise; `None` waits until the test lets go."""

    def __init__(self, folder: Path, ask: Ask, window: int = 3) -> None:
        self.pipeline = load_pipeline(write_pipeline_file(folder, [stage_table("one", "double")], {"window": window}))
        self.line = Line()
        self.flying = self.most = 0
        self.go = asyncio.Event()
        self.window = InflightLimit(lambda: window)
        self._ask = ask

    async def ask(
        self, content: Content, *, source: str, slot_acquired: bool, parent: TraceContext | None
    ) -> OffloadResult:
        assert slot_acquired
        try:
            return await self._answer(content)
        finally:
            self.window.release()

    async def _answer(self, content: Content) -> OffloadResult:
        assert isinstance(content, BinaryContent)
        self.flying += 1
        self.most = max(self.most, self.flying)
        found = self._ask(int(bytes(content.data)))
        if found is None:
            await self.go.wait()
            found = TensorContent({"x": from_array(1.0)})
        else:
            await asyncio.sleep(0.001 * (10 - int(bytes(content.data)) % 10))  # later ones are answered sooner
        self.flying -= 1
        if isinstance(found, Exception):
            raise found
        return OffloadResult(b"r" * 16, found, (Hop("one", "w", compute_ms=5.0),), 20.0, 1)


def one(index: int) -> Any:
    return TensorContent({"x": from_array(float(index))})


def samples(count: int) -> list[Sample]:
    return [Sample("door", index, str(index).encode(), JSON) for index in range(count)]


def feed_all(
    folder: Path, ask: Ask, count: int, record: Callable[[SampleResult], None] | None = None
) -> tuple[Offload, InferenceRun, list[SampleResult]]:
    reports: list[SampleResult] = []

    async def main() -> tuple[Offload, InferenceRun]:
        offload, intake = Offload(folder, ask), SampleBuffer("all")
        feed = InferenceRun(offload, intake, record or reports.append)  # type: ignore[arg-type]
        for sample in samples(count):
            intake.put_nowait(sample)
        intake.close()
        await asyncio.wait_for(feed.run(), 20)
        return offload, feed

    return (*asyncio.run(main()), reports)


def test_reports_are_in_order_though_answers_are_not(tmp_path: Path) -> None:
    offload, feed, reports = feed_all(tmp_path, one, 30)
    assert [report.sample.index for report in reports] == list(range(30))
    assert [topic for topic, _ in offload.line.published] == ["sparse/local/results/door"] * 30
    published = [result["index"] for _, result in offload.line.published]
    assert sorted(published) == list(range(30))
    assert published != list(range(30))
    assert (feed.stats.requests, feed.stats.results) == (30, 30)


def test_no_more_are_on_their_way_than_the_window_has(tmp_path: Path) -> None:
    offload, _, _ = feed_all(tmp_path, one, 30)
    assert offload.most == 3


def test_as_many_are_on_their_way_as_the_window_has_however_many_workers_made_it_so(tmp_path: Path) -> None:
    async def main() -> int:
        offload, intake = Offload(tmp_path, lambda _: None, window=100), SampleBuffer("all")
        for sample in samples(150):
            intake.put_nowait(sample)
        intake.close()
        feeding = asyncio.create_task(InferenceRun(offload, intake).run())  # type: ignore[arg-type]
        for _ in range(200):
            if offload.flying == 100:
                break
            await asyncio.sleep(0.01)
        offload.go.set()
        await asyncio.wait_for(feeding, 20)
        return offload.most

    assert asyncio.run(main()) == 100


def test_a_result_says_what_whence_and_how_long(tmp_path: Path) -> None:
    _, _, (report,) = feed_all(tmp_path, one, 1)
    result = report.result
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


def test_each_failure_is_a_result_of_its_own_kind(tmp_path: Path) -> None:
    errors: list[Any] = [
        RequestFailed("ab", "tail", "w1", "BadPayload", "no picture"),
        DeadlinePassed("cd", 50.0, "the source"),
        TensorContent({"x": from_array(1.0)}, {"format": "detections"}),  # a result whose metadata lies
        TensorContent({"x": from_array(1.0)}),
    ]
    _, feed, reports = feed_all(tmp_path, errors.__getitem__, 4)
    assert [report.result.get("error") for report in reports] == ["BadPayload", "DeadlinePassed", "BadPayload", None]
    first, second, third, _ = (report.result for report in reports)
    assert (first["request"], first["stage"], first["worker"], first["reason"]) == ("ab", "tail", "w1", "no picture")
    assert second["request"] == "cd"
    assert "its metadata does not fit its tensors" in third["reason"]
    summary = feed.stats.summary()
    assert summary["failures"] == {"BadPayload": 2, "DeadlinePassed": 1}
    assert (summary["requests"], summary["results"], summary["lost"]) == (4, 1, 0)


def test_trouble_with_recording_one_is_not_trouble_with_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[int] = []

    def record(report: SampleResult) -> None:
        if report.sample.index == 1:
            raise OSError("the disk is full")
        recorded.append(report.sample.index)

    feed_all(tmp_path, one, 4, record)
    assert recorded == [0, 2, 3]
    assert "could not record a result" in caplog.text


def test_a_slow_recorder_holds_the_pipeline_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sources.inference.inference_run._UNRECORDED_LIMIT", 2)
    asked: list[int] = []
    go = threading.Event()

    def ask(index: int) -> Any:
        asked.append(index)
        return one(index)

    def record(report: SampleResult) -> None:
        go.wait(10)

    def look() -> None:
        seen.extend(asked)
        go.set()

    seen: list[int] = []
    threading.Timer(0.3, look).start()
    feed_all(tmp_path, ask, 40, record)
    assert len(seen) <= 8, seen
    assert len(asked) == 40


# A source's generator in its thread -------------------------------------------------------------------------------


class Fake(Source):
    def __init__(self, make: Callable[[Fake], Iterator[Sample]], live: bool = False) -> None:
        self.name, self.live, self.closed = "fake", live, 0
        self._make = make

    def samples(self) -> Iterator[Sample]:
        return self._make(self)

    def close(self) -> None:
        self.closed += 1


def drawn(source: Fake, keep: Any = "all") -> list[int]:
    async def main() -> list[int]:
        intake, taken = SampleBuffer(keep), []
        drawing = asyncio.create_task(run_source(source, intake))
        while (sample := await asyncio.wait_for(intake.get(), 10)) is not None:
            taken.append(sample.index)
        await drawing
        return taken

    return asyncio.run(main())


def test_all_of_a_file_is_drawn_and_the_source_is_closed() -> None:
    source = Fake(lambda _: iter(samples(50)))
    assert drawn(source) == list(range(50))
    assert source.closed


def test_a_live_source_never_waits_for_the_pipeline() -> None:
    source = Fake(lambda _: iter(samples(200)), live=True)
    found = drawn(source, "latest")
    assert found[-1] == 199
    assert found == sorted(set(found))


def test_what_a_source_raises_is_raised_where_it_is_drawn() -> None:
    def breaks(_: Fake) -> Iterator[Sample]:
        yield from samples(2)
        raise ValueError("the film is torn")

    source = Fake(breaks)
    with pytest.raises(ValueError, match="the film is torn"):
        drawn(source)
    assert source.closed


def test_a_source_runs_in_a_thread_of_its_own_and_may_block() -> None:
    def blocks(_: Fake) -> Iterator[Sample]:
        assert threading.current_thread().name == "source-fake"
        time.sleep(0.05)
        yield from samples(1)

    assert drawn(Fake(blocks)) == [0]


def test_a_payload_travels_as_it_is_and_arrays_as_safetensors() -> None:
    assert sample_content(Sample("s", 0, b"\xff\xd8\xff", JPEG)) == BinaryContent(JPEG, b"\xff\xd8\xff")
    content = sample_content(Sample("s", 0, {"x": np.arange(3)}, SAFETENSORS))
    assert isinstance(content, TensorContent)
    assert set(content.tensors) == {"x"}
