"""The monitor's HTTP server: /metrics for Prometheus, /stages for autoscalers, /health. Starlette on uvicorn.

uvicorn limits neither the duration of a request nor the number of connections without one; `_Connection` adds both.
"""

import asyncio
import contextlib
import errno
import os
import socket
import time
from collections.abc import Generator, Sequence
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from brokers.dispatch.presence import WorkerLoad
from brokers.errors import PortTaken, UsageError
from brokers.protocol.transport import Transport
from monitor.daemon.collector import TelemetryCollector
from monitor.daemon.prometheus import CONTENT_TYPE, MonitorCollector, render_metrics
from monitor.presence.presence_table import PresenceTable, StageKey

REQUEST_LIMIT_BYTES = 8192  # of the request line and headers: a scraper's have some hundred bytes
EXCHANGE_TIMEOUT_S = 10.0  # from the connection to the end of the response; Prometheus' own default
CONNECTIONS_LIMIT = 16
_LARGEST = 1e12  # records hold any finite number, and their sums and products must be finite too


class HttpServer:
    """Serves the monitor's pages. Lifecycle: `start`, `stop`."""

    def __init__(
        self, presence: PresenceTable, transport: Transport | None, telemetry: TelemetryCollector | None
    ) -> None:
        self._presence = presence
        self._transport = transport
        self._metrics_collector = MonitorCollector(
            presence,
            (lambda: transport.is_connected) if transport else None,
            (lambda: [*telemetry.latest, telemetry.monitor_point()]) if telemetry else tuple,
        )
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> None:
        """Listen on one address. Raises `PortTaken`, or `UsageError` for an address that cannot be used."""
        listener = _listen(host, port)
        routes = [Route("/metrics", self._metrics), Route("/health", self._health)]
        if self._transport is not None:
            routes.append(Route("/stages", self._stages))
        pages = ", ".join(route.path for route in routes)

        async def not_found(request: Request, error: Exception) -> Response:
            return PlainTextResponse(f"not found: there is {pages}\n", HTTPStatus.NOT_FOUND)

        app = Starlette(routes=routes, exception_handlers={HTTPStatus.NOT_FOUND: not_found})
        app.router.redirect_slashes = False
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # bad requests of clients are not logged
            access_log=False,
            proxy_headers=False,
            server_header=False,
            headers=[("connection", "close"), ("cache-control", "no-store")],
            h11_max_incomplete_event_size=REQUEST_LIMIT_BYTES,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http server")

    async def stop(self) -> None:
        """Stop listening and abort all connections."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await self._task

    # Pages: coroutines, since Starlette runs plain functions in other threads -----------------------------------------

    async def _metrics(self, request: Request) -> Response:
        return Response(render_metrics(self._metrics_collector), media_type=CONTENT_TYPE)

    async def _stages(self, request: Request) -> Response:
        # Without the broker the numbers are unknown: zeros would make an autoscaler remove busy workers.
        if self._transport is None or not self._transport.is_connected:
            return await self._health(request)
        return JSONResponse(stage_metrics(self._presence, time.monotonic()))

    async def _health(self, request: Request) -> Response:
        if self._transport is None:
            return PlainTextResponse("watching this node\n")
        if self._transport.is_connected:
            return PlainTextResponse(f"connected to {self._transport.address}\n")
        return PlainTextResponse(f"not connected to {self._transport.address}\n", HTTPStatus.SERVICE_UNAVAILABLE)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: the program has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        yield


class _Connection(H11Protocol):
    """A connection for one request, with a timeout for the whole exchange.

    Beyond CONNECTIONS_LIMIT the oldest connection that has not sent a request is aborted, so clients that connect and
    send nothing keep no other client out; if all others are being answered, it is the new one.
    """

    opened_s = 0.0
    aborted = False
    _timeout: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self.opened_s = self.loop.time()
        self._timeout = self.loop.call_later(EXCHANGE_TIMEOUT_S, self.abort)
        connections = [each for each in self.connections if isinstance(each, _Connection) and not each.aborted]
        if len(connections) > CONNECTIONS_LIMIT:
            idle = [each for each in connections if each.cycle is None]
            min(idle, key=lambda each: each.opened_s).abort()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
        super().connection_lost(exc)

    def abort(self) -> None:
        self.aborted = True  # until `connection_lost` removes it
        self.transport.abort()


def _listen(host: str, port: int) -> socket.socket:
    def address_error(reason: str) -> UsageError:
        message = f"cannot listen at {host}, port {port}: {reason}"
        return UsageError("CannotServe", message, host=host, port=port, reason=reason)

    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # UnicodeError: not the name of a host
        raise address_error("no such host") from error
    family, _, _, _, address = min(addresses, key=lambda each: each[0] != socket.AF_INET)  # IPv4 if it has both
    try:
        return socket.create_server(address, family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(host, port) from error
        raise address_error(os.strerror(error.errno).lower() if error.errno else str(error)) from error


def stage_metrics(presence: PresenceTable, now_s: float) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics by pipeline and stage, over the workers in state "up"; zeros for a stage without workers.

    `site` lists all sites of the stage, separated by commas.
    """
    by_name: dict[tuple[str, str], list[StageKey]] = {}
    by_stage = presence.live_workers_by_stage(now_s)
    for key in by_stage:
        by_name.setdefault((key.pipeline, key.stage), []).append(key)
    metrics: dict[str, dict[str, dict[str, Any]]] = {}
    for (pipeline, stage), keys in by_name.items():
        loads = [record.load for key in keys for record in by_stage[key] if record.state == "up"]
        metrics.setdefault(pipeline, {})[stage] = {**_totals(loads), "site": ",".join(key.site for key in keys)}
    return metrics


def _totals(loads: Sequence[WorkerLoad]) -> dict[str, float]:
    """`queue_ms` is the mean over tasks, not over workers: an idle worker does not shorten the others' queues.

    Each worker's weight is the number of tasks it finished in the last second and those in its queue.
    """
    rates = [min(load.rate, _LARGEST) for load in loads]
    weights = [rate + load.queue for rate, load in zip(rates, loads, strict=True)]
    weighted_ms = sum(weight * min(load.queue_ms, _LARGEST) for weight, load in zip(weights, loads, strict=True))
    return {
        "workers": len(loads),
        "queue": sum(load.queue for load in loads),
        "queue_ms": round(weighted_ms / (sum(weights) or 1.0), 3),
        "busy": round(sum(load.busy for load in loads) / (len(loads) or 1), 3),
        "rate": round(sum(rates, 0.0), 3),
    }
