"""`sparse monitor [FILE]`: the telemetry daemon of a node."""

import asyncio
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline, require_broker_address, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.errors import BrokerUnreachable, SparseError
from brokers.mqtt.client import create_transport
from brokers.process.shutdown import EXIT_INTERRUPTED, ShutdownEvent, exit_with_parent
from brokers.protocol.broker_url import parse_address
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE, socket_path
from brokers.telemetry.schema import TelemetryEvent
from monitor.daemon.collector import TelemetryCollector
from monitor.daemon.daemon import Daemon
from monitor.daemon.event_socket import UnixListener
from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.sensors.all import SAMPLE_INTERVAL_S
from monitor.stores.batch_writer import BatchWriter
from monitor.stores.influx.config import influx_target, spool_folder
from monitor.stores.sqlite import SqliteStore

log = logging.getLogger(__name__)

DEFAULT_PORT = 9100
# By default Python lets a computing thread run for 5 ms, in which a socket that buffers ten datagrams overflows.
_SWITCH_INTERVAL_S = 0.0005


StoreOption = Annotated[Path | None, typer.Option(help="Store all events and samples in this SQLite file.")]
LimitOption = Annotated[
    float, typer.Option(min=0.001, help="Maximum size of the file in GB; then the oldest points are deleted.")
]
SocketOption = Annotated[
    Path | None, typer.Option(help="The Unix socket for events; default: SPARSE_MONITOR, or the node's usual one.")
]
EveryOption = Annotated[float, typer.Option(min=0.05, max=3600.0, help="Seconds between two samples of the node.")]
TracesOption = Annotated[
    str | None, typer.Option(help="Send spans to the OpenTelemetry collector at this URL (OTLP over HTTP).")
]


def command(
    file: Annotated[Path | None, typer.Argument(help="Watch only this pipeline, at its broker.")] = None,
    broker: Annotated[str | None, typer.Option(help="The broker's address: mqtt://HOST:PORT.")] = None,
    host: Annotated[
        str, typer.Option(help="HTTP address; 0.0.0.0: open to all, without authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The HTTP port.")] = DEFAULT_PORT,
    socket: SocketOption = None,
    store: StoreOption = None,
    limit: LimitOption = 4.0,
    run: Annotated[str | None, typer.Option(help="The run of events that name none; default: SPARSE_RUN.")] = None,
    every: EveryOption = SAMPLE_INTERVAL_S,
    traces: TracesOption = None,
    with_parent: Annotated[bool, typer.Option(hidden=True)] = False,
) -> int:
    """Collect the telemetry of this node, and serve it over HTTP.

    Receives the events of Sparse's processes on a Unix socket, samples the node, and follows the presence records at
    the broker, if there is one. /metrics is for Prometheus, /stages has figures per stage as JSON for autoscalers,
    /health is 200 while the broker is connected.

    Example: sparse monitor --broker mqtt://127.0.0.1:1883 --port 9100 --store telemetry.sqlite
    """
    pipeline = load_pipeline(file) if file else None
    site = pipeline.source.site if pipeline else LOCAL_SITE
    resolve = require_broker_address if pipeline else resolve_broker_address
    address = resolve(pipeline, site, broker, from_parent=with_parent)
    node = platform.node() or "node"
    telemetry = TelemetryCollector(
        node,
        os.environ.get(RUN_VARIABLE, "") if run is None else run,
        _create_writers(store, int(limit * 1e9), with_parent),
        listener=UnixListener(socket or socket_path(os.environ)),
        # Another monitor may use the default socket; one that the user has named must be available.
        listener_optional=socket is None and not os.environ.get(SOCKET_VARIABLE),
        sample_interval_s=every,
        span_writer=_span_writer(traces, node) if traces is not None else None,
    )
    return asyncio.run(_serve(address, pipeline, telemetry, None if with_parent else host, port))


def _create_writers(file: Path | None, limit_bytes: int, for_run: bool) -> list[BatchWriter[TelemetryPoint]]:
    """A writer to a SQLite file if one is named, and to InfluxDB if the environment names a server; not started.

    `for_run`: the spool for InfluxDB is beside the run's file, and a server that refuses the points is logged, since
    the file has all of them. Raises `BadStore` and `UsageError`.
    """
    target = influx_target(os.environ)
    writers: list[BatchWriter[TelemetryPoint]] = []
    if file is not None:
        writers.append(BatchWriter(SqliteStore(file, limit_bytes), str(file)))
    if target is None:
        return writers
    from monitor.stores.influx.store import InfluxStore  # the client is slow to import

    folder = file.parent / "influx-spool" if for_run and file else spool_folder(os.environ)
    try:
        store = InfluxStore(target, folder)
        writers.append(BatchWriter(store, str(target)))
        store.check()
    except BadStore as error:
        if not for_run:
            for writer in writers:
                writer.stop(0.0)
            raise
        log.warning("%s", error)
    return writers


def _span_writer(url: str, node: str) -> BatchWriter[TelemetryEvent]:
    from monitor.stores.otlp import TraceExporter  # needs an optional extra

    return BatchWriter(TraceExporter(url, node), "the trace collector")


async def _serve(
    address: str | None, pipeline: Pipeline | None, telemetry: TelemetryCollector, host: str | None, port: int
) -> int:
    """Run until a signal; without a `host` as the child of a run, which serves no HTTP and ends with its parent."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    shutdown = ShutdownEvent()
    shutdown.install_signal_handlers()
    is_child = host is None
    if is_child:
        exit_with_parent(shutdown)
    daemon = Daemon(create_transport(address) if address else None, pipeline, telemetry)
    try:
        await daemon.start(host, port, wait_for_broker=is_child)
        print(_first_line(address, telemetry, host, port), file=sys.stderr)  # noqa: T201 - for the user
        await daemon.run(shutdown)
    except BrokerUnreachable as error:  # no mistake of the user's here: exit with 1, so that a service restarts
        raise SparseError("BrokerUnreachable", str(error), address=error.address) from error
    finally:
        await daemon.stop()
    return EXIT_INTERRUPTED if shutdown.interrupted else 0


def _first_line(address: str | None, telemetry: TelemetryCollector, host: str | None, port: int) -> str:
    stores = " and ".join(telemetry.store_names)
    parts = [
        f"watching {parse_address(address)}" if address else "watching this node, without a broker",
        f"events at {telemetry.socket_path}" if telemetry.socket_path else "no events",
        f"stored in {stores}" if stores else "not stored (use --store FILE.sqlite)",
    ]
    if host is not None:
        parts.append(f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics")
    return "; ".join([*parts, "stop with Ctrl-C"])
