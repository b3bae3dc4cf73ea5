"""Ports that nothing listens at."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

# Linux gives a port from 32768 on to each connection that goes out, and to each broker that does not mind which: those
# below stay free until the one who asked listens there, whatever other tests do meanwhile.
_FIRST, _END = 20_000, 32_000


def _in_any_order() -> Iterator[int]:
    """Each port once, in an order of this process's own, so that tests in two processes are not given the same."""
    yield from random.SystemRandom().sample(range(_FIRST, _END), _END - _FIRST)


_ports = _in_any_order()


def free_port() -> int:
    """A port of the loopback interface that was free a moment ago; no two calls in one process give the same."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # somebody has it
                continue
            return port
    raise AssertionError(f"no port from {_FIRST} to {_END} is free")
