"""The Unix datagram socket for events: read at once into a bounded buffer, so that no sender waits.

A lock file beside the socket, held while the daemon runs, tells a stale socket from one in use. Connecting to the
socket to find out would be a race between two daemons that start over a stale one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import socket
import stat
import threading
from collections import deque
from pathlib import Path

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES
from monitor.errors import SocketUnavailable

log = logging.getLogger(__name__)

BUFFER_LIMIT_BYTES = 64 << 20  # a minute of 20,000 events a second has some 300 MB; a pause is shorter
_DATAGRAM_OVERHEAD_BYTES = 64  # memory of a datagram object, so that empty ones count too
_RECEIVE_BUFFER_BYTES = 4 << 20  # of the kernel, on other systems than Linux, which has the buffer at the sender
PATH_LIMIT_BYTES = 107  # of `sockaddr_un` without its final zero on Linux


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
        self._lock_file: int | None = None
        self._created_folder = False
        self._socket: socket.socket | None = None
        self._wake_pipe = (-1, -1)
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Listen; a missing folder is created for its owner only. Raises `SocketUnavailable`."""
        if len(os.fsencode(self.path)) > PATH_LIMIT_BYTES:
            raise _bad_socket(self.path, f"the path of a socket has at most {PATH_LIMIT_BYTES} bytes")
        try:
            self._created_folder = not self.path.parent.exists()
            self._lock_file = _lock(self.path)
            _remove_stale(self.path)
            self._socket = _bind(self.path)
        except OSError as error:
            self._release()
            raise _bad_socket(self.path, (error.strerror or str(error)).lower()) from error
        except SocketUnavailable:
            self._release()
            raise
        self._wake_pipe = os.pipe()
        self._thread = threading.Thread(target=self._receive, name="event listener", daemon=True)
        self._thread.start()

    def take(self, at_most: int) -> list[bytes]:
        """Remove and return the oldest datagrams of the buffer."""
        with self._mutex:
            datagrams = [self._datagrams.popleft() for _ in range(min(at_most, len(self._datagrams)))]
            self._buffered_bytes -= sum(len(datagram) + _DATAGRAM_OVERHEAD_BYTES for datagram in datagrams)
        return datagrams

    def close(self) -> None:
        """Receive all sent datagrams, then remove the socket; the buffer can still be read. May be called twice."""
        if self._thread is not None:
            os.write(self._wake_pipe[1], b"\0")
            self._thread.join()
            self._thread = None
            for end in self._wake_pipe:
                os.close(end)
        self._release()

    def _release(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)
        if self._lock_file is not None:
            # Removed while it is locked: a daemon that waits for it sees another file, or none, and creates one.
            with contextlib.suppress(OSError):
                _lock_path(self.path).unlink(missing_ok=True)
            os.close(self._lock_file)
            self._lock_file = None
            if self._created_folder:
                with contextlib.suppress(OSError):  # not empty: others use it
                    self.path.parent.rmdir()

    def _receive(self) -> None:
        """Read the socket until `close`: few datagrams fit into it (on Linux `net.unix.max_dgram_qlen`, 10)."""
        assert self._socket is not None
        receiver = self._socket
        buffer = memoryview(bytearray(DATAGRAM_LIMIT_BYTES))
        poll = select.poll()
        for descriptor in (receiver.fileno(), self._wake_pipe[0]):
            poll.register(descriptor, select.POLLIN)
        closing = False
        while True:
            try:
                length, _, flags, _ = receiver.recvmsg_into([buffer])
            except BlockingIOError:
                if closing:
                    return
                closing = any(descriptor == self._wake_pipe[0] for descriptor, _ in poll.poll())
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


def _bad_socket(path: Path, problem: str) -> SocketUnavailable:
    return SocketUnavailable("BadSocket", f"{path}: cannot receive events there: {problem}", path=path, problem=problem)


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


# Not `brokers.process.files.file_lock`: this one follows no link in a shared folder, and leaves no file behind.
def _lock(path: Path) -> int:
    """Lock the file beside a socket, until the returned descriptor is closed."""
    lock_path = _lock_path(path)
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # a daemon that ends has removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), lock_path.stat()):
                return descriptor
        except FileNotFoundError:  # its previous owner has removed it
            pass
        except BlockingIOError:
            os.close(descriptor)
            message = (
                f"{path}: another monitor uses this socket: stop it, or choose another with --socket "
                "(and SPARSE_MONITOR for the senders)"
            )
            raise SocketUnavailable("SocketTaken", message, path=path) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed; any other file is kept, and an error."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise _bad_socket(path, "a file of this name exists and is not a socket")
    path.unlink()


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
