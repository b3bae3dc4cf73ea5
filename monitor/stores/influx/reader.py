"""Reads telemetry from InfluxDB."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint, row_to_point
from monitor.points.schema import MEASUREMENTS
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import InfluxClient, InfluxError, sanitize_tag

_QUOTED = str.maketrans({"\\": r"\\", "'": r"\'"})


class InfluxReader:
    """A `StoreReader` of the points of an `InfluxStore`."""

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
