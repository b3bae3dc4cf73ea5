"""The Unix socket on which a daemon hears events: emptied at once into bounded memory, so that no sender waits.

A lock beside the socket, held for as long as the daemon lives, tells a socket that a dead daemon left from one that is
in use: to ask the socket itself would be a race between two daemons that both find a dead one.
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
from monitor.errors import BadSocket, SocketTaken

log = logging.getLogger(__name__)

# Datagrams that wait to be read, in bytes: a minute of 20,000 events a second has some 300 MB, a pause is shorter.
BUFFER_LIMIT_BYTES = 64 << 20
_OVERHEAD_BYTES = 64  # of a datagram in memory, so that empty ones do not count as nothing
# Linux counts what waits in a Unix socket on the sender's side; others count it here.
_BUFFER_BYTES = 4 << 20
# Of a `sockaddr_un`, on the narrowest of systems less; Linux takes 108 with the zero at the end.
PATH_LIMIT_BYTES = 107


class UnixListener:
    """Takes datagrams in. Life: `open`, `take`, `close`."""

    def __init__(self, path: Path, buffer_limit_bytes: int = BUFFER_LIMIT_BYTES) -> None:
        self.path = path
        self.dropped = 0  # lines that memory had no room for
        self.too_large = 0  # datagrams
        self._room_bytes = buffer_limit_bytes
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._mutex = threading.Lock()
        self._lock: int | None = None
        self._made_folder = False
        self._socket: socket.socket | None = None
        self._wake = (-1, -1)
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Listen; a folder that is not there is made, for its owner alone. Raises `SocketTaken` or `BadSocket`."""
        if len(os.fsencode(self.path)) > PATH_LIMIT_BYTES:
            raise BadSocket(str(self.path), f"a socket's path has at most {PATH_LIMIT_BYTES} bytes")
        try:
            self._made_folder = not self.path.parent.exists()
            self._lock = _hold(self.path)
            _clear(self.path)
            self._socket = _listening(self.path)
        except OSError as error:
            self._let_go()
            raise BadSocket(str(self.path), (error.strerror or str(error)).lower()) from error
        except BadSocket:
            self._let_go()
            raise
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._read, name="event door", daemon=True)
        self._thread.start()

    def take(self, at_most: int) -> list[bytes]:
        """The oldest datagrams that wait; none, where none does."""
        with self._mutex:
            taken = [self._waiting.popleft() for _ in range(min(at_most, len(self._waiting)))]
            self._waiting_bytes -= sum(len(datagram) + _OVERHEAD_BYTES for datagram in taken)
        return taken

    def close(self) -> None:
        """Take in what has been sent, and leave nothing behind but what waits to be taken. May be called twice."""
        if self._thread is not None:
            os.write(self._wake[1], b"\0")
            self._thread.join()
            self._thread = None
            for end in self._wake:
                os.close(end)
        self._let_go()

    def _let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            self.path.unlink(missing_ok=True)
        if self._lock is not None:
            # While it is held: who waits for it sees that it is no longer the file of that name, and makes another.
            with contextlib.suppress(OSError):
                _lock_file(self.path).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None
            if self._made_folder:
                with contextlib.suppress(OSError):  # others use it by now
                    self.path.parent.rmdir()

    def _read(self) -> None:
        """The thread's work: to be at the socket again as soon as can be, since few datagrams wait there.

        On Linux it is `net.unix.max_dgram_qlen`, 10 unless set.
        """
        assert self._socket is not None
        listening = self._socket
        buffer = memoryview(bytearray(DATAGRAM_LIMIT_BYTES))
        poll = select.poll()
        for file in (listening.fileno(), self._wake[0]):
            poll.register(file, select.POLLIN)
        leaving = False
        while True:
            try:
                length, _, flags, _ = listening.recvmsg_into([buffer])
            except BlockingIOError:
                if leaving:
                    return
                leaving = any(file == self._wake[0] for file, _ in poll.poll())
                continue
            except OSError:
                log.exception("the socket of events failed: none is heard any more")
                return
            if flags & socket.MSG_TRUNC:
                self.too_large += 1
            else:
                self._keep(bytes(buffer[:length]))

    def _keep(self, datagram: bytes) -> None:
        needed_bytes = len(datagram) + _OVERHEAD_BYTES
        with self._mutex:
            if self._waiting_bytes + needed_bytes > self._room_bytes:
                self.dropped += len(datagram.splitlines())
                return
            self._waiting.append(datagram)
            self._waiting_bytes += needed_bytes


def _lock_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _hold(path: Path) -> int:
    """The lock beside a socket, held until its file is closed; raises `SocketTaken`."""
    lock = _lock_file(path)
    while True:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # a daemon that ends has taken its folder away
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file), lock.stat()):
                return file
        except FileNotFoundError:  # whoever held it took it away
            pass
        except BlockingIOError:
            os.close(file)
            raise SocketTaken(str(path)) from None
        except OSError:
            os.close(file)
            raise
        os.close(file)


def _clear(path: Path) -> None:
    """Take away what a dead daemon left; raises `BadSocket` for a file of any other kind."""
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise BadSocket(str(path), "there is a file of that name, and it is no socket")
    path.unlink()


def _listening(path: Path) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        found.setblocking(False)
        os.fchmod(found.fileno(), 0o600)  # Linux binds it with this mode: there is no moment at which others may write
        found.bind(str(path))
        path.chmod(0o600)  # what other systems need
    except OSError:
        found.close()
        raise
    return found
