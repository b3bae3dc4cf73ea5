"""Publishes the presence record of this process: a retained message, renewed each second, removed when it ends.

The file that SPARSE_LIVENESS_FILE names is touched each time the broker has acknowledged the record. Docker and
Kubernetes check a container every few seconds, by the age of this file; asking the broker instead would take a second
client, with a password, for each check.
"""

import asyncio
import logging
import os
import platform
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

from brokers.dispatch.presence import RECORD_EXPIRY_S, SourceRecord, WorkerRecord
from brokers.errors import SparseError
from brokers.protocol.transport import Properties, Transport, Will

log = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
LIVENESS_VARIABLE = "SPARSE_LIVENESS_FILE"

R = TypeVar("R", WorkerRecord, SourceRecord)


def describe_process() -> dict[str, Any]:
    """The fields of a presence record that identify this process."""
    return {"node": platform.node() or "node", "pid": os.getpid(), "instance": secrets.token_hex(8)}


class PresencePublisher(Generic[R]):
    """Publishes `record`. Open the connection with `will`, which removes the record if the process is killed."""

    def __init__(self, transport: Transport, record: R) -> None:
        self.record: R = record
        self._transport = transport
        liveness_path = os.environ.get(LIVENESS_VARIABLE)
        self._liveness_file = Path(liveness_path) if liveness_path else None
        self._joined_s: float | None = None
        self._report_requested = asyncio.Event()
        self._is_failing = False

    @property
    def will(self) -> Will:
        """The last will: an empty retained message, which removes the record."""
        return Will(self.record.topic, b"", retain=True)

    @property
    def up_s(self) -> float | None:
        """Seconds since the first publication; None before it."""
        return None if self._joined_s is None else round(time.monotonic() - self._joined_s, 3)

    async def publish(self, **update: Any) -> None:
        """Publish the record with these fields changed. The first call begins `up_s`."""
        if self._joined_s is None:
            self._joined_s = time.monotonic()
        self.record = self.record.model_copy(update={"up_s": self.up_s, **update})
        await self._send(self.record.to_bytes())
        if self._liveness_file is not None:
            try:
                self._liveness_file.touch()
            except OSError as error:
                log.warning("cannot touch %s, health checks will fail: %s", LIVENESS_VARIABLE, error)
                self._liveness_file = None

    def report_soon(self) -> None:
        """Report now, and not only at the next second: other processes wait for a change."""
        self._report_requested.set()

    async def report_periodically(
        self, report: Callable[[], Awaitable[None]], tolerated: type[Exception] = SparseError
    ) -> None:
        """Call `report` every second and after `report_soon`; errors of the type `tolerated` are logged once."""
        while True:
            # Not `wait_for`: before Python 3.12 it loses a cancellation that coincides with the end of the wait.
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._report_requested.wait()
            self._report_requested.clear()
            try:
                await report()
                self._is_failing = False
            except tolerated as error:
                self.log_failure(error)

    def log_failure(self, error: Exception) -> None:
        """Log why a report failed, unless the one before failed too."""
        if not self._is_failing:
            self._is_failing = True
            log.warning("cannot publish presence record %s: %s", self.record.topic, str(error) or type(error).__name__)

    async def remove(self, **update: Any) -> None:
        """Publish with these fields changed that the process has stopped, then remove the record."""
        if self._joined_s is not None:
            await self.publish(state="stopped", **update)
            await self._send(b"")

    async def _send(self, payload: bytes) -> None:
        properties = Properties(expiry_s=RECORD_EXPIRY_S)
        await self._transport.publish(self.record.topic, payload, properties, qos=1, retain=True)
