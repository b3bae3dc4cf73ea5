"""`WorkerPresence`: the load in the record, its publication and its removal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import RECORD_EXPIRY_S, WorkerRecord
from brokers.protocol.transport import Properties
from stages.worker.worker_context import WorkerContext
from stages.worker.worker_presence import WorkerPresence
from tests.support.brokers.broker_kinds import run_async

PIPELINE = Pipeline.model_validate(
    {"pipeline": {"name": "street"}, "stage": [{"name": "head", "executor": "a:b", "max_batch": 4}]}
)


class RecordingTransport:
    """The part of a transport that a presence uses."""

    def __init__(self) -> None:
        self.published: list[tuple[str, bytes, Properties]] = []
        self.on_reconnect_callback: Callable[[], Any]

    def on_reconnect(self, callback: Callable[[], Any]) -> None:
        self.on_reconnect_callback = callback

    async def publish(self, topic: str, payload: bytes, properties: Properties, *, qos: int, retain: bool) -> None:
        assert (qos, retain) == (1, True)
        self.published.append((topic, payload, properties))

    @property
    def newest(self) -> WorkerRecord:
        return WorkerRecord.from_bytes(self.published[-1][1])


class Clock:
    now_s = 100.0


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("stages.worker.worker_presence", "brokers.dispatch.presence_publisher"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: clock.now_s))
    return clock


@pytest.fixture(name="transport")
def _transport() -> RecordingTransport:
    return RecordingTransport()


@pytest.fixture(name="presence")
def _presence(clock: Clock, transport: RecordingTransport) -> WorkerPresence:
    return WorkerPresence(transport, WorkerContext(PIPELINE, PIPELINE.stage[0], "w"))  # type: ignore[arg-type]


def test_record_has_the_load_of_the_interval(
    presence: WorkerPresence, transport: RecordingTransport, clock: Clock
) -> None:
    presence.set_model("f", ("image/png",))
    presence.record_compute(4, 0.2)
    presence.record_compute(1, 0.3)
    clock.now_s += 2.0
    run_async(presence.report(3, None, {"failed": 1, "expired": 2, "unexpected": 9}))
    topic, _, properties = transport.published[0]
    assert topic == "sparse/local/street/head/up/w"
    assert properties.expiry_s == RECORD_EXPIRY_S
    record = transport.newest
    assert (record.fingerprint, record.formats, record.capacity, record.state) == ("f", ("image/png",), 6, "up")
    load = record.load
    assert (load.queue, load.done, load.failed, load.expired, load.malformed) == (3, 5, 1, 2, 0)
    assert (load.busy, load.rate) == (0.25, 2.5)
    assert load.task_ms == pytest.approx(0.8 * 50 + 0.2 * 300)
    clock.now_s += 1.0
    run_async(presence.report(0))
    load = transport.newest.load
    assert (load.queue, load.done, load.busy, load.rate, load.queue_ms) == (0, 5, 0, 0, 0)
    assert transport.newest.up_s == 1.0


def test_queue_time_is_the_mean_or_the_age_of_the_oldest_task(
    presence: WorkerPresence, transport: RecordingTransport, clock: Clock
) -> None:
    queue_times_ms = []
    for begun_s, oldest_s in [([], None), ([0.2, 0.4], None), ([], None), ([], 5.0), ([0.1], 2.0), ([3.0], 2.0)]:
        presence.record_queue_waits(begun_s)
        run_async(presence.report(9, None if oldest_s is None else clock.now_s - oldest_s))
        queue_times_ms.append(transport.newest.load.queue_ms)
    assert queue_times_ms == [0, 300, 0, 5000, 2000, 3000]


def test_task_time_ignores_a_task_that_was_frozen(
    presence: WorkerPresence, transport: RecordingTransport, clock: Clock
) -> None:
    presence.record_compute(1, 0.1)
    clock.now_s += 9.0  # more than a worker takes between two reports
    presence.record_compute(1, 8.9)
    run_async(presence.report(0))
    assert transport.newest.load.task_ms == 100
    clock.now_s += 1.0
    presence.record_compute(1, 0.2)
    run_async(presence.report(0))
    assert transport.newest.load.task_ms == pytest.approx(120)


def test_reconnects_are_counted(presence: WorkerPresence, transport: RecordingTransport) -> None:
    run_async(transport.on_reconnect_callback())
    run_async(presence.report(0))
    assert transport.newest.reconnects == 1


def test_removal_publishes_stopped_and_removes_the_record(
    presence: WorkerPresence, transport: RecordingTransport
) -> None:
    run_async(presence.remove())
    assert transport.published == []  # nothing was published before
    run_async(presence.report(0))
    run_async(presence.remove())
    assert WorkerRecord.from_bytes(transport.published[1][1]).state == "stopped"
    assert transport.published[2][:2] == (presence.record.topic, b"")


@pytest.mark.parametrize("keep_record", [False, True])
def test_revoked_worker_publishes_nothing(
    presence: WorkerPresence, transport: RecordingTransport, keep_record: bool
) -> None:
    run_async(presence.report(0))
    presence.revoke(keep_record=keep_record)
    run_async(presence.report(0))
    assert len(transport.published) == 1
    run_async(presence.remove())
    assert len(transport.published) == (1 if keep_record else 3)
