"""Free ports."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

# Linux chooses the ports of outgoing connections, and of listeners at port 0, from 32768 on: those below stay free
# until they are used by the test that has asked for them.
_FIRST, _END = 20_000, 32_000


def _random_ports() -> Iterator[int]:
    """Each port once, in a random order, so that tests in two processes rarely get the same."""
    yield from random.SystemRandom().sample(range(_FIRST, _END), _END - _FIRST)


_ports = _random_ports()


def free_port() -> int:
    """A free port of the loopback interface; each call in one process returns another."""
    for port in _ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:  # in use
                continue
            return port
    raise AssertionError(f"no port from {_FIRST} to {_END} is free")
