"""`sparse monitor [FILE]`: what happens on a node, and at its broker: kept, and shown over HTTP."""

from __future__ import annotations

import asyncio
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.errors import BrokerUnreachable, SparseError, no_broker_error
from brokers.mqtt.client_identity import create_transport
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.broker_url import parse_address
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE, socket_path
from brokers.telemetry.schema import TelemetryEvent
from monitor.daemon.collector import SAMPLE_INTERVAL_S, TelemetryCollector
from monitor.daemon.daemon import Daemon
from monitor.daemon.unix_listener import UnixListener
from monitor.stores.batch_writer import BatchWriter
from monitor.stores.factory import create_writers

DEFAULT_PORT = 9100
# Python lets a thread that computes go on for 5 ms while another waits: in that time a socket of ten datagrams is full.
_SWITCH_S = 0.0005


@dataclass(frozen=True, slots=True)
class _MonitorOptions:
    """What the command line asks for."""

    address: str | None
    pipeline: Pipeline | None
    host: str
    port: int
    socket: Path | None
    store: Path | None
    limit_bytes: int
    run: str
    every_s: float
    traces: str | None
    with_parent: bool


def command(
    file: Annotated[Path | None, typer.Argument(help="Only this pipeline, at the broker it names.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address, mqtt://HOST:PORT.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 lets other machines read, with no lock.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = DEFAULT_PORT,
    socket: Annotated[
        Path | None, typer.Option(help="Where events are heard; left out: SPARSE_MONITOR, else the usual place.")
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="Keep all that is heard and measured in this SQLite file; left out: in none.")
    ] = None,
    limit: Annotated[
        float, typer.Option(min=0.001, help="GB that the file may grow to; then its oldest points go.")
    ] = 4.0,
    run: Annotated[str | None, typer.Option(help="Of points that name no run; left out: SPARSE_RUN.")] = None,
    every: Annotated[
        float, typer.Option(min=0.05, max=3600.0, help="Seconds between two samples.")
    ] = SAMPLE_INTERVAL_S,
    traces: Annotated[
        str | None, typer.Option(help="Send spans to the OpenTelemetry collector at this URL (OTLP over HTTP).")
    ] = None,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Keep what happens on this node and at its broker; show it over HTTP.

    Processes of Sparse tell it what they do, on a Unix socket; it samples the node, and hears at the broker, if one is
    named, who is up. /metrics is for Prometheus, /stages has a JSON object of figures for each stage, /health is 200
    while the broker is connected.

    Example: sparse monitor --broker mqtt://127.0.0.1:1883 --port 9100 --store telemetry.sqlite
    """
    pipeline = load_pipeline(file) if file else None
    site = pipeline.source.site if pipeline else LOCAL_SITE
    address = resolve_broker_address(pipeline, site, broker, from_parent=with_parent)
    if address is None and file is not None:
        raise no_broker_error(str(file), site)
    name = os.environ.get(RUN_VARIABLE, "") if run is None else run
    wanted = _MonitorOptions(
        address, pipeline, host, port, socket, store, int(limit * 1e9), name, every, traces, with_parent
    )
    return asyncio.run(_serve(wanted))


async def _serve(wanted: _MonitorOptions) -> int:
    sys.setswitchinterval(_SWITCH_S)
    leaving = ShutdownEvent()
    leaving.install_signal_handlers()
    if wanted.with_parent:
        exit_with_parent(leaving)
    transport = create_transport(wanted.address) if wanted.address else None
    telemetry = _telemetry(wanted)
    daemon = Daemon(transport, wanted.pipeline, telemetry)
    try:
        await daemon.start(None if wanted.with_parent else wanted.host, wanted.port, wait_for_broker=wanted.with_parent)
        print(_first_line(wanted, telemetry), file=sys.stderr)  # noqa: T201 - for a person
        await daemon.run(leaving)
    except BrokerUnreachable as error:
        # The broker may come up later: exit status 1, not that of a user's mistake.
        raise SparseError(error.code, str(error)) from error
    finally:
        await daemon.stop()
    return EXIT_INTERRUPTED if leaving.interrupted else 0


def _telemetry(wanted: _MonitorOptions) -> TelemetryCollector:
    node = platform.node() or "node"
    kept = create_writers(wanted.store, wanted.limit_bytes, os.environ, for_run=wanted.with_parent)
    spans: BatchWriter[TelemetryEvent] | None = None
    if wanted.traces is not None:
        from monitor.stores.otlp import TraceExporter  # an extra

        spans = BatchWriter(TraceExporter(wanted.traces, node), "the collector of traces")
    return TelemetryCollector(
        node,
        wanted.run,
        kept,
        listener=UnixListener(wanted.socket or socket_path(os.environ)),
        # A socket that was asked for must be had; the usual one may be another monitor's.
        listener_optional=wanted.socket is None and not os.environ.get(SOCKET_VARIABLE),
        sample_interval_s=wanted.every_s,
        span_writer=spans,
    )


def _first_line(wanted: _MonitorOptions, telemetry: TelemetryCollector) -> str:
    watched = (
        f"watching {parse_address(wanted.address)}" if wanted.address else "watching this node, no broker is named"
    )
    heard = f"events at {telemetry.socket_path}" if telemetry.socket_path else "no events"
    stores = " and ".join(telemetry.store_names)
    kept = f"kept in {stores}" if stores else "kept nowhere (--store FILE.sqlite keeps it)"
    parts = [watched, heard, kept]
    if not wanted.with_parent:
        place = f"[{wanted.host}]" if ":" in wanted.host else wanted.host
        parts.append(f"http://{place}:{wanted.port}/metrics")
    return "; ".join([*parts, "Ctrl-C ends it"])
