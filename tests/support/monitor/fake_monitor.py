"""A stand-in for the monitor: a socket that keeps the events it receives."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, TelemetryEvent, event_from_json


class FakeMonitor:
    """Receives at `path` in a thread, within its context. `events` are in the order of arrival."""

    def __init__(self, path: Path, *, paused: bool = False) -> None:
        self.path = path
        self.events: list[TelemetryEvent] = []
        self.datagram_sizes: list[int] = []  # in bytes
        self._reading = threading.Event()
        if not paused:
            self._reading.set()

    def __enter__(self) -> FakeMonitor:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0.05)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._receive, name="fake-monitor")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.path.unlink(missing_ok=True)

    def resume(self) -> None:
        """Start to read, if the monitor was created as paused."""
        self._reading.set()

    def kill(self) -> None:
        """Close as after a SIGKILL: the socket's file stays, and datagrams in its buffer are lost."""
        self._closing.set()
        self._reading.set()
        self._thread.join()
        self._socket.close()

    def events_of_kind(self, *kinds: str) -> list[TelemetryEvent]:
        """The events of these kinds so far."""
        return [event for event in list(self.events) if event.event in kinds]

    def _receive(self) -> None:
        self._reading.wait()
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                datagram = self._socket.recv(2 * DATAGRAM_LIMIT_BYTES)
                self.datagram_sizes.append(len(datagram))
                self.events += [event_from_json(line) for line in datagram.splitlines()]


@contextlib.contextmanager
def monitor_socket_path() -> Iterator[Path]:
    """A path for the socket of a monitor; the path of a socket has at most 107 bytes."""
    folder = tempfile.mkdtemp(prefix=f"sparse-{os.getpid()}-", dir="/tmp")
    try:
        yield Path(folder) / "monitor.sock"
    finally:
        shutil.rmtree(folder)
