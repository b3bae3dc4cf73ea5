"""The presence record of a source: a retained message, renewed each second, cleared when the source ends."""

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
from brokers.process.log_rate_limit import LogThrottle
from brokers.protocol.transport import Properties, Will
from brokers.telemetry.percentiles import percentiles

log = logging.getLogger(__name__)

_REPORT_INTERVAL_S = 1.0
# A source that ends tries this long to clear its record: its broker may be gone for good.
_CLEAR_TIMEOUT_S = 1.0
_ANNOUNCE_TIMEOUT_S = 5.0
# The rate is that of the last seconds, the percentiles are those of the newest results.
_RATE_WINDOW_S = 5.0
_RECENT_RESULTS = 1024
_MIN_RATE_WINDOW_S = 0.2
_NAME_CHARACTERS = 64


class RecentResultStats:
    """Rate and latency of the newest results; times are monotonic seconds."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=_RECENT_RESULTS)
        self._latencies_ms: deque[float] = deque(maxlen=_RECENT_RESULTS)
        self._begin_s: float | None = None

    def record_result(self, latency_ms: float, now_s: float) -> None:
        if self._begin_s is None:
            self._begin_s = now_s - latency_ms / 1000
        self._times_s.append(now_s)
        self._latencies_ms.append(latency_ms)

    def results_per_s(self, now_s: float) -> float:
        """Results a second over the last seconds, or over the remembered results if those are fewer."""
        begin_s = max(now_s - _RATE_WINDOW_S, now_s if self._begin_s is None else self._begin_s)
        if len(self._times_s) == _RECENT_RESULTS:
            begin_s = max(begin_s, self._times_s[0])
        count = sum(time_s > begin_s for time_s in self._times_s)
        return round(count / max(now_s - begin_s, _MIN_RATE_WINDOW_S), 2)

    def latency_ms(self) -> LatencyPercentiles:
        return LatencyPercentiles(**percentiles(self._latencies_ms, (50, 99)))


class SourcePresence:
    """Keeps the presence record of one source. A failure to publish it never stops the source.

    `load` is called for each report. Open the channel with `will`, which clears the record if the process is killed.
    """

    def __init__(self, channel: MessageChannel, pipeline: Pipeline, name: str, load: Callable[[], SourceLoad]) -> None:
        self.state: Literal["up", "draining", "stopped"] = "up"
        self._channel = channel
        self._load = load
        self._liveness = LivenessFile()
        # One topic level. The end of a long name is kept: it distinguishes sources of one pipeline file.
        topic_name = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[-_NAME_CHARACTERS:] or "source"
        self._record = SourceRecord(
            source=topic_name,
            pipeline=pipeline.name,
            site=pipeline.source.site,
            node=platform.node() or "node",
            pid=os.getpid(),
            instance=secrets.token_hex(8),
        )
        self._begin_s = time.monotonic()
        self._reporter: asyncio.Task[None] | None = None
        self._report_now = asyncio.Event()
        self._throttle = LogThrottle()

    @property
    def will(self) -> Will:
        """The last will: an empty retained message, which clears the record."""
        return Will(self._record.topic, b"", retain=True)

    async def start(self) -> None:
        """Publish the record, then renew it each second and after each reconnection. The channel must be open.

        Raises `OperationRefused` where the broker's access control does not allow this identity to be a source: its
        requests would be dropped silently. All other failures are logged.
        """
        self._begin_s = time.monotonic()
        try:
            async with asyncio.timeout(_ANNOUNCE_TIMEOUT_S):
                await self._report()
        except OperationRefused:
            raise
        except Exception as error:  # noqa: BLE001 - the next report may succeed
            self._log_failure(error)
        self._channel.transport.on_reconnect(self._on_reconnect)
        self._reporter = asyncio.create_task(self._report_periodically(), name="source-presence")

    async def stop(self) -> None:
        """Publish the state `stopped`, then clear the record. Waits a second at most, never raises; idempotent."""
        reporter, self._reporter = self._reporter, None
        if reporter is None:
            return
        reporter.cancel()
        await asyncio.gather(reporter, return_exceptions=True)
        self.state = "stopped"
        try:
            async with asyncio.timeout(_CLEAR_TIMEOUT_S):
                await self._publish(self._current_record())
                await self._publish(b"")
        except Exception as error:  # noqa: BLE001 - the source ends anyway
            log.info("source %s: presence record not cleared: %s", self._record.source, error)

    async def _on_reconnect(self) -> None:
        self._report_now.set()  # the broker may have lost the record, or published the will

    async def _report_periodically(self) -> None:
        while True:
            # Not `wait_for`: before Python 3.12 it loses a cancellation that coincides with the end of the wait.
            with suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_INTERVAL_S):
                    await self._report_now.wait()
            self._report_now.clear()
            try:
                await self._report()
            except Exception as error:  # noqa: BLE001 - requests go on without presence
                self._log_failure(error)

    async def _report(self) -> None:
        await self._publish(self._current_record())
        self._liveness.touch()
        self._throttle.reset()

    def _log_failure(self, error: Exception) -> None:
        if self._throttle.allows():
            reason = str(error) or type(error).__name__
            log.warning("source %s: cannot publish its presence record: %s", self._record.source, reason)

    def _current_record(self) -> bytes:
        up_s = round(time.monotonic() - self._begin_s, 3)
        update = {"up_s": up_s, "state": self.state, "load": self._load()}
        return self._record.model_copy(update=update).to_bytes()

    async def _publish(self, record: bytes) -> None:
        properties = Properties(expiry_s=RECORD_EXPIRY_S)
        await self._channel.transport.publish(self._record.topic, record, properties, qos=1, retain=True)
