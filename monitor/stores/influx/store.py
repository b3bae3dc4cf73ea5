"""Telemetry in InfluxDB: points wait on disk, and a thread sends them in order, whatever the server does meanwhile."""

from __future__ import annotations

import gzip
import logging
import threading
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import InfluxClient, InfluxError, InfluxErrorKind
from monitor.stores.influx.spool import SPOOL_LIMIT_BYTES, Spool, SpooledBatch
from monitor.stores.line_protocol import LineEncoder

log = logging.getLogger(__name__)

_BATCH_POINTS = 5000  # what InfluxDB's documentation finds best
# Higher levels save a tenth of the bytes, and take three times as long.
_LEVEL = 1


@dataclass(frozen=True, slots=True)
class InfluxTimings:
    """How long is waited, in seconds."""

    flush_interval_s: float = 1.0  # a point waits in memory at most: what a killed monitor loses
    initial_backoff_s: float = 0.5  # before the second attempt; doubled with each
    max_backoff_s: float = 30.0
    misconfigured_retry_s: float = 60.0  # where a person has to mend something first
    close_timeout_s: float = 3.0  # for the rest, at the end


class InfluxStore:
    """Writes points to a server, sooner or later; those that wait are files in `folder`.

    `write` never waits for the network. A server that is away, or has another token or no such bucket, loses nothing
    until `limit_bytes` of points wait; then the oldest go, and are counted in `dropped`. Raises `BadStore` for a folder
    that cannot be written. One thread at a time, beside its own.
    """

    def __init__(
        self,
        target: InfluxTarget,
        folder: Path,
        *,
        limit_bytes: int = SPOOL_LIMIT_BYTES,
        timings: InfluxTimings | None = None,
    ) -> None:
        self.target = target
        self._waits = timings or InfluxTimings()
        self._spool = Spool(folder, limit_bytes)
        self._http = InfluxClient(target)
        self._lines = LineEncoder()
        self._guard = threading.Lock()  # of the three below
        self._fresh: list[str] = []
        self._fresh_since_s = 0.0
        self._unkept = 0  # points that the disk did not take
        self._told: set[str] = set()  # of what happens again and again, what was said once
        self._trouble: str | None = None
        self._more, self._leaving = threading.Event(), threading.Event()
        self._end_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="influx-sender", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Points that the server has not taken yet."""
        with self._guard:  # none is on its way from memory to disk
            return self._spool.point_count + len(self._fresh)

    @property
    def dropped(self) -> int:
        """Points that are lost: there was no room for them, or the server refused them for good."""
        return self._spool.dropped + self._unkept

    def check(self) -> None:
        """Raises `BadStore` where a token, a bucket or an address is wrong; a server that is away is no mistake."""
        http = InfluxClient(self.target)
        try:
            http.write(b"", encoding="identity")
        except InfluxError as trouble:
            # InfluxDB 2 wants points; but it says so only to one who may write them.
            if trouble.kind is InfluxErrorKind.MISCONFIGURED:
                raise BadStore(str(self.target), trouble.problem) from None
        finally:
            http.close()

    def write(self, points: Sequence[TelemetryPoint]) -> None:
        """Take them; what has no value at all is no point. Raises `BadStore` after `close`."""
        if self._leaving.is_set():
            raise BadStore(str(self.target), "it is closed")
        with self._guard:
            if not self._fresh:
                self._fresh_since_s = time.monotonic()
            self._fresh += self._lines.encode(points)
            full = len(self._fresh) >= _BATCH_POINTS
        self._flush(force=full)

    def close(self) -> None:
        """Send what can be sent in a few seconds; the rest stays on disk for the next one. May be called twice."""
        if not self._leaving.is_set():
            self._flush(force=True)
            self._end_s = time.monotonic() + self._waits.close_timeout_s
            self._leaving.set()
            self._more.set()
        # A request that hangs ends by its own limit, and the thread with it: nobody waits here for that.
        self._thread.join(self._waits.close_timeout_s + 1.0)

    # Into the spool -----------------------------------------------------------------------------------------------

    def _flush(self, *, force: bool = False) -> None:
        with self._guard:
            old = time.monotonic() - self._fresh_since_s >= self._waits.flush_interval_s
            while self._fresh and (force or old):
                lines, self._fresh = self._fresh[:_BATCH_POINTS], self._fresh[_BATCH_POINTS:]
                self._keep(lines)

    def _keep(self, lines: list[str]) -> None:
        try:
            self._spool.put(gzip.compress("\n".join([*lines, ""]).encode(), _LEVEL), len(lines))
        except OSError as error:
            self._unkept += len(lines)
            self._once("disk", "points are lost: %s cannot be written: %s", self._spool.folder, error.strerror or error)
        self._more.set()

    # Out of it ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            wait_s = self._waits.initial_backoff_s
            while not self._over():
                self._flush()
                held = self._spool.take()
                if held is None:
                    if self._leaving.is_set():
                        return
                    self._more.wait(self._waits.flush_interval_s)
                    self._more.clear()
                    continue
                trouble = self._send(*held)
                if trouble is None:
                    wait_s = self._waits.initial_backoff_s
                elif self._leaving.is_set():
                    return
                else:
                    self._pause(
                        self._waits.misconfigured_retry_s if trouble.kind is InfluxErrorKind.MISCONFIGURED else wait_s
                    )
                    wait_s = min(2 * wait_s, self._waits.max_backoff_s)
        finally:
            self._http.close()
            self._spool.close()

    def _over(self) -> bool:
        return time.monotonic() >= self._end_s

    def _pause(self, seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0 and not self._leaving.wait(
            min(left_s, self._waits.flush_interval_s)
        ):
            self._flush()

    def _send(self, batch: SpooledBatch, data: bytes) -> InfluxError | None:
        """The trouble after which this batch has to wait; None when it is done with, kept or not."""
        if batch.recovered and not _whole(data):
            log.warning("lost %d points: %s is broken", batch.point_count, self._spool.folder / batch.name)
            self._spool.ack(lost=batch.point_count)
            return None
        try:
            self._http.write(data)
        except InfluxError as trouble:
            if trouble.kind is InfluxErrorKind.REJECTED:
                self._refused(batch, trouble)
                return None
            self._spool.release()
            self._say(trouble)
            return trouble
        self._spool.ack()
        if self._trouble is not None:
            log.info("telemetry in %s: it takes points again; %d wait", self.target, self.waiting)
            self._trouble = None
        return None

    def _refused(self, batch: SpooledBatch, trouble: InfluxError) -> None:
        lost = batch.point_count if trouble.dropped_points is None else min(trouble.dropped_points, batch.point_count)
        self._spool.ack(lost=lost)
        self._once(
            trouble.problem[:20],
            "telemetry in %s: %d points of %d are refused for good: %s",
            *(self.target, lost, batch.point_count, trouble.problem),
        )

    def _say(self, trouble: InfluxError) -> None:
        if trouble.problem != self._trouble:
            self._trouble = trouble.problem
            log.warning("telemetry in %s: %s; points wait in %s", self.target, trouble.problem, self._spool.folder)

    def _once(self, key: str, message: str, *values: object) -> None:
        if key not in self._told:
            self._told.add(key)
            log.warning(message, *values)


def _whole(data: bytes) -> bool:
    try:
        gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return False
    return True
