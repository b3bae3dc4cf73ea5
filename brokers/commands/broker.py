"""`sparse broker`: a broker for this site, in the foreground."""

import asyncio
import sys
from contextlib import suppress
from typing import Annotated, Literal

import typer

from brokers.errors import SparseError
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent
from brokers.protocol.broker_url import MQTT_PORT
from brokers.server.local_broker import start_broker

_POLL_S = 0.2


def command(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = MQTT_PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0: all, without access control.")
    ] = "127.0.0.1",
    kind: Annotated[
        Literal["mosquitto", "embedded"] | None, typer.Option(help="Default: Mosquitto if it is installed.")
    ] = None,
) -> int:
    """Run a broker for this site: Mosquitto if it is on the PATH, else the embedded one.

    Example: sparse broker --port 1883
    """
    return asyncio.run(_run(kind, host, port))


async def _run(kind: Literal["mosquitto", "embedded"] | None, host: str, port: int) -> int:
    shutdown = ShutdownEvent()
    shutdown.install_signal_handlers()
    with start_broker(kind=kind, host=host, port=port) as broker:
        print(f"{broker.kind} listens on {broker.address}; press Ctrl-C to stop it", file=sys.stderr)  # noqa: T201
        while not shutdown.is_set():
            if not broker.is_running:
                output = broker.last_output() or "without any output"
                message = f"the {broker.kind} broker at {broker.address} ended by itself: {output}"
                raise SparseError("BrokerEnded", message)
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await shutdown.wait()
    return EXIT_INTERRUPTED if shutdown.interrupted else 0
