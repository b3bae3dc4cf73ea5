"""Telling the monitor: nothing is lost that need not be, what is lost is counted, and nobody waits or fails for it.

A socket in this process plays the monitor: tests/support/monitor/fake_monitor.py.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from brokers.telemetry import client as event_client
from brokers.telemetry.client import QUEUE_LIMIT, EventClient, event_client_from_environment
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, EventsDropped, ProcessStarted, ProcessStopped, StepDone
from tests.support.monitor.fake_monitor import FakeMonitor, monitor_socket_path
from tests.support.pipelines.processes import eventually

# A monitor that is away is looked for so often here: tests have no second to spare.
LOOK_S = 0.05


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_client, "RECONNECT_INTERVAL_S", LOOK_S)


@pytest.fixture(name="path")
def _path() -> Iterator[Path]:
    with monitor_socket_path() as found:
        yield found


@contextmanager
def client(path: Path) -> Iterator[EventClient]:
    """A client whose thread has ended in the end."""
    found = EventClient(path, "source", "cam", {"pipeline": "street"}, {"source": "cam"})
    with found:
        assert threads() == ["events-cam"]
        yield found
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("events-")]


def tell(told: EventClient, steps: range) -> None:
    for step in steps:
        told.emit("step_done", step=step)


def steps_of(*monitors: FakeMonitor) -> list[int]:
    return [
        event.step
        for monitor in monitors
        for event in monitor.events_of_kind("step_done")
        if isinstance(event, StepDone)
    ]


def dropped_of(monitor: FakeMonitor) -> int:
    return sum(event.count for event in monitor.events_of_kind("events_dropped") if isinstance(event, EventsDropped))


def test_all_that_is_told_is_heard_once_in_order_between_start_and_stop(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with client(path) as told:
            tell(told, range(1000))
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    first, *_, last = monitor.events
    assert isinstance(first, ProcessStarted)
    assert isinstance(last, ProcessStopped)
    assert (first.role, first.name, first.pid > 0, last.name) == ("source", "cam", True, "cam")
    assert steps_of(monitor) == list(range(1000))
    assert {event.pipeline for event in monitor.events} == {"street"}
    assert len(monitor.events) == 1002


def test_no_two_events_are_of_one_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 1_000)  # a clock that stands, as it may for a while
    with FakeMonitor(path) as monitor:
        with client(path) as told:
            tell(told, range(100))
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    assert [event.time_ns for event in monitor.events] == list(range(1_000, 1_102))


def test_an_event_may_be_told_later_than_it_was(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with client(path) as told:
            when_ns = told.now_ns()
            tell(told, range(1))
            told.emit("step_done", time_ns=when_ns, step=1)
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    before, after = monitor.events_of_kind("step_done")
    assert after.time_ns == when_ns < before.time_ns


def test_many_lines_go_in_one_datagram_and_none_is_too_large(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with client(path) as told:
            tell(told, range(5000))
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    assert steps_of(monitor) == list(range(5000))
    assert len(monitor.datagram_sizes) < 200
    assert max(monitor.datagram_sizes) <= DATAGRAM_LIMIT_BYTES


def test_several_threads_may_tell_at_once(path: Path) -> None:
    with FakeMonitor(path) as monitor:
        with client(path) as told:
            tellers = [threading.Thread(target=tell, args=(told, range(at, at + 500))) for at in range(0, 2000, 500)]
            for teller in tellers:
                teller.start()
            for teller in tellers:
                teller.join()
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    assert sorted(steps_of(monitor)) == list(range(2000))
    assert len({event.time_ns for event in monitor.events}) == 2002


# Absent ---------------------------------------------------------------------------------------------------------------


def test_without_a_monitor_nothing_is_said_and_the_end_is_not_waited_for(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_client, "CLOSE_TIMEOUT_S", 3600.0)  # what a monitor would be given
    with caplog.at_level(logging.DEBUG), client(path) as told:
        tell(told, range(3 * QUEUE_LIMIT))
        assert len(told._waiting) <= QUEUE_LIMIT
    assert caplog.records == []


def test_a_client_of_no_socket_tells_nobody_and_has_no_thread() -> None:
    told = EventClient()
    with told:
        tell(told, range(10))
        assert threads() == []
        assert not told._waiting
        assert told.now_ns() < told.now_ns()


@pytest.mark.parametrize(
    "made", [lambda path: path.parent.rmdir(), lambda path: path.mkdir(), lambda path: path.touch()]
)
def test_whatever_is_at_the_place_of_the_socket_nothing_raises(path: Path, made: Any) -> None:
    made(path)
    try:
        with client(path) as told:
            tell(told, range(10))
    finally:
        path.parent.mkdir(exist_ok=True)


def test_a_trouble_that_somebody_could_mend_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with client(tmp_path / ("x" * 200)) as told:
        tell(told, range(10))
        eventually("a warning", lambda: caplog.records)
        looked_s = told._looked_s
        eventually("another look", lambda: told._looked_s > looked_s)
        eventually("a third", lambda: told._looked_s > looked_s + LOOK_S)
    [record] = caplog.records
    assert "the monitor at " in record.getMessage()
    assert "too long" in record.getMessage()


def test_what_waits_is_told_as_soon_as_a_monitor_is_there(path: Path) -> None:
    with client(path) as told:
        tell(told, range(100))
        eventually("a look", lambda: told._looked_s > 0)
        with FakeMonitor(path) as monitor:
            eventually("all", lambda: len(steps_of(monitor)) == 100)
            assert steps_of(monitor) == list(range(100))
            assert dropped_of(monitor) == 0


def test_of_more_than_may_wait_the_newest_are_kept_and_the_others_counted(path: Path) -> None:
    count = 2 * QUEUE_LIMIT
    with client(path) as told:
        tell(told, range(count))
        with FakeMonitor(path) as monitor:
            eventually("the newest", lambda: count - 1 in steps_of(monitor))
            eventually(
                "the sum", lambda: dropped_of(monitor) + len(monitor.events_of_kind("start", "step_done")) == count + 1
            )
            found = steps_of(monitor)
            assert found == sorted(found)
            assert found[-QUEUE_LIMIT // 2 :] == list(range(count - QUEUE_LIMIT // 2, count))
            assert len(found) >= QUEUE_LIMIT
            assert told.dropped == 0


# Slow -----------------------------------------------------------------------------------------------------------------


def test_a_slow_monitor_is_waited_for_by_the_thread_only_and_hears_all_that_was_kept(path: Path) -> None:
    count = 6 * QUEUE_LIMIT
    with FakeMonitor(path, paused=True) as monitor, client(path) as told:
        tell(told, range(count))  # returns, although nobody reads
        assert told.dropped > 0
        monitor.resume()
        eventually(
            "the sum", lambda: dropped_of(monitor) + len(monitor.events_of_kind("start", "step_done")) == count + 1
        )
        assert steps_of(monitor)[-1] == count - 1
        assert dropped_of(monitor) > 0


def test_of_a_batch_that_goes_in_part_only_the_rest_is_sent_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events so long that those taken at once make several datagrams, of which the second does not go."""
    told, sent, goes = EventClient(path), list[bytes](), iter([True, False])

    def send(datagram: bytes, count: int) -> bool:
        if going := next(goes, True):
            sent.append(datagram)
        return going

    monkeypatch.setattr(told, "_send", send)
    for step in range(200):
        told._put("step_done", None, {"step": step, "x" * 1000: 1})
    assert not told._pass_on()
    assert len(sent) == 1
    assert told._pass_on()
    steps = [json.loads(line)["step"] for datagram in sent for line in datagram.splitlines()]
    assert steps == list(range(200))


def test_of_what_comes_back_when_too_much_waits_the_oldest_go_and_are_counted(path: Path) -> None:
    told = EventClient(path)
    for step in range(QUEUE_LIMIT):
        told._put("step_done", None, {"step": step})
    taken = told._take()
    for step in range(100):
        told._put("step_done", None, {"step": QUEUE_LIMIT + step})
    told._put_back(taken)
    assert [figures["step"] for _, _, figures in told._waiting] == list(range(100, QUEUE_LIMIT + 100))
    assert told.dropped == 100


def test_a_monitor_that_takes_nothing_is_given_up_at_the_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_client, "CLOSE_TIMEOUT_S", 0.01)
    with FakeMonitor(path, paused=True), client(path) as told:
        tell(told, range(QUEUE_LIMIT))
        eventually("a line", lambda: told._socket)


# Killed and started again ---------------------------------------------------------------------------------------------


def test_a_monitor_that_is_killed_and_started_again_is_found_again_and_all_adds_up(path: Path) -> None:
    with client(path) as told:
        with FakeMonitor(path) as first:
            tell(told, range(1000))
            eventually("the first thousand", lambda: len(steps_of(first)) == 1000)
            first.kill()  # its socket's file is still there
            tell(told, range(1000, 2000))
            eventually("it is missed", lambda: told._socket is None)
        with FakeMonitor(path) as second:
            tell(told, range(2000, 3000))
            eventually("all others", lambda: len(steps_of(second)) == 2000)
    assert steps_of(first, second) == list(range(3000))
    assert dropped_of(second) == 0


def test_while_it_is_killed_and_started_again_and_again_nothing_comes_twice_or_out_of_order(path: Path) -> None:
    """What was in the queue of a socket whose owner is killed is lost, and nobody can say how much that was."""
    monitors: list[FakeMonitor] = []
    with client(path) as told:
        teller = threading.Thread(target=tell, args=(told, range(20_000)))
        teller.start()
        for _ in range(5):
            with FakeMonitor(path) as monitor:
                monitors.append(monitor)
                eventually("some", lambda heard=monitor: heard.events or not teller.is_alive())  # type: ignore[misc]
        teller.join()
        with FakeMonitor(path) as last:
            monitors.append(last)
            tell(told, range(20_000, 20_001))
            eventually("the last", lambda: 20_000 in steps_of(last))
    found = steps_of(*monitors)
    assert found == sorted(set(found))
    assert len(found) + sum(map(dropped_of, monitors)) <= 20_001


# The parts that are given once ----------------------------------------------------------------------------------------


def test_the_environment_names_the_run_and_the_socket(path: Path) -> None:
    environment = {"SPARSE_MONITOR": str(path), "SPARSE_RUN": "r7"}
    with FakeMonitor(path) as monitor:
        names = {"site": "here", "pipeline": "street", "stage": "head", "worker": "w1"}
        with event_client_from_environment(environment, "stage", "w1", **names) as told:
            told.emit("batch_processed", tasks=3)
        eventually("the end", lambda: monitor.events_of_kind("stop"))
    [batch] = monitor.events_of_kind("batch_processed")
    assert batch.model_dump(include={"run", "site", "pipeline", "stage", "worker", "tasks"}) == {
        "run": "r7",
        "tasks": 3,
        **names,
    }


def test_a_datagram_that_the_system_refuses_for_its_size_is_counted_and_holds_up_nothing(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeMonitor(path) as monitor, client(path) as told:
        eventually("a line", lambda: told._socket)
        assert told._socket is not None
        told._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        tell(told, range(1000))
        eventually("it is counted", lambda: dropped_of(monitor))
        told.emit("step_done", step=1000)
        eventually("what fits", lambda: 1000 in steps_of(monitor))
        assert dropped_of(monitor) + len(steps_of(monitor)) == 1001
    assert len(caplog.records) == 1
