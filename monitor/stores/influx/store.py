"""Telemetry in InfluxDB: points are spooled to disk and sent in order by a thread; a reader reads them back."""

import gzip
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from brokers.process.backoff import Backoff
from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint, row_to_point
from monitor.points.schema import MEASUREMENTS
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import InfluxClient, InfluxError, InfluxErrorKind, LineEncoder, sanitize_tag
from monitor.stores.influx.spool import SPOOL_LIMIT_BYTES, Spool, SpooledBatch

log = logging.getLogger(__name__)

_BATCH_POINTS = 5000  # recommended by InfluxDB's documentation
_GZIP_LEVEL = 1  # higher levels save a tenth of the bytes and take three times as long
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
MISCONFIGURED_RETRY_S = 60.0  # the user has to correct something first
CLOSE_TIMEOUT_S = 3.0  # for sending the rest on close
_QUOTED = str.maketrans({"\\": r"\\", "'": r"\'"})


class InfluxStore:
    """A store that never waits for the network: each write becomes files in `folder`, which a thread sends.

    While the server is down, or refuses the token or bucket, nothing is lost until `limit_bytes` of points wait; then
    the oldest are dropped and counted. Raises `BadStore` for a folder that cannot be written. Used by one thread at a
    time beside its own; a `BatchWriter` makes writes large enough.
    """

    def __init__(self, target: InfluxTarget, folder: Path, *, limit_bytes: int = SPOOL_LIMIT_BYTES) -> None:
        self.target = target
        self._spool = Spool(folder, limit_bytes)
        self._client = InfluxClient(target)
        self._encoder = LineEncoder()
        self._backoff = Backoff(INITIAL_BACKOFF_S, MAX_BACKOFF_S)
        self._unspooled = 0  # points lost because the disk did not accept them
        self._problem = ""  # the last failure that was logged; empty while batches are accepted
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._deadline_s = float("inf")
        self._thread = threading.Thread(target=self._run, name="influx-sender", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Points that the server has not accepted yet."""
        return self._spool.point_count

    @property
    def dropped(self) -> int:
        """Points lost: the spool or the disk was full, or the server rejected them."""
        return self._spool.dropped + self._unspooled

    def check(self) -> None:
        """Raise `BadStore` if the token, bucket or address is wrong; a server that is down is not an error."""
        try:
            with closing(InfluxClient(self.target)) as client:
                client.write(b"", encoding="identity")
        except InfluxError as error:
            # InfluxDB 2 rejects an empty body, but only after it has checked the token and the bucket.
            if error.kind is InfluxErrorKind.MISCONFIGURED:
                raise BadStore(str(self.target), error.problem) from None

    def write(self, items: Sequence[TelemetryPoint]) -> None:
        """Spool points; those without any value are left out. Raises `BadStore` after `close`."""
        if self._closing.is_set():
            raise BadStore(str(self.target), "the store is closed")
        lines = self._encoder.encode(items)
        for begin in range(0, len(lines), _BATCH_POINTS):
            batch = lines[begin : begin + _BATCH_POINTS]
            try:
                self._spool.put(gzip.compress("\n".join([*batch, ""]).encode(), _GZIP_LEVEL), len(batch))
            except OSError as error:
                self._unspooled += len(batch)
                reason = error.strerror or str(error)
                self._warn_on_change(f"points are lost: cannot write to {self._spool.folder}: {reason}")
        self._wake.set()

    def close(self) -> None:
        """Send what can be sent within CLOSE_TIMEOUT_S; the rest stays in the spool. May be called twice."""
        if not self._closing.is_set():
            self._deadline_s = time.monotonic() + CLOSE_TIMEOUT_S
            self._closing.set()
            self._wake.set()
        # A request that hangs ends by its own timeout, and the thread with it.
        self._thread.join(CLOSE_TIMEOUT_S + 1.0)

    def _run(self) -> None:
        try:
            while time.monotonic() < self._deadline_s:
                self._wake.clear()
                first = self._spool.first()
                if first is not None:
                    retry_s = self._send(*first)
                    if retry_s and self._closing.wait(retry_s):
                        return
                elif self._closing.is_set():
                    return
                else:
                    self._wake.wait()
        finally:
            self._client.close()
            self._spool.close()

    def _send(self, batch: SpooledBatch, data: bytes) -> float:
        """Send a batch; seconds until it must be sent again, 0 if it is done with."""
        try:
            self._client.write(data)
        except InfluxError as error:
            if error.kind is InfluxErrorKind.REJECTED:
                lost = batch.point_count if error.dropped_points is None else error.dropped_points
                self._spool.ack(lost=min(lost, batch.point_count))
                self._warn_on_change(f"the server rejects points: {error.problem}")
                return 0.0
            self._warn_on_change(f"{error.problem}; points wait in {self._spool.folder}")
            if error.kind is InfluxErrorKind.MISCONFIGURED:
                return MISCONFIGURED_RETRY_S
            return self._backoff.next_s()
        self._spool.ack()
        self._backoff.reset()
        if self._problem:
            log.info("telemetry in %s: points are accepted again; %d wait", self.target, self.waiting)
            self._problem = ""
        return 0.0

    def _warn_on_change(self, problem: str) -> None:
        if problem != self._problem:
            self._problem = problem
            log.warning("telemetry in %s: %s", self.target, problem)


class InfluxReader:
    """Reads the points of an `InfluxStore` back, with the methods of `SqliteReader`; raises `BadStore`."""

    def __init__(self, target: InfluxTarget) -> None:
        self.target = target

    def runs(self) -> list[str]:
        first_ns: dict[str, int] = {}
        for measurement, field in (("request", "attempts"), ("step", "step")):
            for series in self._query(f'SELECT first("{field}"::field) FROM "{measurement}" GROUP BY "run"'):
                run = (series.get("tags") or {}).get("run") or ""
                for row in series.get("values", ()):
                    first_ns[run] = min(row[0], first_ns.get(run, row[0]))
        return sorted(first_ns, key=lambda run: (first_ns[run], run))

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        schema = MEASUREMENTS[measurement]
        columns = [f'"{tag}"::tag' for tag in schema.tags] + [f'"{field.name}"::field' for field in schema.fields]
        where = "" if run is None else f" WHERE \"run\"::tag = '{sanitize_tag(run).translate(_QUOTED)}'"
        answer = self._query(f'SELECT {", ".join(columns)} FROM "{measurement}"{where}')
        return [row_to_point(measurement, row) for series in answer for row in series["values"]]

    def _query(self, query: str) -> Iterator[dict[str, Any]]:
        """The series of the answer, possibly in several parts, sorted by time."""
        result: dict[str, Any] = {}
        try:
            with closing(InfluxClient(self.target)) as client:
                for document in client.query(query):
                    result = (document.get("results") or [{}])[0]
                    if problem := document.get("error") or result.get("error"):
                        raise BadStore(str(self.target), str(problem))
                    yield from result.get("series") or ()
        except InfluxError as error:
            raise BadStore(str(self.target), error.problem) from None
        if result.get("partial"):
            raise BadStore(str(self.target), "the answer is incomplete: the connection ended too early")
