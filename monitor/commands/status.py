"""`sparse status [FILE]`: the workers and sources that are up, and their load."""

import asyncio
import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from brokers.config.pipeline_file import load_pipeline, require_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.dispatch.worker_registry import PresenceListener, WorkerRegistry
from brokers.mqtt.client import create_transport
from brokers.protocol.broker_url import parse_address
from brokers.protocol.topics import all_presence_filter
from monitor.terminal.status_tables import sources_table, workers_table

# How long retained records may take to arrive after the subscription, over a slow link.
_RETAINED_WAIT_S = 0.3
# Records are renewed every second; a process with only a retained record after this time is frozen or cut off.
_RENEWAL_WAIT_S = 2.0
_FILE_COLUMNS = 400
# Narrower terminals have narrower gaps between columns.
_WIDE_COLUMNS = 100


def command(
    file: Annotated[Path | None, typer.Argument(help="Show only this pipeline, at its broker.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address: mqtt://HOST:PORT.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all records as one JSON object.")] = False,
) -> int:
    """Show which workers and sources are up, and how busy they are.

    Workers by site, pipeline and stage; for sources also their result rate, and the requests that were retried, dropped
    or failed, with the reasons.

    Example: sparse status --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file) if file else None
    address = require_broker_address(pipeline, pipeline.source.site if pipeline else LOCAL_SITE, broker)
    registry = asyncio.run(_listen(address, pipeline.name if pipeline else "+"))
    workers = [(entry.record, not entry.is_live) for _, entry in sorted(registry.workers.items())]  # by topic
    sources = [(entry.record, not entry.is_live) for _, entry in sorted(registry.sources.items())]
    if json:
        document = {
            "workers": [{**record.model_dump(), "lost": is_lost} for record, is_lost in workers],
            "sources": [{**record.model_dump(), "lost": is_lost} for record, is_lost in sources],
        }
        print(jsonlib.dumps(document))  # noqa: T201 - the command's output
        return 0
    console = Console(highlight=False)
    is_terminal = console.is_terminal
    if not is_terminal:  # a file has no width: cut no column
        console.width = _FILE_COLUMNS
    gap = 1 if console.width < _WIDE_COLUMNS else 2
    console.print(workers_table(workers, pipeline, headings=is_terminal, column_gap=gap))
    console.print()
    console.print(sources_table(sources, headings=is_terminal, column_gap=gap))
    if not workers and not sources and parse_address(address).is_tls:
        # With access control a broker accepts every subscription, and withholds what the client may not read.
        print("no presence records: may this identity read them, as `monitor` may?", file=sys.stderr)  # noqa: T201 - for the user
    return 0


async def _listen(address: str, pipeline: str) -> WorkerRegistry:
    """The records at the broker; those of which only a retained copy arrived are not `is_live`."""
    transport = create_transport(address)
    listener = PresenceListener(transport)
    try:
        await transport.connect()
        await listener.subscribe(all_presence_filter(pipeline=pipeline))
        await asyncio.sleep(_RETAINED_WAIT_S)
        await listener.wait_for(lambda registry: all(entry.is_live for entry in registry.entries()), _RENEWAL_WAIT_S)
    finally:
        await listener.close()
        await transport.close()
    return listener.registry
