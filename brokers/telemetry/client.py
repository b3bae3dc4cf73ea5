"""By which any process tells the monitor of its node what happens in it: see brokers/telemetry/schema.py.

Who tells never waits: an event is put into a bounded queue, as it is, and a thread makes JSON lines of what waits and
sends many in one datagram. Whether a monitor is there, slow, or killed and started again, concerns that thread only:
what it cannot pass on waits, the oldest go when that is too much, and the monitor is told how many went.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from brokers.telemetry.encoding import EventEncoder, QueuedEvent
from brokers.telemetry.event_socket import RUN_VARIABLE, socket_path
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, ProcessRole

log = logging.getLogger(__name__)

# `start` is of another process, which cannot say it itself: a broker.
EventName = Literal["start", "task_processed", "batch_processed", "request_done", "step_done", "link_traffic"]

# About 6 MB: a worker that does 100 tasks a second tells so much in 40 s.
QUEUE_LIMIT = 8192
# How long what is told is gathered; when so many wait, they go at once.
_GATHER_S = 0.05
_MANY = 1024
# So many are taken from the queue at a time: most often they fit one datagram.
_TAKEN_AT_ONCE = 256
# How often a monitor that is not there is looked for.
RECONNECT_INTERVAL_S = 1.0
# So long a slow monitor is waited for, before it is seen that the client is to end.
_SEND_S = 0.25
# What still waits then may take so long, if somebody listens.
CLOSE_TIMEOUT_S = 1.0
# No monitor, or one that has gone, or that is another user's: nothing that anybody needs to hear of.
_NOBODY = frozenset({errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENOTCONN, errno.EPIPE, errno.EACCES})


def event_client_from_environment(
    environment: Mapping[str, str],
    role: ProcessRole,
    name: str,
    *,
    site: str = "",
    pipeline: str = "",
    **work_fields: str,
) -> EventClient:
    """A client of this process for the monitor of this node, as part of the run that the environment names.

    `own` is of what tells: `stage` and `worker`, or `source`.
    """
    common = {"run": environment.get(RUN_VARIABLE, ""), "site": site, "pipeline": pipeline}
    return EventClient(socket_path(environment), role, name, common, work_fields)


class EventClient:
    """Tells events of one process, or of one worker or source in it. Any thread of it may tell.

    `common` stands in each event, `own` in those of work besides. `path` is the monitor's socket, which need not be
    there; without one nobody is told.
    """

    def __init__(
        self,
        path: Path | None = None,
        role: ProcessRole = "other",
        name: str = "",
        common_fields: Mapping[str, str] | None = None,
        work_fields: Mapping[str, str] | None = None,
    ) -> None:
        self.dropped = 0  # events that nobody has been told of yet
        self._path = path
        self._life: dict[str, Any] = {"role": role, "name": name, "pid": os.getpid()}
        self._lines = EventEncoder(common_fields or {}, work_fields or {})
        self._waiting: deque[QueuedEvent] = deque()
        self._lock = threading.Lock()  # held for some assignments, never while anything is made or sent
        self._latest_ns = 0
        self._some, self._many, self._closing = threading.Event(), threading.Event(), threading.Event()
        self._deadline_s = float("inf")
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self._looked_s = float("-inf")
        self._complained = False

    def __enter__(self) -> EventClient:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Begin, and say so: `start`."""
        if self._path is None or self._thread:
            return
        self._thread = threading.Thread(target=self._run, name=f"events-{self._life['name']}", daemon=True)
        self._put("start", None, self._life)
        self._thread.start()

    def emit(self, event: EventName, *, time_ns: int | None = None, **fields: Any) -> None:
        """Have an event told, with its figures as in brokers/telemetry/schema.py: a few microseconds, no wait, no error.

        `time_ns`, as `now_ns` gave it, is when it was, if not now. What an event has of text may be bytes, such as an
        id, which is written in hexadecimal digits.
        """
        if self._thread:
            self._put(event, time_ns, fields)

    def now_ns(self) -> int:
        """Unix time. No two are alike: two events of one worker at one time would be one point in a database."""
        with self._lock:
            return self._next_ns()

    def close(self) -> None:
        """Say `stop`, pass on what waits if somebody listens, for at most a second, and end. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._put("stop", None, self._life)
        self._deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
        for event in (self._closing, self._some, self._many):
            event.set()
        thread.join()

    def _next_ns(self) -> int:
        self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
        return self._latest_ns

    def _put(self, event: str, time_ns: int | None, figures: Mapping[str, Any]) -> None:
        with self._lock:
            if len(self._waiting) >= QUEUE_LIMIT:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append((event, self._next_ns() if time_ns is None else time_ns, figures))
            count = len(self._waiting)
        if not self._some.is_set():
            self._some.set()
        if count >= _MANY and not self._many.is_set():
            self._many.set()

    # The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Pass on what is told until the client is closed."""
        while not self._closing.is_set():
            self._some.wait()
            self._many.wait(_GATHER_S)
            self._some.clear()
            self._many.clear()
            while not self._pass_on() and not self._closing.is_set():
                if self._socket is None:
                    self._closing.wait(RECONNECT_INTERVAL_S)
        self._looked_s = float("-inf")
        while not self._pass_on() and self._socket is not None and time.monotonic() < self._deadline_s:
            pass  # it is slow, and has been waited for
        self._hang_up()

    def _pass_on(self) -> bool:
        """Send what waits; False when that does not go, or not at once: it waits still, then."""
        while self._tell_drops():
            told = self._take()
            if not told:
                return True
            for datagram, count in self._lines.encode_datagrams(told):
                if not self._send(datagram, count):
                    self._put_back(told)
                    return False
                told = told[count:]
            if time.monotonic() >= self._deadline_s:
                break
        return False

    def _take(self) -> list[QueuedEvent]:
        with self._lock:
            return [self._waiting.popleft() for _ in range(min(_TAKEN_AT_ONCE, len(self._waiting)))]

    def _put_back(self, told: Sequence[QueuedEvent]) -> None:
        """They were taken, and could not go: the oldest of all, which go first when there is no room any more."""
        with self._lock:
            excess = max(0, len(told) + len(self._waiting) - QUEUE_LIMIT)
            self.dropped += min(excess, len(told))
            self._waiting.extendleft(reversed(told[excess:]))

    def _tell_drops(self) -> bool:
        with self._lock:
            dropped, now_ns = self.dropped, self._next_ns()
        if dropped:
            if not self._send(self._lines.encode_line(("events_dropped", now_ns, {"count": dropped})), 0):
                return False
            with self._lock:
                self.dropped -= dropped
        return True

    def _send(self, datagram: bytes, count: int) -> bool:
        """Whether it is done with: somebody has it now, or nobody could have it; its `count` events are lost then."""
        while datagram:
            if not self._look():
                return False
            assert self._socket is not None
            try:
                self._socket.send(datagram)
                return True
            except TimeoutError:
                return False
            except OSError as error:
                self._complain(error)
                if error.errno == errno.EMSGSIZE:
                    break
                self._hang_up()  # a monitor that was started again is found at once, if it was not just looked for
        with self._lock:
            self.dropped += count
        return True

    def _look(self) -> bool:
        """Whether there is a line to a monitor. One that was not there is not looked for again at once."""
        if self._socket is not None:
            return True
        now_s = time.monotonic()
        if now_s - self._looked_s < RECONNECT_INTERVAL_S:
            return False
        self._looked_s = now_s
        line = None
        try:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * DATAGRAM_LIMIT_BYTES)
            line.settimeout(_SEND_S)
            line.connect(str(self._path))
        except OSError as error:  # this process may have no descriptor left, too
            if line is not None:
                line.close()
            self._complain(error)
            return False
        self._socket = line
        return True

    def _hang_up(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _complain(self, error: OSError) -> None:
        """Once: what keeps a monitor from being told is no reason to fill a log."""
        if error.errno not in _NOBODY and not self._complained:
            self._complained = True
            log.warning("the monitor at %s is not told what happens here: %s", self._path, error)
