"""Parses the events on the monitor's socket in a thread; invalid lines are counted and logged."""

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence

from brokers.errors import BadPayload
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TelemetryEvent, event_from_json
from monitor.daemon.unix_listener import UnixListener

log = logging.getLogger(__name__)

_INTERVAL_S = 0.1  # parsing each datagram as it arrives would cost a busy node more CPU
_DATAGRAMS_PER_CALL = 32  # bounds the delay and the memory of one callback
_TOO_LARGE = f"datagrams of more than {DATAGRAM_LIMIT_BYTES} bytes were dropped"
_BUFFER_FULL = "lines were dropped: events arrive faster than they are read"


class EventReader:
    """Passes the events that a listener receives to a callback, in a separate thread.

    Lifecycle: `start`, `stop`. Counts are since construction.
    """

    def __init__(self, listener: UnixListener, on_events: Callable[[Sequence[TelemetryEvent]], None]) -> None:
        self.listener = listener
        self.event_count = 0
        self._on_events = on_events
        self._invalid_lines = 0
        self._problems: Counter[str] = Counter()  # their texts are ours, with nothing that was sent
        self._logged: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event reader", daemon=True)

    @property
    def bad_events(self) -> int:
        """Invalid lines and oversized datagrams."""
        return self._invalid_lines + self.listener.too_large

    def start(self) -> None:
        """Open the socket; raises as `UnixListener.open`."""
        self.listener.open()
        self._thread.start()

    def stop(self) -> None:
        """Close the socket and parse all that was received. May be called twice, and without `start`."""
        self.listener.close()
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            stopping = self._stopping.is_set()
            while datagrams := self.listener.take(_DATAGRAMS_PER_CALL):
                self._parse(datagrams)
            self._log_problems()
            if stopping:
                return
            self._stopping.wait(_INTERVAL_S)

    def _parse(self, datagrams: Sequence[bytes]) -> None:
        events = []
        for datagram in datagrams:
            for line in datagram.split(b"\n"):
                if not line or line.isspace():
                    continue
                try:
                    events.append(event_from_json(line))
                except BadPayload as error:
                    self._invalid_lines += 1
                    self._problems[f"lines on the event socket are {error.problem}"] += 1
        self.event_count += len(events)
        if events:
            self._on_events(events)

    def _log_problems(self) -> None:
        """One line for each kind of problem since the last call; the log's rate limit bounds a flood of them."""
        self._problems[_TOO_LARGE] = self.listener.too_large
        self._problems[_BUFFER_FULL] = self.listener.dropped
        for problem, count in (self._problems - self._logged).items():
            log.warning("%d %s", count, problem)
        self._logged = self._problems.copy()
