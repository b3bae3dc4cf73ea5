"""The daemon of `sparse monitor`: collects telemetry, follows the presence records at a broker, and serves both."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BrokerUnreachable
from brokers.protocol.topics import all_presence_filter
from brokers.protocol.transport import Delivery, Transport
from monitor.daemon.collector import TelemetryCollector
from monitor.points.points import presence_to_points
from monitor.presence.presence_table import create_presence_table

if TYPE_CHECKING:
    from monitor.daemon.http_server import HttpServer

log = logging.getLogger(__name__)

_PRESENCE_INTERVAL_S = 1.0  # as often as workers and sources report
_MONITOR_POINT_INTERVAL_S = 5.0
_RECONNECT_INTERVAL_S = 1.0
STOP_TIMEOUT_S = 10.0  # for the stores to accept the points received


class Daemon:
    """Watches all pipelines at a broker or one of them; without a transport, only its node.

    Lifecycle: `start`, `run`, `stop`.
    """

    def __init__(
        self, transport: Transport | None, pipeline: Pipeline | None = None, telemetry: TelemetryCollector | None = None
    ) -> None:
        self._transport = transport
        self._telemetry = telemetry
        self._topic_filter = all_presence_filter(pipeline=pipeline.name if pipeline else "+")
        self._presence = create_presence_table(pipeline)
        self._presence_stored_s = time.monotonic()
        self._http: HttpServer | None = None
        self._connecting: asyncio.Task[None] | None = None

    async def start(self, host: str | None, port: int, *, wait_for_broker: bool = False) -> None:
        """Serve HTTP, unless `host` is None, then connect; `wait_for_broker`: retry until a broker answers.

        Raises `PortTaken`, `SocketUnavailable` or another `UsageError`, and `BrokerUnreachable`.
        """
        if host is not None:
            from monitor.daemon.http_server import HttpServer  # slow to import; a run's monitor does not serve

            self._http = HttpServer(self._presence, self._transport, self._telemetry)
            await self._http.start(host, port)
        if self._telemetry:
            self._telemetry.start()
        if self._transport is None:
            return
        await self._transport.subscribe(self._topic_filter, self._on_presence, qos=1)
        if wait_for_broker:
            self._connecting = asyncio.create_task(self._connect(self._transport), name="first connection")
        else:
            await self._transport.connect()

    async def run(self, stopping: asyncio.Event) -> None:
        """Do the periodic work until `stopping` is set."""
        monitor_point_s = time.monotonic()
        while not stopping.is_set():
            now_s = time.monotonic()
            self._presence.expire(now_s)
            self._store_presence(now_s)
            if self._telemetry and now_s - monitor_point_s >= _MONITOR_POINT_INTERVAL_S:
                monitor_point_s = now_s
                self._telemetry.add([self._telemetry.monitor_point()])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PRESENCE_INTERVAL_S):
                    await stopping.wait()

    async def stop(self) -> None:
        """Stop serving, disconnect, and store the points received. May be called after a failed `start`."""
        if self._http is not None:
            await self._http.stop()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._transport is not None:
            await self._transport.close()
        if self._telemetry:
            self._store_presence(time.monotonic())
            await asyncio.to_thread(self._telemetry.stop, STOP_TIMEOUT_S)

    async def _connect(self, transport: Transport) -> None:
        logged = False
        while True:
            try:
                await transport.connect()
                return
            except BrokerUnreachable as error:
                if not logged:
                    log.warning("%s; retrying", error)
                logged = True
            await asyncio.sleep(_RECONNECT_INTERVAL_S)

    def _on_presence(self, delivery: Delivery) -> None:
        self._presence.on_presence(delivery.topic, bytes(delivery.payload), time.monotonic(), retained=delivery.retain)

    def _store_presence(self, now_s: float) -> None:
        """Store the records that are new since the last call."""
        if self._telemetry:
            records = self._presence.updated_since(self._presence_stored_s)
            self._presence_stored_s = now_s
            self._telemetry.add(presence_to_points(records, time.time_ns(), self._telemetry.run))
