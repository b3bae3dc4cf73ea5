"""Lines on the event socket, valid and invalid: which are parsed, counted and logged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TaskProcessed, TelemetryEvent
from monitor.daemon.event_socket import EventReader, UnixListener
from tests.support.monitor.unix_client import encode_event, encode_task_event, send_datagrams, short_temp_folder
from tests.support.pipelines.processes import eventually


class Receiver:
    """An event reader and the events it has passed on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[TelemetryEvent] = []
        self.reader = EventReader(UnixListener(path), self.events.extend)
        self.reader.start()

    def receive(self, *datagrams: bytes) -> None:
        """Send datagrams and stop the reader, which parses all of them first."""
        send_datagrams(self.path, *datagrams)
        self.reader.stop()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with short_temp_folder() as folder:
        receiver = Receiver(folder / "events")
        yield receiver
        receiver.reader.stop()


def test_datagram_holds_one_event_or_many(receiver: Receiver) -> None:
    three_lines = encode_task_event(2) + b"\n \r\n" + encode_task_event(3)
    receiver.receive(encode_task_event(1), three_lines, encode_task_event(4).rstrip())
    requests = [event.request for event in receiver.events if isinstance(event, TaskProcessed)]
    assert requests == [f"{number:032x}" for number in (1, 2, 3, 4)]
    assert (receiver.reader.event_count, receiver.reader.bad_events) == (4, 0)


def test_events_are_passed_on_while_the_reader_runs(receiver: Receiver) -> None:
    send_datagrams(receiver.path, encode_task_event(1))
    eventually("the event", lambda: receiver.events)


INVALID_LINES = [
    (b"secret", "not JSON"),
    (b"\xff\xfe\x00secret", "not JSON"),
    (b'{"event": "start", "secret', "not JSON"),
    (b"[" * 60_000, "not JSON"),
    (b'["secret"]', "Input should be an object"),
    (b'{"secret": 1}', "event: expected one of start, stop, task_processed,"),
    (encode_event("secret"), "event: expected one of start, stop, task_processed,"),
    (encode_event("start", secret=1), "start: unknown field"),
    (encode_event("start", pid="secret"), "start: pid: Input should be a valid integer"),
    (encode_event("start", pid=-1), "start: pid: Input should be greater than or equal to 0"),
    (encode_event("start", time_ns=0), "start: time_ns: Input should be greater than 0"),
    (encode_event("start", time_ns=1 << 62), "start: time_ns: Input should be less than"),
    (encode_event("start", name="secret" * 100), "start: name: String should have at most 128 characters"),
    (encode_event("start", role="secret"), "start: role: Input should be 'run', 'stage'"),
    (b'{"event": "start"}', "start: time_ns: Field required"),
    (encode_task_event(queue_ms=float("nan")), "task_processed: queue_ms: Input should be"),
    (encode_task_event(queue_ms=1e300), "task_processed: queue_ms: Input should be less than or equal to"),
    (encode_task_event(stage=None), "task_processed: stage: Input should be a valid string"),
]


def test_invalid_lines_are_counted_and_logged_without_their_content(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    for line, _ in INVALID_LINES:
        send_datagrams(receiver.path, encode_task_event(1) + line + b"\n" + encode_task_event(2))
    receiver.reader.stop()
    assert (len(receiver.events), receiver.reader.event_count) == (2 * len(INVALID_LINES), 2 * len(INVALID_LINES))
    assert receiver.reader.bad_events == len(INVALID_LINES)
    assert "secret" not in caplog.text
    for _, problem in INVALID_LINES:
        assert f"lines on the event socket are not an event: {problem}" in caplog.text


def test_oversized_datagram_is_counted_and_logged(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    receiver.receive(b"x" * (DATAGRAM_LIMIT_BYTES + 1), encode_task_event(1))
    assert caplog.messages == [f"1 datagrams of more than {DATAGRAM_LIMIT_BYTES} bytes were dropped"]
    assert (len(receiver.events), receiver.reader.bad_events) == (1, 1)


def test_flood_of_invalid_lines_is_logged_by_kind(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(300):
        send_datagrams(
            receiver.path, b"garbage\n" * 100 + encode_event(f"unknown-{number}") + encode_task_event(number)
        )
    receiver.reader.stop()
    assert (receiver.reader.event_count, len(receiver.events)) == (300, 300)
    assert receiver.reader.bad_events == 300 * 101
    assert sum(int(message.split()[0]) for message in caplog.messages) == 300 * 101
    assert len(caplog.messages) <= 2 * 300  # two kinds for each pass


def test_lines_that_do_not_fit_into_the_buffer_are_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    with short_temp_folder() as folder:
        events: list[TelemetryEvent] = []
        listener = UnixListener(folder / "events", buffer_limit_bytes=10_000)
        reader = EventReader(listener, events.extend)
        listener.open()  # without the reader, which is too slow here
        send_datagrams(listener.path, *[encode_task_event(number) * 10 for number in range(100)])
        listener.close()
        assert 0 < listener.dropped < 1000
        reader.start()
        reader.stop()
    assert len(events) + listener.dropped == 1000
    assert caplog.messages == [f"{listener.dropped} lines were dropped: events arrive faster than they are read"]
