"""Mosquittos with a configuration of a test's own: alone, and two with a bridge between them."""

from __future__ import annotations

import getpass
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from brokers.config.bridge_rules import topic_rules
from brokers.config.topology import BridgeSides
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency

WAIT_S = 10.0
_POLL_S = 0.02

# What crosses between the sites `near` and `far`, by the words of the first.
BRIDGE_TOPIC_LINES = tuple(
    f"topic {rule.topic_filter} {rule.direction} {rule.qos}" for rule in topic_rules(BridgeSides(("near",), ("far",)))
)


@contextmanager
def start_mosquitto(folder: Path, *lines: str, allow_anonymous: bool = True, port: int = 0) -> Iterator[int]:
    """A Mosquitto with these lines behind its listener; its port."""
    port = port or free_port()
    path = folder / f"mosquitto-{port}.conf"
    # Started by root it would become another user, who cannot read the files of a test.
    head = [
        f"listener {port} 127.0.0.1",
        f"allow_anonymous {str(allow_anonymous).lower()}",
        f"user {getpass.getuser()}",
    ]
    path.write_text("\n".join([*head, *lines, ""]))
    with subprocess.Popen([require_dependency("mosquitto"), "-c", path], stderr=subprocess.DEVNULL) as process:
        try:
            _accepts(port)
            yield port
        finally:
            process.kill()


@contextmanager
def start_bridged_brokers(
    folder: Path, *lines: str, far_lines: tuple[str, ...] = (), topic_lines: tuple[str, ...] = BRIDGE_TOPIC_LINES
) -> Iterator[tuple[int, int]]:
    """Two Mosquittos, of the sites `near` and `far`; the first keeps a bridge with these lines. Their ports."""
    with ExitStack() as stack:
        far_port = stack.enter_context(start_mosquitto(folder, *far_lines))
        bridge = ["connection near-to-far", f"address 127.0.0.1:{far_port}", "notifications false", *lines]
        yield stack.enter_context(start_mosquitto(folder, *bridge, *topic_lines)), far_port


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
