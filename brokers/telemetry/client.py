"""Client of the monitor on this machine: sends telemetry events to its Unix socket, and never blocks its caller.

An event is appended to a bounded queue. A thread encodes the queued events as JSON lines and sends many of them in one
datagram. While the monitor is absent, slow or restarting, events wait in the queue; when the queue is full the oldest
are dropped, and their number is reported to the monitor. See brokers/telemetry/schema.py for the events.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, EventEncoder, ProcessRole, QueuedEvent

log = logging.getLogger(__name__)

SOCKET_VARIABLE = "SPARSE_MONITOR"  # the path of the monitor's socket
RUN_VARIABLE = "SPARSE_RUN"  # the name of the run that a process is part of
_SOCKET_NAME = "sparse-monitor.sock"

# "start" is for another process that cannot send it itself: a broker.
EventName = Literal["start", "task_processed", "batch_processed", "request_done", "step_done", "link_traffic"]

QUEUE_LIMIT = 8192  # about 6 MB: the events of 40 s of a worker that does 100 tasks per second
_COLLECT_S = 0.05  # events are collected this long before they are sent, unless so many are queued
_SEND_AT_ONCE = 1024
_TAKE_LIMIT = 256  # events taken from the queue at a time: usually they fit one datagram
RECONNECT_INTERVAL_S = 1.0
# Timeout of one send to a slow monitor; between two sends the thread checks whether the client was closed.
_SEND_TIMEOUT_S = 0.25
CLOSE_TIMEOUT_S = 1.0  # `close` waits this long for the queued events to be sent
# The monitor is not running, has ended, or belongs to another user: normal, and not logged.
_ABSENT_ERRNOS = frozenset(
    {errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.EACCES}
)


def socket_path(environment: Mapping[str, str]) -> Path:
    """The monitor's socket: SPARSE_MONITOR, else in XDG_RUNTIME_DIR, else in a temporary folder of the user."""
    if path := environment.get(SOCKET_VARIABLE):
        return Path(path)
    if folder := environment.get("XDG_RUNTIME_DIR"):
        return Path(folder) / _SOCKET_NAME
    return Path(tempfile.gettempdir()) / f"sparse-{os.getuid()}" / _SOCKET_NAME


def event_client_from_environment(
    environment: Mapping[str, str],
    role: ProcessRole,
    name: str,
    *,
    site: str = "",
    pipeline: str = "",
    **work_fields: str,
) -> EventClient:
    """A client for this process, as part of the run that the environment names.

    `work_fields` are `stage` and `worker`, or `source`.
    """
    common_fields = {"run": environment.get(RUN_VARIABLE, ""), "site": site, "pipeline": pipeline}
    return EventClient(socket_path(environment), role, name, common_fields, work_fields)


class EventClient:
    """Sends the events of one process, or of one worker or source in it. Thread-safe.

    `common_fields` are part of each event, `work_fields` of those about work. `path` is the monitor's socket, which
    need not exist; without a path events are discarded. `dropped` counts events that the monitor does not know of yet.
    """

    def __init__(
        self,
        path: Path | None = None,
        role: ProcessRole = "other",
        name: str = "",
        common_fields: Mapping[str, str] | None = None,
        work_fields: Mapping[str, str] | None = None,
    ) -> None:
        self.dropped = 0
        self._path = path
        self._process_fields: dict[str, Any] = {"role": role, "name": name, "pid": os.getpid()}
        self._encoder = EventEncoder(common_fields or {}, work_fields or {})
        self._queue: deque[QueuedEvent] = deque()
        self._taken: list[QueuedEvent] = []  # by the thread, from the queue, and not sent yet
        self._lock = threading.Lock()  # never held while an event is encoded or sent
        self._latest_ns = 0
        self._has_events = threading.Event()
        self._has_many_events = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._connect_tried_s = float("-inf")
        self._is_error_logged = False

    def __enter__(self) -> EventClient:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start the thread, and send `start`."""
        if self._path is None or self._thread:
            return
        self._thread = threading.Thread(target=self._run, name=f"events-{self._process_fields['name']}", daemon=True)
        self._put("start", None, self._process_fields)
        self._thread.start()

    def emit(self, event: EventName, *, time_ns: int | None = None, **fields: Any) -> None:
        """Queue an event with its fields (brokers/telemetry/schema.py): a few microseconds, no wait, no error.

        `time_ns`, from `now_ns`, is the time of the event if it is not now. Values of type bytes, such as a request id,
        are written in hexadecimal digits.
        """
        if self._thread:
            self._put(event, time_ns, fields)

    def now_ns(self) -> int:
        """Unix time in nanoseconds, never the same twice: a database identifies events of one worker by their time."""
        with self._lock:
            return self._next_ns()

    def close(self) -> None:
        """Send `stop` and the queued events, for at most CLOSE_TIMEOUT_S, and end the thread. May be called twice."""
        thread = self._thread
        self._thread = None
        if thread is None:
            return
        self._put("stop", None, self._process_fields)
        self._deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for event in (self._closing, self._has_events, self._has_many_events):
            event.set()
        thread.join()

    def _next_ns(self) -> int:
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns

    def _put(self, event: str, time_ns: int | None, fields: Mapping[str, Any]) -> None:
        with self._lock:
            if len(self._queue) >= QUEUE_LIMIT:
                self._queue.popleft()
                self.dropped += 1
            self._queue.append((event, self._next_ns() if time_ns is None else time_ns, fields))
            count = len(self._queue)
        if not self._has_events.is_set():
            self._has_events.set()
        if count >= _SEND_AT_ONCE and not self._has_many_events.is_set():
            self._has_many_events.set()

    def _run(self) -> None:
        while not self._closing.is_set():
            self._has_events.wait()
            self._has_many_events.wait(_COLLECT_S)
            self._has_events.clear()
            self._has_many_events.clear()
            while not self._flush() and not self._closing.is_set():
                if self._socket is None:
                    self._closing.wait(RECONNECT_INTERVAL_S)
        self._connect_tried_s = float("-inf")
        while not self._flush() and self._socket is not None and time.monotonic() < self._deadline_s:
            pass  # the send timed out: a slow monitor
        self._disconnect()

    def _flush(self) -> bool:
        """Send the queued events; False if the monitor is absent or slow, and events are still queued."""
        while self._send_drop_count():
            if not self._taken:
                with self._lock:
                    self._taken = [self._queue.popleft() for _ in range(min(_TAKE_LIMIT, len(self._queue)))]
            if not self._taken:
                return True
            for datagram, count in self._encoder.encode_datagrams(self._taken):
                if not self._send(datagram, count):
                    return False
                self._taken = self._taken[count:]
            if time.monotonic() >= self._deadline_s:
                break
        return False

    def _send_drop_count(self) -> bool:
        with self._lock:
            dropped = self.dropped
            now_ns = self._next_ns()
        if dropped:
            if not self._send(self._encoder.encode_line(("events_dropped", now_ns, {"count": dropped})), 0):
                return False
            with self._lock:
                self.dropped -= dropped
        return True

    def _send(self, datagram: bytes, count: int) -> bool:
        """Send a datagram of `count` events; False if it must be tried again later.

        An empty datagram, and one that the system refuses for its size, count as dropped.
        """
        while datagram:
            if not self._connect():
                return False
            assert self._socket is not None
            try:
                self._socket.send(datagram)
                return True
            except TimeoutError:
                return False
            except OSError as error:
                self._log_once(error)
                if error.errno == errno.EMSGSIZE:
                    break
                self._disconnect()  # a monitor that has restarted is found by the next attempt
        with self._lock:
            self.dropped += count
        return True

    def _connect(self) -> bool:
        """Connect unless connected; at most once in RECONNECT_INTERVAL_S."""
        if self._socket is not None:
            return True
        now_s = time.monotonic()
        if now_s - self._connect_tried_s < RECONNECT_INTERVAL_S:
            return False
        self._connect_tried_s = now_s
        connecting = None
        try:
            connecting = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            connecting.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * DATAGRAM_LIMIT_BYTES)
            connecting.settimeout(_SEND_TIMEOUT_S)
            connecting.connect(str(self._path))
        except OSError as error:  # also without a free file descriptor
            if connecting is not None:
                connecting.close()
            self._log_once(error)
            return False
        self._socket = connecting
        return True

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _log_once(self, error: OSError) -> None:
        if error.errno not in _ABSENT_ERRNOS and not self._is_error_logged:
            self._is_error_logged = True
            log.warning("telemetry events cannot be sent to the monitor at %s: %s", self._path, error)
