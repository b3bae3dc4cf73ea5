"""Events to lines and lines to datagrams: what is made is what brokers/telemetry/schema.py reads, whatever it is made of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.protocol.stage_timing import Hop
from brokers.telemetry.encoding import EventEncoder, QueuedEvent
from brokers.telemetry.schema import (
    DATAGRAM_LIMIT_BYTES,
    HOPS_LIMIT,
    TEXT_LIMIT,
    BatchProcessed,
    EventsDropped,
    HopMetrics,
    ProcessStarted,
    RequestDone,
    StepDone,
    TaskProcessed,
    event_from_json,
)

COMMON: dict[str, Any] = {"run": "r1", "site": "local", "pipeline": "street"}
WORKER: dict[str, Any] = {"stage": "head", "worker": "w1"}
LINES = EventEncoder(COMMON, WORKER)
SOURCE = EventEncoder(COMMON, {"source": "cam"})
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
MILLISECONDS = st.floats(0, 1e9)
COUNTS = st.integers(0, (1 << 53) - 1)


@given(st.binary(min_size=16, max_size=16), NAMES, MILLISECONDS, COUNTS)
def test_a_task_is_read_as_it_was_told(request: bytes, error: str, queue_ms: float, size: int) -> None:
    figures: dict[str, Any] = {"request": request, "error": error, "queue_ms": queue_ms, "bytes_in": size}
    found = event_from_json(LINES.encode_line(("task_processed", 7, figures)))
    told: dict[str, Any] = {
        "request": request.hex(),
        "error": error[:TEXT_LIMIT],
        "queue_ms": queue_ms,
        "bytes_in": size,
    }
    assert found == TaskProcessed(time_ns=7, **COMMON, **WORKER, **told)


def test_the_hops_of_a_request_are_read_as_they_were_told() -> None:
    hop = Hop("head", "w1", 0.5, 0.25, 33.125, 0.0, 10, 20, 4)
    found = event_from_json(SOURCE.encode_line(("request_done", 7, {"hops": (hop, Hop("tail", "w" * 1000))})))
    figures = HopMetrics(
        stage="head", worker="w1", queue_ms=0.5, decode_ms=0.25, compute_ms=33.125, bytes_in=10, bytes_out=20, batch=4
    )
    last = HopMetrics(stage="tail", worker="w" * TEXT_LIMIT)
    assert found == RequestDone(time_ns=7, **COMMON, source="cam", hops=(figures, last))


def test_more_hops_than_an_event_may_have_are_cut() -> None:
    found = event_from_json(SOURCE.encode_line(("request_done", 7, {"hops": (Hop("a", "b"),) * (HOPS_LIMIT + 1)})))
    assert isinstance(found, RequestDone)
    assert len(found.hops) == HOPS_LIMIT


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf"), None])
def test_a_loss_that_is_no_number_is_none(loss: float | None) -> None:
    found = event_from_json(SOURCE.encode_line(("step_done", 7, {"step": 1, "loss": loss})))
    assert found == StepDone(time_ns=7, **COMMON, source="cam", step=1)


def test_who_did_the_work_stands_in_events_of_work_only() -> None:
    assert event_from_json(LINES.encode_line(("batch_processed", 7, {"tasks": 2}))) == BatchProcessed(
        time_ns=7, **COMMON, **WORKER, tasks=2
    )
    assert event_from_json(LINES.encode_line(("events_dropped", 7, {"count": 2}))) == EventsDropped(
        time_ns=7, **COMMON, count=2
    )
    life: dict[str, Any] = {"role": "stage", "name": "w1", "pid": 5}
    assert event_from_json(LINES.encode_line(("start", 7, life))) == ProcessStarted(time_ns=7, **COMMON, **life)


def test_a_sender_that_has_nothing_to_say_of_itself_is_read_too() -> None:
    bare = EventEncoder({}, {})
    assert event_from_json(bare.encode_line(("start", 7, {}))) == ProcessStarted(time_ns=7)


@given(st.lists(st.integers(0, 60_000), max_size=12))
def test_datagrams_hold_all_in_order_and_none_is_too_large(sizes: list[int]) -> None:
    # What a figure is called is not cut, as texts are.
    waiting: list[QueuedEvent] = [("step_done", index + 1, {"x" * size: 1}) for index, size in enumerate(sizes)]
    found = list(EventEncoder({}, {}).encode_datagrams(waiting))
    assert sum(count for _, count in found) == len(waiting)
    assert all(len(datagram) <= DATAGRAM_LIMIT_BYTES for datagram, _ in found)
    lines = [line for datagram, _ in found for line in datagram.splitlines()]
    assert [line.split(b'"time_ns":')[1].split(b",")[0] for line in lines] == [
        str(told[1]).encode() for told in waiting
    ]


@pytest.mark.parametrize("figures", [{"x" * DATAGRAM_LIMIT_BYTES: 1}, {"step": object()}], ids=["huge", "odd"])
def test_what_makes_no_line_takes_no_other_with_it(figures: dict[str, Any]) -> None:
    good: QueuedEvent = ("step_done", 7, {"step": 1})
    found = list(LINES.encode_datagrams([good, ("step_done", 8, figures), good, good]))
    assert [count for _, count in found] == [1, 1, 2]
    assert [bool(datagram) for datagram, _ in found] == [True, False, True]
    assert [len(datagram.splitlines()) for datagram, _ in found] == [1, 0, 2]
    assert json.loads(found[0][0])["step"] == 1
