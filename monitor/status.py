"""`sparse status [FILE]`: who is up."""

from __future__ import annotations

import asyncio
import contextlib
import json as jsonlib
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from brokers.errors import NoBroker
from brokers.mqtt import MqttTransport
from brokers.pipeline import LOCAL, broker_address, load_pipeline
from brokers.presence import Birth
from brokers.topics import every_presence
from brokers.transport import Delivery
from monitor.scoreboard import Scoreboard

# Retained records come right after the subscription; this waits out a slow link.
_LISTEN_S = 0.3
# Workers report every second: one of which only a retained record comes in this time is frozen, or its line is.
_REPORT_WAIT_S = 2.0
_WIDTH = 400


def command(
    file: Annotated[
        Path | None, typer.Argument(help="Only the workers of this pipeline, at the broker it names.")
    ] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address, mqtt://HOST:PORT.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object with all records.")] = False,
) -> int:
    """Show who is up: sites, stages, workers, and how busy each is.

    Example: sparse status --broker mqtt://127.0.0.1:1883
    """
    pipeline = load_pipeline(file) if file else None
    address = broker_address(pipeline, pipeline.source.site if pipeline else LOCAL, broker)
    if address is None:
        raise NoBroker(str(file or "sparse status"), LOCAL)
    board = asyncio.run(_listen(address, pipeline.name if pipeline else "+"))
    silent = board.silent
    found = [(birth, topic in silent) for topic, birth in board.workers.items()]
    found.sort(key=lambda item: (item[0].site, item[0].pipeline, item[0].stage, item[0].worker))
    if json:
        workers = [{**birth.model_dump(), "lost": lost} for birth, lost in found]
        print(jsonlib.dumps({"workers": workers}))  # noqa: T201 - the answer
    else:
        _print(found)
    return 0


async def _listen(address: str, pipeline: str) -> Scoreboard:
    board, changed = Scoreboard(), asyncio.Event()
    transport = MqttTransport(address)

    def heard(delivery: Delivery) -> None:
        board.heard_birth(delivery.topic, bytes(delivery.payload), time.monotonic(), retained=delivery.retain)
        changed.set()

    try:
        await transport.connect()
        await transport.subscribe(every_presence(pipeline=pipeline), heard, qos=1)
        await asyncio.sleep(_LISTEN_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_WAIT_S):
                while board.silent:
                    changed.clear()
                    await changed.wait()
    finally:
        await transport.close()
    return board


def _print(found: list[tuple[Birth, bool]]) -> None:
    """A table of workers; of each, whether it is lost."""
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width: let no column be cut
        console.width = _WIDTH
    if not found:
        console.print("no worker is up")
        return
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for column in ("site", "pipeline", "stage", "worker", "node", "device", "model", "state"):
        table.add_column(column)
    for column in ("queue", "tasks/s", "ms/task", "done", "failed", "refused"):
        table.add_column(column, justify="right")
    for birth, lost in found:
        load = birth.load
        who = (birth.site, birth.pipeline, birth.stage, birth.worker, birth.node, birth.device, birth.fingerprint)
        pace = (f"{load.rate:.1f}", f"{load.task_ms:.1f}")
        table.add_row(
            *who,
            "lost" if lost else birth.state,
            str(load.queue),
            *pace,
            *map(str, (load.done, load.failed, load.refused)),
        )
    console.print(table)
