"""Mosquitto with additional configuration: one broker, or two with a bridge."""

from __future__ import annotations

import getpass
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from brokers.config.topology import BridgeSides, topic_rules
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency

WAIT_S = 60.0
_POLL_S = 0.02

# The rules of a bridge between the sites `near` and `far`, for the configuration of the first.
BRIDGE_TOPIC_LINES = tuple(
    f"topic {rule.topic_filter} {rule.direction} {rule.qos}" for rule in topic_rules(BridgeSides(("near",), ("far",)))
)


@contextmanager
def start_mosquitto(folder: Path, *lines: str, allow_anonymous: bool = True, port: int = 0) -> Iterator[int]:
    """Start Mosquitto with `lines` appended to its configuration; yields its port."""
    port = port or free_port()
    path = folder / f"mosquitto-{port}.conf"
    # Started by root, it would switch to a user who cannot read the files of the test.
    header = [
        f"listener {port} 127.0.0.1",
        f"allow_anonymous {str(allow_anonymous).lower()}",
        f"user {getpass.getuser()}",
    ]
    path.write_text("\n".join([*header, *lines, ""]))
    log = folder / f"mosquitto-{port}.log"
    with (
        log.open("w") as log_file,
        subprocess.Popen([require_dependency("mosquitto"), "-c", path], stderr=log_file) as process,
    ):
        try:
            _wait_for_listener(port, process, log)
            yield port
        finally:
            process.kill()


@contextmanager
def start_bridged_brokers(
    folder: Path, *lines: str, far_lines: tuple[str, ...] = (), topic_lines: tuple[str, ...] = BRIDGE_TOPIC_LINES
) -> Iterator[tuple[int, int]]:
    """Start the brokers of sites `near` and `far`; `near` runs the bridge. Yields their ports."""
    with ExitStack() as stack:
        far_port = stack.enter_context(start_mosquitto(folder, *far_lines))
        bridge = ["connection near-to-far", f"address 127.0.0.1:{far_port}", "notifications false", *lines]
        yield stack.enter_context(start_mosquitto(folder, *bridge, *topic_lines)), far_port


def _wait_for_listener(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + WAIT_S
    while True:
        assert process.poll() is None, f"mosquitto exited with {process.returncode}: {log.read_text()}"
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < end_s, f"nothing listens at {port}: {log.read_text()}"
            time.sleep(_POLL_S)
        else:
            return
