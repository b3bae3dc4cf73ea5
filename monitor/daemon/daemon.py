"""The daemon behind `sparse monitor`: hears of its node, and at the broker who is up; keeps it, and shows it over HTTP.

Three verbs: start, run, stop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from http import HTTPStatus

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BrokerUnreachable
from brokers.protocol.topics import all_presence_filter
from brokers.protocol.transport import Delivery, Transport
from monitor.daemon import exposition
from monitor.daemon.autoscaling import stage_metrics
from monitor.daemon.collector import TelemetryCollector
from monitor.daemon.http_server import HttpResponse, HttpServer
from monitor.daemon.node_metrics import node_metrics
from monitor.daemon.prometheus import presence_metrics
from monitor.points.presence_points import presence_to_points
from monitor.presence.presence_table import create_presence_table

log = logging.getLogger(__name__)

_PRESENCE_EVERY_S = 1.0  # as workers and sources report
_TIDY_EVERY_S = 10.0
_OWN_EVERY_S = 5.0
_RETRY_S = 1.0
# For what has come in to be kept at the end: a disk that takes longer has no end of its own.
STOP_TIMEOUT_S = 10.0


class Daemon:
    """Watches all pipelines at the transport's broker, or one; without a transport, only its node."""

    def __init__(
        self, transport: Transport | None, pipeline: Pipeline | None = None, telemetry: TelemetryCollector | None = None
    ) -> None:
        self._transport = transport
        self._telemetry = telemetry
        self._filter = all_presence_filter(pipeline=pipeline.name if pipeline else "+")
        self._census = create_presence_table(pipeline)
        pages = {"/metrics": self._metrics, "/health": self._health}
        self._web = HttpServer(pages | ({"/stages": self._stages} if transport else {}))
        self._connecting: asyncio.Task[None] | None = None
        self._presence_s = time.monotonic()  # what was heard before is written already

    async def start(self, host: str | None, port: int, *, wait_for_broker: bool = False) -> None:
        """Listen, unless there is no host, then connect; `patient`: a broker that is not there yet is waited for.

        Raises `PortTaken`, `CannotServe`, `BrokerUnreachable`, and as `EventDoor.open`.
        """
        if host is not None:
            await self._web.start(host, port)
        if self._telemetry:
            self._telemetry.start()
        if self._transport is None:
            return
        await self._transport.subscribe(self._filter, self._heard, qos=1)
        if wait_for_broker:
            self._connecting = asyncio.create_task(self._connect(self._transport), name="first connection")
        else:
            await self._transport.connect()

    async def run(self, leaving: asyncio.Event) -> None:
        """Serve until told to leave."""
        tidy_s = own_s = time.monotonic()
        while not leaving.is_set():
            now_s = time.monotonic()
            if now_s - tidy_s >= _TIDY_EVERY_S:
                tidy_s = now_s
                self._census.expire(now_s)
            if self._telemetry:
                self._keep_presence(now_s)
                if now_s - own_s >= _OWN_EVERY_S:
                    own_s = now_s
                    self._telemetry.add([self._telemetry.monitor_point()])
            try:
                async with asyncio.timeout(_PRESENCE_EVERY_S):
                    await leaving.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Serve no more, leave the broker, and keep what has come in. May be called however far `start` came."""
        await self._web.stop()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait({self._connecting})
        if self._transport is not None:
            await self._transport.close()
        if self._telemetry:
            self._keep_presence(time.monotonic())
            await asyncio.to_thread(self._telemetry.stop, STOP_TIMEOUT_S)

    async def _connect(self, transport: Transport) -> None:
        said = False
        while True:
            try:
                await transport.connect()
                return
            except BrokerUnreachable as error:
                if not said:
                    log.warning("%s; it is waited for", error)
                said = True
            await asyncio.sleep(_RETRY_S)

    def _heard(self, delivery: Delivery) -> None:
        self._census.on_presence(delivery.topic, bytes(delivery.payload), time.monotonic(), retained=delivery.retain)

    def _keep_presence(self, now_s: float) -> None:
        """The records that are new since this was last done, as points."""
        if self._telemetry:
            since_s, self._presence_s = self._presence_s, now_s
            self._telemetry.add(presence_to_points(self._census, since_s, time.time_ns(), self._telemetry.run))

    # Pages --------------------------------------------------------------------------------------------------------

    def _metrics(self) -> HttpResponse:
        text = ""
        if self._transport:
            text += presence_metrics(self._census, time.monotonic(), connected=self._transport.is_connected)
        if self._telemetry:
            text += node_metrics([*self._telemetry.latest, self._telemetry.monitor_point()])
        return HttpResponse(text, exposition.CONTENT_TYPE)

    def _stages(self) -> HttpResponse:
        # Without the broker nothing is known, and zeros would have a scaler take workers away that have much to do.
        if self._transport is None or not self._transport.is_connected:
            return self._health()
        figures = stage_metrics(self._census, time.monotonic())
        return HttpResponse(json.dumps(figures, allow_nan=False) + "\n", "application/json")

    def _health(self) -> HttpResponse:
        if self._transport is None:
            return HttpResponse("watching this node\n")
        if self._transport.is_connected:
            return HttpResponse(f"connected to {self._transport.address}\n")
        return HttpResponse(f"not connected to {self._transport.address}\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
