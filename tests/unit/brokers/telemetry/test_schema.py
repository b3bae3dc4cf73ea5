"""Encoding of telemetry events: lines that the schema parses back, in datagrams of bounded size."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.protocol.stage_timing import Hop
from brokers.telemetry.schema import (
    DATAGRAM_LIMIT_BYTES,
    HOPS_LIMIT,
    TEXT_LIMIT,
    BatchProcessed,
    EventEncoder,
    EventsDropped,
    HopMetrics,
    ProcessStarted,
    QueuedEvent,
    RequestDone,
    StepDone,
    TaskProcessed,
    event_from_json,
)

COMMON: dict[str, Any] = {"run": "r1", "site": "local", "pipeline": "street"}
WORKER: dict[str, Any] = {"stage": "head", "worker": "w1"}
WORKER_ENCODER = EventEncoder(COMMON, WORKER)
SOURCE_ENCODER = EventEncoder(COMMON, {"source": "cam"})
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
MILLISECONDS = st.floats(0, 1e9)
COUNTS = st.integers(0, (1 << 53) - 1)


@given(st.binary(min_size=16, max_size=16), NAMES, MILLISECONDS, COUNTS)
def test_task_survives_encoding_and_parsing(request: bytes, error: str, queue_ms: float, size: int) -> None:
    fields: dict[str, Any] = {"request": request, "error": error, "queue_ms": queue_ms, "bytes_in": size}
    event = event_from_json(WORKER_ENCODER.encode_line(("task_processed", 7, fields)))
    expected = {**fields, "request": request.hex(), "error": error[:TEXT_LIMIT]}
    assert event == TaskProcessed(time_ns=7, **COMMON, **WORKER, **expected)


def test_hops_survive_encoding_and_parsing() -> None:
    hops = (Hop("head", "w1", 0.5, 0.25, 33.125, 0.0, 10, 20, 4), Hop("tail", "w" * 1000))
    event = event_from_json(SOURCE_ENCODER.encode_line(("request_done", 7, {"hops": hops})))
    first = HopMetrics(
        stage="head", worker="w1", queue_ms=0.5, decode_ms=0.25, compute_ms=33.125, bytes_in=10, bytes_out=20, batch=4
    )
    last = HopMetrics(stage="tail", worker="w" * TEXT_LIMIT)
    assert event == RequestDone(time_ns=7, **COMMON, source="cam", hops=(first, last))


def test_hops_are_cut_at_their_limit() -> None:
    hops = (Hop("a", "b"),) * (HOPS_LIMIT + 1)
    event = event_from_json(SOURCE_ENCODER.encode_line(("request_done", 7, {"hops": hops})))
    assert isinstance(event, RequestDone)
    assert len(event.hops) == HOPS_LIMIT


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), None])
def test_loss_that_is_not_finite_becomes_null(loss: float | None) -> None:
    event = event_from_json(SOURCE_ENCODER.encode_line(("step_done", 7, {"step": 1, "loss": loss})))
    assert event == StepDone(time_ns=7, **COMMON, source="cam", step=1)


def test_only_events_about_work_name_the_worker() -> None:
    def encode(*queued: Any) -> Any:
        return event_from_json(WORKER_ENCODER.encode_line(queued))

    process: dict[str, Any] = {"role": "stage", "name": "w1", "pid": 5}
    assert encode("batch_processed", 7, {"tasks": 2}) == BatchProcessed(time_ns=7, **COMMON, **WORKER, tasks=2)
    assert encode("events_dropped", 7, {"count": 2}) == EventsDropped(time_ns=7, **COMMON, count=2)
    assert encode("start", 7, process) == ProcessStarted(time_ns=7, **COMMON, **process)


def test_encoder_without_constant_fields_makes_valid_lines() -> None:
    assert event_from_json(EventEncoder({}, {}).encode_line(("start", 7, {}))) == ProcessStarted(time_ns=7)


@given(st.lists(st.integers(0, 60_000), max_size=12))
def test_datagrams_hold_all_events_in_order_within_their_limit(sizes: list[int]) -> None:
    # Names of fields are not cut, as values are.
    events: list[QueuedEvent] = [("step_done", index + 1, {"x" * size: 1}) for index, size in enumerate(sizes)]
    datagrams = list(EventEncoder({}, {}).encode_datagrams(events))
    assert sum(count for _, count in datagrams) == len(events)
    assert all(len(datagram) <= DATAGRAM_LIMIT_BYTES for datagram, _ in datagrams)
    lines = [line for datagram, _ in datagrams for line in datagram.splitlines()]
    assert [json.loads(line)["time_ns"] for line in lines] == [time_ns for _, time_ns, _ in events]


@pytest.mark.parametrize("fields", [{"x" * DATAGRAM_LIMIT_BYTES: 1}, {"step": object()}], ids=["huge", "wrong type"])
def test_event_that_cannot_be_encoded_does_not_affect_others(fields: dict[str, Any]) -> None:
    good: QueuedEvent = ("step_done", 7, {"step": 1})
    datagrams = list(WORKER_ENCODER.encode_datagrams([good, ("step_done", 8, fields), good, good]))
    assert [count for _, count in datagrams] == [1, 1, 2]
    assert [len(datagram.splitlines()) for datagram, _ in datagrams] == [1, 0, 2]
    assert json.loads(datagrams[0][0])["step"] == 1
