"""The Unix datagram socket for events: read at once into a bounded buffer, so that no sender waits, and then parsed.

A lock file beside the socket, held while the daemon runs, distinguishes a stale socket from one in use. Connecting to
the socket to find out would be a race between two daemons that start over a stale one.
"""

import contextlib
import logging
import os
import select
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from brokers.errors import BadPayload
from brokers.process.files import file_lock
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TelemetryEvent, event_from_json
from monitor.errors import SocketUnavailable

log = logging.getLogger(__name__)

BUFFER_LIMIT_BYTES = 64 << 20  # a minute of 20,000 events a second has some 300 MB; a pause is shorter
_DATAGRAM_OVERHEAD_BYTES = 64  # memory of a datagram object, so that empty ones count too
_RECEIVE_BUFFER_BYTES = 4 << 20  # of the kernel, on other systems than Linux, which has the buffer at the sender
PATH_LIMIT_BYTES = 107  # of `sockaddr_un` without its final zero on Linux
_CLOSE_CHECK_S = 1.0  # where a shutdown does not wake the thread, as it does on Linux
_PARSE_INTERVAL_S = 0.1  # parsing each datagram as it arrives would cost a busy node more CPU
_DATAGRAMS_PER_CALL = 32  # bounds the delay and the memory of one callback
_TOO_LARGE = f"datagrams of more than {DATAGRAM_LIMIT_BYTES} bytes were dropped"
_BUFFER_FULL = "lines were dropped: events arrive faster than they are read"


class UnixListener:
    """Receives datagrams in a separate thread. Lifecycle: `open`, `take`, `close`."""

    def __init__(self, path: Path, buffer_limit_bytes: int = BUFFER_LIMIT_BYTES) -> None:
        self.path = path
        self.dropped = 0  # lines that did not fit into the buffer
        self.too_large = 0  # datagrams over DATAGRAM_LIMIT_BYTES
        self._buffer_limit_bytes = buffer_limit_bytes
        self._datagrams: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._mutex = threading.Lock()
        self._closing = threading.Event()
        self._resources = contextlib.ExitStack()

    def open(self) -> None:
        """Listen; a missing folder is created for its owner only. Raises `SocketUnavailable`."""
        receiver = self._resources.enter_context(_bound_socket(self.path))
        thread = threading.Thread(target=self._receive, args=(receiver,), name="event listener", daemon=True)
        thread.start()
        self._resources.callback(thread.join)
        self._resources.callback(_wake, receiver)
        self._resources.callback(self._closing.set)

    def take(self, at_most: int) -> list[bytes]:
        """Remove and return the oldest datagrams of the buffer."""
        with self._mutex:
            datagrams = [self._datagrams.popleft() for _ in range(min(at_most, len(self._datagrams)))]
            self._buffered_bytes -= sum(len(datagram) + _DATAGRAM_OVERHEAD_BYTES for datagram in datagrams)
        return datagrams

    def close(self) -> None:
        """Receive all sent datagrams, then remove the socket; the buffer can still be read. May be called twice."""
        self._resources.close()

    def _receive(self, receiver: socket.socket) -> None:
        """Read the socket until `close`: few datagrams fit into it (on Linux `net.unix.max_dgram_qlen`, 10)."""
        buffer = memoryview(bytearray(DATAGRAM_LIMIT_BYTES))
        while True:
            closing = self._closing.is_set()
            try:
                length, _, flags, _ = receiver.recvmsg_into([buffer])
            except BlockingIOError:
                if closing:
                    return
                select.select([receiver], [], [], _CLOSE_CHECK_S)
                continue
            except OSError:
                log.exception("the event socket failed: no more events are received")
                return
            if flags & socket.MSG_TRUNC:
                self.too_large += 1
            else:
                self._append(bytes(buffer[:length]))

    def _append(self, datagram: bytes) -> None:
        size_bytes = len(datagram) + _DATAGRAM_OVERHEAD_BYTES
        with self._mutex:
            if self._buffered_bytes + size_bytes > self._buffer_limit_bytes:
                self.dropped += len(datagram.splitlines())
                return
            self._datagrams.append(datagram)
            self._buffered_bytes += size_bytes


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
            self._stopping.wait(_PARSE_INTERVAL_S)

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


def _wake(receiver: socket.socket) -> None:
    """End the wait of the thread that receives; the datagrams sent before can still be received."""
    with contextlib.suppress(OSError):  # other systems than Linux
        receiver.shutdown(socket.SHUT_RD)


@contextlib.contextmanager
def _bound_socket(path: Path) -> Iterator[socket.socket]:
    """A locked socket that only its owner may write to; removed at the end. Raises `SocketUnavailable`."""
    if len(os.fsencode(path)) > PATH_LIMIT_BYTES:
        raise _bad_socket(path, f"the path of a socket has at most {PATH_LIMIT_BYTES} bytes")
    if path.is_symlink() or (path.exists() and not path.is_socket()):
        raise _bad_socket(path, "a file of this name exists and is not a socket")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with file_lock(path.with_name(f"{path.name}.lock"), wait=False) as lock:
            os.fchmod(lock.fileno(), 0o600)
            if path.is_socket():  # of a daemon that was killed
                path.unlink()
            with _bind(path) as receiver:
                yield receiver
                path.unlink(missing_ok=True)
    except BlockingIOError:
        message = (
            f"{path}: another monitor uses this socket: stop it, or choose another with --socket "
            "(and SPARSE_MONITOR for the senders)"
        )
        raise SocketUnavailable("SocketTaken", message, path=path) from None
    except OSError as error:
        raise _bad_socket(path, (error.strerror or str(error)).lower()) from error


def _bind(path: Path) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        with contextlib.suppress(OSError):
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER_BYTES)
        receiver.setblocking(False)
        os.fchmod(receiver.fileno(), 0o600)  # Linux binds with this mode, so others can write at no time
        receiver.bind(str(path))
        path.chmod(0o600)  # for other systems
    except OSError:
        receiver.close()
        raise
    return receiver


def _bad_socket(path: Path, problem: str) -> SocketUnavailable:
    return SocketUnavailable("BadSocket", f"{path}: cannot receive events there: {problem}", path=path, problem=problem)
