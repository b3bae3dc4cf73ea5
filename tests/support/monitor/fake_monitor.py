"""A stand-in for the monitor: a socket at its place that keeps what it is told, and does nothing else."""

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
    """Listens at `path` while it is entered, in a thread of its own. `events`: what it was told, in that order."""

    def __init__(self, path: Path, *, paused: bool = False) -> None:
        self.path = path
        self.events: list[TelemetryEvent] = []
        self.datagram_sizes: list[int] = []  # how many bytes each had
        self._hears = threading.Event()
        if not paused:
            self._hears.set()

    def __enter__(self) -> FakeMonitor:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(0.05)
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="stand-in-monitor")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.path.unlink(missing_ok=True)

    def resume(self) -> None:
        """Begin to read: it was made deaf, as one is that has too much to do."""
        self._hears.set()

    def kill(self) -> None:
        """End without a word; the socket's file stays, as after a SIGKILL, and what is in its queue is lost."""
        self._ends.set()
        self._hears.set()
        self._thread.join()
        self._socket.close()

    def events_of_kind(self, *kinds: str) -> list[TelemetryEvent]:
        """The events of these kinds, so far."""
        return [event for event in list(self.events) if event.event in kinds]

    def _listen(self) -> None:
        self._hears.wait()
        while not self._ends.is_set():
            with contextlib.suppress(TimeoutError):
                datagram = self._socket.recv(2 * DATAGRAM_LIMIT_BYTES)
                self.datagram_sizes.append(len(datagram))
                self.events += [event_from_json(line) for line in datagram.splitlines()]


@contextlib.contextmanager
def monitor_socket_path() -> Iterator[Path]:
    """Where a monitor may listen: a short name, since a socket's has room for a hundred characters."""
    folder = tempfile.mkdtemp(prefix=f"sparse-{os.getpid()}-", dir="/tmp")
    try:
        yield Path(folder) / "monitor.sock"
    finally:
        shutil.rmtree(folder)
