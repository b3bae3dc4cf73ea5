"""A client that sends events to the UNIX socket of a monitor."""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES


def encode_event(kind: str, /, **fields: Any) -> bytes:
    """One event as a line of JSON; its time is now, unless a field gives another."""
    return json.dumps({"event": kind, "time_ns": time.time_ns(), **fields}).encode() + b"\n"


def encode_task_event(number: int = 0, **fields: Any) -> bytes:
    """The event of a processed task, as a line of JSON."""
    defaults = {"stage": "body", "worker": "w1", "request": f"{number:032x}", "compute_ms": 12.5, "bytes_in": 1000}
    return encode_event("task_processed", **{**defaults, **fields})


def send_datagrams(path: Path, *datagrams: bytes) -> None:
    """Send datagrams; waits while the buffer of the receiver is full."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * DATAGRAM_LIMIT_BYTES)
        client.settimeout(30)
        client.connect(str(path))
        for datagram in datagrams:
            client.send(datagram)


@contextmanager
def short_temp_folder() -> Iterator[Path]:
    """A temporary folder for sockets, whose paths have at most 107 bytes: pytest's own are longer."""
    with tempfile.TemporaryDirectory(prefix="events-", dir="/tmp") as folder:
        yield Path(folder)
