"""Events as a program of anybody's may send them, on a plain socket, and the sockets' short paths."""

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
    """One line; of now, unless it says otherwise."""
    return json.dumps({"event": kind, "time_ns": time.time_ns(), **fields}).encode() + b"\n"


def encode_task_event(number: int = 0, **fields: Any) -> bytes:
    """A line of a task that a worker is done with."""
    given = {"stage": "body", "worker": "w1", "request": f"{number:032x}", "compute_ms": 12.5, "bytes_in": 1000}
    return encode_event("task_processed", **{**given, **fields})


def send_datagrams(path: Path, *datagrams: bytes) -> None:
    """As a patient sender does: it waits until there is room."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * DATAGRAM_LIMIT_BYTES)
        line.settimeout(30)
        line.connect(str(path))
        for datagram in datagrams:
            line.send(datagram)


@contextmanager
def short_temp_folder() -> Iterator[Path]:
    """Not pytest's own: a socket's path has some hundred bytes."""
    with tempfile.TemporaryDirectory(prefix="events-", dir="/tmp") as found:
        yield Path(found)
