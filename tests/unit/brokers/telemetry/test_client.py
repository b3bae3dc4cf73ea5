"""The telemetry client: never blocks its caller, loses no event that it need not, and reports the number of lost ones.

The monitor is a socket in this process: tests/support/monitor/fake_monitor.py.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from brokers.telemetry import client as event_client
from brokers.telemetry.client import QUEUE_LIMIT, EventClient, event_client_from_environment
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, EventsDropped, ProcessStarted, ProcessStopped, StepDone
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.processes import eventually

RECONNECT_INTERVAL_S = 0.05


@pytest.fixture(autouse=True)
def reconnect_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_client, "RECONNECT_INTERVAL_S", RECONNECT_INTERVAL_S)


@pytest.fixture(name="path")
def socket_path_fixture() -> Iterator[Path]:
    with monitor_socket_path() as path:
        yield path


@contextmanager
def open_client(path: Path) -> Iterator[EventClient]:
    """A client whose thread must end with it."""
    with EventClient(path, "source", "cam", {"pipeline": "street"}, {"source": "cam"}) as client:
        assert thread_names() == ["events-cam"]
        yield client
    assert thread_names() == []


def thread_names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("events-")]


def emit_steps(client: EventClient, steps: range) -> None:
    for step in steps:
        client.emit("step_done", step=step)


def steps_of(*monitors: FakeMonitor) -> list[int]:
    events = [event for monitor in monitors for event in monitor.events_of_kind("step_done")]
    return [event.step for event in events if isinstance(event, StepDone)]


def dropped_of(monitor: FakeMonitor) -> int:
    return sum(event.count for event in monitor.events_of_kind("events_dropped") if isinstance(event, EventsDropped))


def wait_for_stop(monitor: FakeMonitor) -> None:
    eventually("the stop event", lambda: monitor.events_of_kind("stop"))


def wait_for_total(monitor: FakeMonitor, steps: int) -> None:
    """Wait until the events received and the events reported as dropped add up to `start` and all steps."""
    eventually(
        "the total", lambda: dropped_of(monitor) + len(monitor.events_of_kind("start", "step_done")) == steps + 1
    )


# Events -----------------------------------------------------------------------------------------------------------


def test_events_arrive_in_order_between_start_and_stop(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with open_client(path) as client:
            emit_steps(client, range(5000))
        wait_for_stop(monitor)
    first, *_, last = monitor.events
    assert isinstance(first, ProcessStarted)
    assert isinstance(last, ProcessStopped)
    assert (first.role, first.name, first.pid > 0, last.name) == ("source", "cam", True, "cam")
    assert steps_of(monitor) == list(range(5000))
    assert {event.pipeline for event in monitor.events} == {"street"}
    assert len(monitor.events) == 5002
    assert len(monitor.datagram_sizes) < 200, "many events are sent in one datagram"
    assert max(monitor.datagram_sizes) <= DATAGRAM_LIMIT_BYTES


def test_times_differ_even_if_the_clock_stands_still(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)
    with FakeMonitor(path) as monitor:
        with open_client(path) as client:
            emit_steps(client, range(100))
        wait_for_stop(monitor)
    assert [event.time_ns for event in monitor.events] == list(range(1_000, 1_102))


def test_event_may_have_an_earlier_time(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with open_client(path) as client:
            time_ns = client.now_ns()
            emit_steps(client, range(1))
            client.emit("step_done", time_ns=time_ns, step=1)
        wait_for_stop(monitor)
    first, second = monitor.events_of_kind("step_done")
    assert second.time_ns == time_ns < first.time_ns


def test_several_threads_may_emit_at_once(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with open_client(path) as client:
            threads = [
                threading.Thread(target=emit_steps, args=(client, range(begin, begin + 500)))
                for begin in range(0, 2000, 500)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        wait_for_stop(monitor)
    assert sorted(steps_of(monitor)) == list(range(2000))
    assert len({event.time_ns for event in monitor.events}) == 2002


def test_environment_names_the_run_and_the_socket(path: Path) -> None:
    environment = {"SPARSE_MONITOR": str(path), "SPARSE_RUN": "r7"}
    names = {"site": "here", "pipeline": "street", "stage": "head", "worker": "w1"}
    with FakeMonitor(path) as monitor:
        with event_client_from_environment(environment, "stage", "w1", **names) as client:
            client.emit("batch_processed", tasks=3)
        wait_for_stop(monitor)
    [batch] = monitor.events_of_kind("batch_processed")
    assert batch.model_dump(include={"run", "tasks", *names}) == {"run": "r7", "tasks": 3, **names}


# Absent monitor ---------------------------------------------------------------------------------------------------


def test_absent_monitor_is_neither_logged_nor_waited_for(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_client, "CLOSE_TIMEOUT_S", 3600.0)
    with caplog.at_level(logging.DEBUG), open_client(path) as client:
        emit_steps(client, range(3 * QUEUE_LIMIT))
        assert len(client._queue) <= QUEUE_LIMIT
    assert caplog.records == []


def test_client_without_a_path_discards_events_and_has_no_thread() -> None:
    with EventClient() as client:
        emit_steps(client, range(10))
        assert thread_names() == []
        assert not client._queue
        assert client.now_ns() < client.now_ns()


@pytest.mark.parametrize(
    "prepare",
    [lambda path: path.parent.rmdir(), lambda path: path.mkdir(), lambda path: path.touch()],
    ids=["no folder", "a folder", "a file"],
)
def test_unusable_socket_path_raises_nothing(path: Path, prepare: Callable[[Path], None]) -> None:
    prepare(path)
    try:
        with open_client(path) as client:
            emit_steps(client, range(10))
    finally:
        path.parent.mkdir(exist_ok=True)


def test_error_that_the_user_can_fix_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_client(tmp_path / ("x" * 200)) as client:
        emit_steps(client, range(10))
        eventually("a warning", lambda: caplog.records)
        first_s = client._connect_tried_s
        eventually("a second attempt", lambda: client._connect_tried_s > first_s)
        eventually("a third attempt", lambda: client._connect_tried_s > first_s + RECONNECT_INTERVAL_S)
    [record] = caplog.records
    assert "cannot be sent to the monitor at " in record.getMessage()
    assert "too long" in record.getMessage()


def test_queued_events_are_sent_when_the_monitor_starts(path: Path) -> None:
    with open_client(path) as client:
        emit_steps(client, range(100))
        eventually("a first attempt", lambda: client._connect_tried_s > 0)
        with FakeMonitor(path) as monitor:
            eventually("all events", lambda: len(steps_of(monitor)) == 100)
            assert steps_of(monitor) == list(range(100))
            assert dropped_of(monitor) == 0


def test_full_queue_keeps_the_newest_and_counts_the_dropped(path: Path) -> None:
    count = 2 * QUEUE_LIMIT
    with open_client(path) as client:
        emit_steps(client, range(count))
        with FakeMonitor(path) as monitor:
            eventually("the newest event", lambda: count - 1 in steps_of(monitor))
            wait_for_total(monitor, count)
            steps = steps_of(monitor)
            assert steps == sorted(steps)
            assert steps[-QUEUE_LIMIT // 2 :] == list(range(count - QUEUE_LIMIT // 2, count))
            assert len(steps) >= QUEUE_LIMIT
            assert client.dropped == 0


# Slow monitor -----------------------------------------------------------------------------------------------------


def test_slow_monitor_blocks_only_the_thread(path: Path) -> None:
    count = 6 * QUEUE_LIMIT
    with FakeMonitor(path, paused=True) as monitor, open_client(path) as client:
        emit_steps(client, range(count))  # returns although the monitor reads nothing
        assert client.dropped > 0
        monitor.resume()
        wait_for_total(monitor, count)
        assert steps_of(monitor)[-1] == count - 1
        assert dropped_of(monitor) > 0


def test_partly_sent_batch_is_continued_where_it_stopped(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The events are so long that those taken at once make several datagrams, of which the second is not sent."""
    client = EventClient(path)
    sent: list[bytes] = []
    results = iter([True, False])

    def send(datagram: bytes, count: int) -> bool:
        if success := next(results, True):
            sent.append(datagram)
        return success

    monkeypatch.setattr(client, "_send", send)
    for step in range(200):
        client._put("step_done", None, {"step": step, "x" * 1000: 1})
    assert not client._flush()
    assert len(sent) == 1
    assert client._flush()
    steps = [json.loads(line)["step"] for datagram in sent for line in datagram.splitlines()]
    assert steps == list(range(200))


def test_close_gives_up_on_a_monitor_that_reads_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_client, "CLOSE_TIMEOUT_S", 0.01)
    with FakeMonitor(path, paused=True), open_client(path) as client:
        emit_steps(client, range(QUEUE_LIMIT))
        eventually("a connection", lambda: client._socket)


def test_datagram_that_the_system_refuses_is_counted_and_logged_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeMonitor(path) as monitor, open_client(path) as client:
        eventually("a connection", lambda: client._socket)
        assert client._socket is not None
        client._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        emit_steps(client, range(1000))
        wait_for_total(monitor, 1000)
        assert dropped_of(monitor)
        client.emit("step_done", step=1000)
        eventually("a small datagram", lambda: 1000 in steps_of(monitor))
    assert len(caplog.records) == 1


# Restarting monitor -----------------------------------------------------------------------------------------------


def test_restarted_monitor_receives_all_further_events(path: Path) -> None:
    with open_client(path) as client:
        with FakeMonitor(path) as first:
            emit_steps(client, range(1000))
            eventually("the first events", lambda: len(steps_of(first)) == 1000)
            first.kill()  # the socket's file stays
            emit_steps(client, range(1000, 2000))
            eventually("the end of the connection", lambda: client._socket is None)
        with FakeMonitor(path) as second:
            emit_steps(client, range(2000, 3000))
            eventually("all other events", lambda: len(steps_of(second)) == 2000)
    assert steps_of(first, second) == list(range(3000))
    assert dropped_of(second) == 0


def test_restarts_cause_no_duplicates_and_keep_the_order(path: Path) -> None:
    """Events in the buffer of a socket whose monitor is killed are lost, and cannot be counted."""
    monitors: list[FakeMonitor] = []
    with open_client(path) as client:
        sender = threading.Thread(target=emit_steps, args=(client, range(20_000)))
        sender.start()
        for _ in range(5):
            with FakeMonitor(path) as monitor:
                monitors.append(monitor)
                eventually("some events", lambda each=monitor: each.events or not sender.is_alive())  # type: ignore[misc]
        sender.join()
        with FakeMonitor(path) as last:
            monitors.append(last)
            emit_steps(client, range(20_000, 20_001))
            eventually("the last event", lambda: 20_000 in steps_of(last))
    steps = steps_of(*monitors)
    assert steps == sorted(set(steps))
    assert len(steps) + sum(map(dropped_of, monitors)) <= 20_001
