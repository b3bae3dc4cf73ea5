"""The daemon behind `sparse monitor`: hears at the broker who is up, and shows it over HTTP. Three verbs: start, run,
stop.
"""

from __future__ import annotations

import asyncio
import json
import time
from http import HTTPStatus

from brokers.pipeline import Pipeline
from brokers.topics import every_presence
from brokers.transport import Delivery, Transport
from monitor import exposition
from monitor.census import census
from monitor.metrics import metrics
from monitor.stage_figures import stage_figures
from monitor.web import Answer, Web

_TIDY_EVERY_S = 10.0


class Daemon:
    """Watches all pipelines at the transport's broker, or one."""

    def __init__(self, transport: Transport, pipeline: Pipeline | None = None) -> None:
        self._transport = transport
        self._filter = every_presence(pipeline=pipeline.name if pipeline else "+")
        self._census = census(pipeline)
        self._web = Web({"/metrics": self._metrics, "/stages": self._stages, "/health": self._health})

    async def start(self, host: str, port: int) -> None:
        """Listen, then connect; raises `PortTaken`, `CannotServe` or `BrokerUnreachable`."""
        await self._web.start(host, port)
        await self._transport.subscribe(self._filter, self._heard, qos=1)
        await self._transport.connect()

    async def run(self, leaving: asyncio.Event) -> None:
        """Serve until told to leave."""
        while not leaving.is_set():
            self._census.forget(time.monotonic())
            try:
                async with asyncio.timeout(_TIDY_EVERY_S):
                    await leaving.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """Serve no more, and leave the broker. May be called however far `start` came."""
        await self._web.stop()
        await self._transport.close()

    def _heard(self, delivery: Delivery) -> None:
        self._census.heard_birth(delivery.topic, bytes(delivery.payload), time.monotonic(), retained=delivery.retain)

    # Pages --------------------------------------------------------------------------------------------------------

    def _metrics(self) -> Answer:
        text = metrics(self._census, time.monotonic(), connected=self._transport.connected)
        return Answer(text, exposition.CONTENT_TYPE)

    def _stages(self) -> Answer:
        # Without the broker nothing is known, and zeros would have a scaler take workers away that have much to do.
        if not self._transport.connected:
            return self._health()
        figures = stage_figures(self._census, time.monotonic())
        return Answer(json.dumps(figures, allow_nan=False) + "\n", "application/json")

    def _health(self) -> Answer:
        if self._transport.connected:
            return Answer(f"connected to {self._transport.address}\n")
        return Answer(f"not connected to {self._transport.address}\n", status=HTTPStatus.SERVICE_UNAVAILABLE)
