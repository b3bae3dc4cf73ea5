"""`sparse status [FILE]`: who is up, and how their work fares."""

from __future__ import annotations

import asyncio
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from brokers.config.pipeline_file import load_pipeline, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.dispatch.worker_registry import PresenceListener, WorkerRegistry
from brokers.errors import no_broker_error
from brokers.mqtt.client_identity import create_transport
from brokers.protocol.broker_url import parse_address
from brokers.protocol.topics import all_presence_filter
from monitor.terminal.status_tables import sources_table, workers_table

# Retained records come right after the subscription; this waits out a slow link.
_LISTEN_S = 0.3
# All report every second: one of which only a retained record comes in this time is frozen, or its line is.
_REPORT_WAIT_S = 2.0
_WIDTH = 400
# Below this width, which is what a terminal has that nobody has made larger, columns stand close together.
_ROOMY = 100


def command(
    file: Annotated[Path | None, typer.Argument(help="Only this pipeline, at the broker it names.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address, mqtt://HOST:PORT.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object with all records.")] = False,
) -> int:
    """Show who is up: sites, stages, workers, and how busy each is.

    And sources: how fast results come, and what was sent again, dropped or given up, and why.

    Example: sparse status --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file) if file else None
    address = resolve_broker_address(pipeline, pipeline.source.site if pipeline else LOCAL_SITE, broker)
    if address is None:
        raise no_broker_error(str(file or "sparse status"), LOCAL_SITE)
    registry = asyncio.run(_listen(address, pipeline.name if pipeline else "+"))
    workers = [(entry.record, not entry.is_live) for entry in registry.workers.values()]
    workers.sort(key=lambda item: (item[0].site, item[0].pipeline, item[0].stage, item[0].worker))
    sources = [(entry.record, not entry.is_live) for entry in registry.sources.values()]
    sources.sort(key=lambda item: (item[0].site, item[0].pipeline, item[0].source))
    if json:
        answer = {
            "workers": [{**birth.model_dump(), "lost": lost} for birth, lost in workers],
            "sources": [{**birth.model_dump(), "lost": lost} for birth, lost in sources],
        }
        print(jsonlib.dumps(answer))  # noqa: T201 - the answer
        return 0
    console = Console(highlight=False)
    if not (headings := console.is_terminal):  # a file or a pipe has no width: let no column be cut
        console.width = _WIDTH
    gap = 1 if console.width < _ROOMY else 2
    console.print(workers_table(workers, pipeline, headings=headings, column_gap=gap))
    console.print()
    console.print(sources_table(sources, headings=headings, column_gap=gap))
    if not workers and not sources and parse_address(address).is_tls:
        # Behind locked doors any subscription is granted, and what may not be read does not come.
        print("nothing was heard: is this identity one that may read presence, as `monitor` may?", file=sys.stderr)  # noqa: T201 - for a person
    return 0


async def _listen(address: str, pipeline: str) -> WorkerRegistry:
    """The records at the broker; those of which only a retained copy arrived are not `is_live`."""
    transport = create_transport(address)
    listener = PresenceListener(transport)
    try:
        await transport.connect()
        await listener.subscribe(all_presence_filter(pipeline=pipeline))
        await asyncio.sleep(_LISTEN_S)
        await listener.wait_for(lambda registry: all(entry.is_live for entry in registry.entries()), _REPORT_WAIT_S)
    finally:
        await listener.close()
        await transport.close()
    return listener.registry
