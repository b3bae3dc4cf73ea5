"""Telemetry out of InfluxDB, by InfluxQL on `/query`, which versions 1, 2 and 3 all answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS, FieldType, Measurement
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import InfluxClient, InfluxError
from monitor.stores.line_protocol import sanitize_tag

_STRING = str.maketrans({"\\": r"\\", "'": r"\'"})


class InfluxReader:
    """Reads what an `InfluxStore` wrote; raises `BadStore` for a server or a bucket that does not answer."""

    def __init__(self, target: InfluxTarget) -> None:
        self.target = target

    def runs(self) -> list[str]:
        """The names of the runs that have requests or steps, the oldest first; empty where the points name none."""
        first: dict[str, int] = {}
        for measurement, field in (("request", "attempts"), ("step", "step")):
            for series in self._ask(f'SELECT first("{field}"::field) FROM "{measurement}" GROUP BY "run"'):
                run = (series.get("tags") or {}).get("run") or ""
                for row in series.get("values", ()):
                    first[run] = min(row[0], first.get(run, row[0]))
        return sorted(first, key=lambda run: (first[run], run))

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        """The points of a measurement, by time; of one run, where it is given."""
        known = MEASUREMENTS[measurement]
        columns = [f'"{tag}"::tag' for tag in known.tags] + [f'"{field.name}"::field' for field in known.fields]
        where = "" if run is None else f" WHERE \"run\"::tag = '{sanitize_tag(run).translate(_STRING)}'"
        found = self._ask(f'SELECT {", ".join(columns)} FROM "{measurement}"{where}')
        return [_point(known, row) for series in found for row in series["values"]]

    def _ask(self, query: str) -> Iterator[dict[str, Any]]:
        """The series of the answer, in pieces; InfluxDB sorts by time."""
        http = InfluxClient(self.target)
        more = False
        try:
            for document in http.query(query):
                results = document.get("results") or [{}]
                problem = document.get("error") or results[0].get("error")
                if problem:
                    raise BadStore(str(self.target), str(problem))
                yield from results[0].get("series") or ()
                more = bool(results[0].get("partial"))
        except InfluxError as trouble:
            raise BadStore(str(self.target), trouble.problem) from None
        finally:
            http.close()
        if more:
            raise BadStore(str(self.target), "its answer is not complete: it ended in the middle")


def _point(known: Measurement, row: Sequence[Any]) -> TelemetryPoint:
    split = 1 + len(known.tags)
    tags = {tag: value or "" for tag, value in zip(known.tags, row[1:split], strict=True)}
    fields = {field.name: _value(field.type, value) for field, value in zip(known.fields, row[split:], strict=True)}
    return TelemetryPoint(known.name, row[0], tags, fields)


def _value(kind: FieldType, value: FieldValue) -> FieldValue:
    # JSON has one kind of number, and 5.0 comes as 5.
    return float(value) if kind == "float" and value is not None else value
