"""Mosquittos with a configuration of a test's own: alone, and two with a bridge between them."""

from __future__ import annotations

import getpass
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.parts import need
from tests.support.ports import free_port

WAIT_S = 10.0
_POLL_S = 0.02

# What `sparse/{site}` needs, as brokers/bridges.py has it, by the words of the broker that keeps the bridge.
RULES = (
    "topic sparse/{far}/+/+/in/+ out 0",
    "topic sparse/{far}/source/+/inbox out 0",
    "topic sparse/{far}/+/+/tasks out 1",
    "topic sparse/{far}/+/+/up/+ in 1",
    "topic sparse/{near}/+/+/in/+ in 0",
    "topic sparse/{near}/source/+/inbox in 0",
    "topic sparse/{near}/+/+/tasks in 1",
    "topic sparse/{near}/+/+/up/+ out 1",
)


@contextmanager
def mosquitto(folder: Path, *lines: str, anonymous: bool = True, port: int = 0) -> Iterator[int]:
    """A Mosquitto with these lines behind its listener; its port."""
    port = port or free_port()
    path = folder / f"mosquitto-{port}.conf"
    # Started by root it would become another user, who cannot read the files of a test.
    head = [f"listener {port} 127.0.0.1", f"allow_anonymous {str(anonymous).lower()}", f"user {getpass.getuser()}"]
    path.write_text("\n".join([*head, *lines, ""]))
    with subprocess.Popen([need("mosquitto"), "-c", path], stderr=subprocess.DEVNULL) as process:
        try:
            _accepts(port)
            yield port
        finally:
            process.kill()


@contextmanager
def bridged(
    folder: Path, *lines: str, far: tuple[str, ...] = (), rules: tuple[str, ...] = RULES
) -> Iterator[tuple[int, int]]:
    """Two Mosquittos, of the sites `near` and `far`; the first keeps a bridge with these lines. Their ports."""
    with ExitStack() as stack:
        far_port = stack.enter_context(mosquitto(folder, *far))
        bridge = ["connection near-to-far", f"address 127.0.0.1:{far_port}", "notifications false", *lines]
        bridge += [rule.format(near="near", far="far") for rule in rules]
        yield stack.enter_context(mosquitto(folder, *bridge)), far_port


def _accepts(port: int) -> None:
    end_s = time.monotonic() + WAIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end_s, f"nothing listens at {port}"
            time.sleep(_POLL_S)
        else:
            return
