"""Reads the events that come through the door, in a thread of its own: what is none is counted, and said sparingly."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

from brokers.errors import BadPayload
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TelemetryEvent, event_from_json
from monitor.daemon.complaints import ErrorCounts
from monitor.daemon.unix_listener import UnixListener

log = logging.getLogger(__name__)

# Reading at each datagram would cost a busy node more than it hears.
_EVERY_S = 0.1
# At a time, so that what is read is passed on in good time, and memory holds it once.
_DATAGRAMS = 32
_TOO_LARGE = f"a datagram of more than {DATAGRAM_LIMIT_BYTES} bytes was thrown away"
_NO_ROOM = "events came faster than they could be read: lines were thrown away"

EventCallback = Callable[[Sequence[TelemetryEvent]], None]


class EventReader:
    """Life: `start`, `stop`. Counts are since it was made."""

    def __init__(self, listener: UnixListener, on_events: EventCallback) -> None:
        self.listener = listener
        self.event_count = 0
        self._heard = on_events
        self._bad = ErrorCounts()
        self._no_room = ErrorCounts()
        self._told_too_large = 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event reader", daemon=True)

    @property
    def bad_events(self) -> int:
        """Lines, and datagrams that were too large."""
        return self._bad.total

    @property
    def dropped(self) -> int:
        """Lines that memory had no room for."""
        return self.listener.dropped

    def start(self) -> None:
        """Open the door; raises as `UnixListener.open`."""
        self.listener.open()
        self._thread.start()

    def stop(self) -> None:
        """Close the door, and read what has come in. May be called twice, and without `start`."""
        self.listener.close()
        self._leaving.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            left = self._leaving.is_set()
            while datagrams := self.listener.take(_DATAGRAMS):
                self._read(datagrams)
            self._complain(time.monotonic())
            if left:
                return
            self._leaving.wait(_EVERY_S)

    def _read(self, datagrams: Sequence[bytes]) -> None:
        events = []
        for datagram in datagrams:
            for line in datagram.split(b"\n"):
                if not line or line.isspace():
                    continue
                try:
                    events.append(event_from_json(line))
                except BadPayload as error:
                    self._bad.add(f"a line on the socket is {error.problem}")
        self.event_count += len(events)
        if events:
            self._heard(events)

    def _complain(self, now_s: float) -> None:
        if new := self.listener.too_large - self._told_too_large:
            self._told_too_large += new
            self._bad.add(_TOO_LARGE, new)
        if new := self.listener.dropped - self._no_room.total:
            self._no_room.add(_NO_ROOM, new)
        for line in (*self._bad.due_lines(now_s), *self._no_room.due_lines(now_s)):
            log.warning("%s", line)
