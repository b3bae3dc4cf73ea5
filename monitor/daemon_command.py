"""`sparse monitor [FILE]`: what others watch and scale Sparse by, over HTTP."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from brokers.errors import BrokerUnreachable, NoBroker
from brokers.identity import transport_to
from brokers.parent import STOPPED, Leaving
from brokers.pipeline import Pipeline, broker_address, load_pipeline
from brokers.tables import LOCAL
from monitor.daemon import Daemon
from monitor.errors import NothingToWatch

PORT = 9100


def command(
    file: Annotated[Path | None, typer.Argument(help="Only this pipeline, at the broker it names.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address, mqtt://HOST:PORT.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines read, with no lock.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = PORT,
) -> int:
    """Show workers and sources over HTTP: to Prometheus, and to what scales stages.

    /metrics is for Prometheus, /stages has a JSON object of figures for each stage, /health is 200 while the broker is
    connected.

    Example: sparse monitor --broker mqtt://127.0.0.1:1883 --port 9100
    """
    pipeline = load_pipeline(file) if file else None
    site = pipeline.source.site if pipeline else LOCAL
    address = broker_address(pipeline, site, broker)
    if address is None:
        raise NoBroker(str(file or "sparse monitor"), site)
    return asyncio.run(_serve(address, pipeline, host, port))


async def _serve(address: str, pipeline: Pipeline | None, host: str, port: int) -> int:
    transport = transport_to(address)
    daemon = Daemon(transport, pipeline)
    leaving = Leaving()
    leaving.heed_signals()
    try:
        await daemon.start(host, port)
        place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"watching {transport.address}; {place}/metrics; Ctrl-C ends it", file=sys.stderr)  # noqa: T201 - for a person
        await daemon.run(leaving)
    except BrokerUnreachable as error:
        raise NothingToWatch(str(error)) from error
    finally:
        await daemon.stop()
    return STOPPED if leaving.interrupted else 0
