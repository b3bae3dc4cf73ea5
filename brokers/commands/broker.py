"""`sparse broker`: a broker for this site, in the foreground."""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from brokers.errors import SparseError
from brokers.process.shutdown import EXIT_INTERRUPTED
from brokers.protocol.broker_url import MQTT_PORT
from brokers.server.local_broker import start_broker

_POLL_S = 0.2


@dataclass(eq=False)
class BrokerEnded(SparseError):
    """A local broker that ended though nobody asked it to, and the last thing it wrote."""

    kind: str
    address: str
    said: str

    def __str__(self) -> str:
        return f"the {self.kind} broker at {self.address} ended by itself: {self.said or 'it said nothing'}"


def command(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = MQTT_PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines in, with no lock.")
    ] = "127.0.0.1",
    kind: Annotated[
        Literal["mosquitto", "embedded"] | None, typer.Option(help="Which; left out: Mosquitto if it is installed.")
    ] = None,
) -> int:
    """Run a broker for this site: Mosquitto if it is on the PATH, else the embedded one.

    Example: sparse broker --port 1883
    """
    leaving = threading.Event()
    status = 0

    def leave(number: int, _: object) -> None:
        nonlocal status
        status = status or (EXIT_INTERRUPTED if number == signal.SIGINT else 0)
        leaving.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    with start_broker(kind=kind, host=host, port=port) as broker:
        print(f"{broker.kind} listens on {broker.address}; Ctrl-C ends it", file=sys.stderr)  # noqa: T201 - how to reach it
        while not leaving.wait(_POLL_S):
            if not broker.is_running:
                raise BrokerEnded(broker.kind, broker.address, broker.last_output())
    return status
