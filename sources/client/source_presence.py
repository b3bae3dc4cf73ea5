"""A source's presence: that it is here, how its requests fare, and that it has gone."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import RECORD_EXPIRY_S, LatencyPercentiles, SourceLoad, SourceRecord
from brokers.mqtt.connect_errors import OperationRefused
from brokers.process.liveness_file import LivenessFile
from brokers.protocol.topics import source_presence_topic
from brokers.protocol.transport import Properties, Will

log = logging.getLogger(__name__)

_REPORT_EVERY_S = 1.0
# How long a source that ends tries to take its record away at a broker that may be gone for good.
_FAREWELL_S = 1.0
# How long a source that begins waits to be told that it may.
_ADMITTED_S = 5.0
# What "lately" is: rates are of so many seconds, percentiles of so many results.
_RATE_S = 5.0
_RESULTS = 1024


class RecentResultStats:
    """How fast results come, and how long they take, lately. Pure; times are monotonic seconds."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_RESULTS)
        self._latencies_ms: deque[float] = deque(maxlen=_RESULTS)
        self._begun_s: float | None = None

    def record_result(self, latency_ms: float, now_s: float) -> None:
        """A result came."""
        if self._begun_s is None:
            self._begun_s = now_s - latency_ms / 1000
        self._times_s.append(now_s)
        self._latencies_ms.append(latency_ms)

    def results_per_s(self, now_s: float) -> float:
        """Results a second over the last seconds, or as many of them as are remembered; 0 before there are any."""
        begin_s = max(now_s - _RATE_S, now_s if self._begun_s is None else self._begun_s)
        if len(self._times_s) == _RESULTS:
            begin_s = max(begin_s, self._times_s[0])
        count = sum(time_s > begin_s for time_s in self._times_s)
        return round(count / max(now_s - begin_s, 0.2), 2)

    def latency_ms(self) -> LatencyPercentiles:
        """Percentiles of the newest results."""
        ordered = sorted(self._latencies_ms)
        if not ordered:
            return LatencyPercentiles()
        last = len(ordered) - 1
        return LatencyPercentiles(p50=round(ordered[round(last * 0.50)], 1), p99=round(ordered[round(last * 0.99)], 1))


class SourcePresence:
    """Keeps and publishes the record of one source. Whatever becomes of the record, the source goes on.

    `load` is asked each second. Open the line with `will`: it takes the record away should this process die.
    """

    def __init__(self, line: MessageChannel, pipeline: Pipeline, name: str, load: Callable[[], SourceLoad]) -> None:
        self.state: Literal["up", "draining", "stopped"] = "up"
        self._line, self._load = line, load
        self._pulse = LivenessFile()
        # One level of a topic, whatever the source is called; what tells it from its namesakes comes last.
        fitting = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-64:] or "source"
        self._birth = SourceRecord(
            source=fitting,
            pipeline=pipeline.name,
            site=pipeline.source.site,
            node=platform.node() or "node",
            pid=os.getpid(),
            instance=secrets.token_hex(8),
        )
        self._topic = source_presence_topic(pipeline.source.site, pipeline.name, fitting)
        self._begun_s = time.monotonic()
        self._reporting: asyncio.Task[None] | None = None
        self._again = asyncio.Event()
        self._told = False  # of a failure, and not of a success since

    @property
    def will(self) -> Will:
        """What the broker is to publish when this process dies."""
        return Will(self._topic, b"", retain=True)

    async def announce(self) -> None:
        """Raise `OperationRefused` where this identity may not be a source: its requests would be dropped without a word.

        The line must be open. Whatever else goes wrong with this first record, the reports will tell.
        """
        try:
            async with asyncio.timeout(_ADMITTED_S):
                await self._publish(self._record())
        except OperationRefused:
            raise
        except Exception as error:  # noqa: BLE001 - as for every record
            log.info("source %s was not told whether it may report: %s", self._birth.source, error or "no broker")

    def start(self) -> None:
        """Begin to report: now, each second, and whenever the connection has come back. The line must be open."""
        self._begun_s = time.monotonic()
        self._line.transport.on_reconnect(self._reconnected)
        self._reporting = asyncio.create_task(self._keep_reporting(), name="standing")

    async def stop(self) -> None:
        """Say that the source has stopped, and take its record away: briefly. May be called twice; never raises."""
        reporting, self._reporting = self._reporting, None
        if reporting is None:
            return
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        self.state = "stopped"
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self._publish(self._record())
                await self._publish(b"")
        except Exception as error:  # noqa: BLE001 - it ends, and its results count for more than this
            log.info("source %s could not say that it leaves: %s", self._birth.source, error or "no broker")

    async def _reconnected(self) -> None:
        self._again.set()  # the broker may have forgotten it, or published its will

    async def _keep_reporting(self) -> None:
        while True:
            self._again.clear()
            try:
                await self._publish(self._record())
                self._pulse.touch()
                self._told = False
            except Exception as error:  # noqa: BLE001 - a record that cannot be told is no reason to stop working
                if not self._told:
                    log.warning("source %s could not report: %s", self._birth.source, error)
                    self._told = True
            # Not `wait_for`: up to Python 3.11 it loses a cancellation that comes together with what it waits for.
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_EVERY_S):
                    await self._again.wait()

    def _record(self) -> bytes:
        up_s = round(time.monotonic() - self._begun_s, 3)
        change = {"up_s": up_s, "state": self.state, "load": self._load()}
        return self._birth.model_copy(update=change).to_bytes()

    async def _publish(self, record: bytes) -> None:
        expiring = Properties(expiry_s=RECORD_EXPIRY_S)
        await self._line.transport.publish(self._topic, record, expiring, qos=1, retain=True)
