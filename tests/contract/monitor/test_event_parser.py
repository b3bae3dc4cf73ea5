"""Lines on the socket of events, good and bad: what is read, what is counted, and what a log says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TaskProcessed, TelemetryEvent
from monitor.daemon.event_parser import EventReader
from monitor.daemon.unix_listener import UnixListener
from tests.support.monitor.unix_client import encode_event, encode_task_event, send_datagrams, short_temp_folder
from tests.support.pipelines.processes import eventually


class Ear:
    """A reader, and all that it has heard."""

    def __init__(self, path: Path) -> None:
        self.heard: list[TelemetryEvent] = []
        self.reader = EventReader(UnixListener(path), self.heard.extend)
        self.reader.start()


@pytest.fixture(name="ear")
def _ear() -> Iterator[Ear]:
    with short_temp_folder() as folder:
        ear = Ear(folder / "events")
        yield ear
        ear.reader.stop()


def test_one_datagram_holds_one_event_or_many(ear: Ear) -> None:
    send_datagrams(
        ear.reader.listener.path,
        encode_task_event(1),
        encode_task_event(2) + b"\n \r\n" + encode_task_event(3),
        encode_task_event(4).rstrip(),
    )
    eventually("four events", lambda: ear.reader.event_count == 4)
    requests = [each.request for each in ear.heard if isinstance(each, TaskProcessed)]
    assert requests == [f"{number:032x}" for number in (1, 2, 3, 4)]
    assert ear.reader.bad_events == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
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
    ],
    # A line says what time it is, which no two processes of pytest would agree on.
    ids=lambda value: value if isinstance(value, str) else "line",
)  # fmt: skip
def test_a_line_that_is_no_event_is_counted_and_said_without_what_it_held(
    ear: Ear, line: bytes, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    send_datagrams(ear.reader.listener.path, encode_task_event(1) + line + b"\n" + encode_task_event(2))
    eventually("a line in the log", lambda: caplog.messages)
    assert (len(ear.heard), ear.reader.event_count, ear.reader.bad_events) == (2, 2, 1)
    assert caplog.messages[0].startswith(f"a line on the socket is not an event: {said}")
    assert "secret" not in caplog.text


def test_a_datagram_that_is_too_large_is_counted_and_said(ear: Ear, caplog: pytest.LogCaptureFixture) -> None:
    send_datagrams(ear.reader.listener.path, b"x" * (DATAGRAM_LIMIT_BYTES + 1), encode_task_event(1))
    eventually("the event after it", lambda: ear.heard)
    eventually("a line in the log", lambda: caplog.messages)
    assert caplog.messages == [f"a datagram of more than {DATAGRAM_LIMIT_BYTES} bytes was thrown away"]
    assert ear.reader.bad_events == 1


def test_a_flood_of_garbage_is_one_line_a_kind_and_takes_nothing_from_the_rest(
    ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(300):
        send_datagrams(
            ear.reader.listener.path, b"garbage\n" * 100 + encode_event(f"unknown-{number}") + encode_task_event(number)
        )
    eventually("all of it", lambda: ear.reader.event_count == 300 and ear.reader.bad_events == 300 * 101)
    eventually("all events", lambda: len(ear.heard) == 300)
    eventually("what is wrong with them", lambda: len(caplog.messages) >= 2)
    assert len(caplog.messages) < 20  # two, and two more for each 10 s that a busy machine takes


def test_what_memory_has_no_room_for_is_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with short_temp_folder() as folder:
        heard: list[TelemetryEvent] = []
        door = UnixListener(folder / "events", buffer_limit_bytes=10_000)
        reader = EventReader(door, heard.extend)
        door.open()  # not the reader: it is busy, as it were
        send_datagrams(door.path, *[encode_task_event(number) * 10 for number in range(100)])
        door.close()
        assert 0 < door.dropped < 1000
        reader.start()
        reader.stop()
        assert len(heard) + reader.dropped == 1000
        assert caplog.messages[0].startswith("events came faster than they could be read: lines were thrown away")
