"""Telemetry in one SQLite file: a table for each measurement, a column for each tag and field. No server needed."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS, Measurement

TELEMETRY_FILE = "telemetry.sqlite"  # in the folder of a run
_TYPES = {"float": "REAL", "int": "INTEGER", "bool": "INTEGER", "text": "TEXT"}
_BUSY_S = 10.0  # a reader may hold the file for a moment
# Of a file that has grown to its limit so much goes, the oldest; its place in the file is used again.
_ROOM_MADE = 0.1
_SHORT_TABLE = 1000  # rows


class SqliteStore:
    """Writes points. One thread at a time; raises `BadStore` for a file that is none of ours, or cannot be written."""

    def __init__(self, path: Path, limit_bytes: int | None = None) -> None:
        """A file that reaches its limit, if it has one, loses its oldest points."""
        self.path = path
        self._limit_bytes = limit_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, check_same_thread=False)
            # Readers look on while we write; a power cut loses the last moments and nothing else.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            for measurement in MEASUREMENTS.values():
                self._connection.execute(_create(measurement))
            self._connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise BadStore(str(path), str(error)) from None

    def write(self, points: Sequence[TelemetryPoint]) -> None:
        """All of them, or none; raises `BadStore`."""
        rows: dict[str, list[tuple[FieldValue, ...]]] = defaultdict(list)
        for point in points:
            rows[point.measurement].append(_row(point))
        try:
            with self._connection:
                for name, values in rows.items():
                    self._connection.executemany(_insert(MEASUREMENTS[name]), values)
            if self._limit_bytes is not None and self._used_bytes() > self._limit_bytes:
                self._make_room()
        except sqlite3.Error as error:
            raise BadStore(str(self.path), str(error)) from None

    def close(self) -> None:
        """Leaves one file: what SQLite keeps beside it goes into it, and readers make nothing new."""
        with suppress(sqlite3.Error):  # somebody reads it just now
            self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()

    def _used_bytes(self) -> int:
        pages, free, page_bytes = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free) * page_bytes)

    def _make_room(self) -> None:
        """Take the oldest tenth of each table: in the order of writing, since times are what senders say they are.

        Short tables stay: what is said once, such as a sensor that is missing, is in one.
        """
        for name in MEASUREMENTS:
            first, last = self._connection.execute(f'SELECT min(rowid), max(rowid) FROM "{name}"').fetchone()
            if first is not None and last - first >= _SHORT_TABLE:
                cut = first + max(1, int((last - first) * _ROOM_MADE))
                with self._connection:  # a transaction each, so that none is long
                    self._connection.execute(f'DELETE FROM "{name}" WHERE rowid < ?', (cut,))


class SqliteReader:
    """Reads what a `SqliteStore` wrote, also while that goes on; raises `BadStore` for a file of anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise BadStore(str(path), "there is no such file")

    def runs(self) -> list[str]:
        """The names of the runs that have requests or steps, the oldest first; empty where the points name none."""
        found = "SELECT run, time_ns FROM request UNION ALL SELECT run, time_ns FROM step"
        return [str(run) for (run,) in self._ask(f"SELECT run FROM ({found}) GROUP BY run ORDER BY min(time_ns)")]

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        """The points of a measurement, by time; of one run, where it is given."""
        known = MEASUREMENTS[measurement]
        names = [field.name for field in known.fields]
        columns = ", ".join(f'"{name}"' for name in (*known.tags, *names))
        where, values = ("WHERE run = ?", (run,)) if run is not None else ("", ())
        found = self._ask(f'SELECT time_ns, {columns} FROM "{measurement}" {where} ORDER BY time_ns', values)
        split = 1 + len(known.tags)
        return [
            TelemetryPoint(
                measurement,
                row[0],
                dict(zip(known.tags, row[1:split], strict=True)),
                dict(zip(names, row[split:], strict=True)),
            )
            for row in found
        ]

    def _ask(self, query: str, values: Iterable[FieldValue] = ()) -> list[tuple[Any, ...]]:
        try:
            with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)) as file:
                return file.execute(query, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise BadStore(str(self.path), _told(error)) from None


def _told(error: sqlite3.Error) -> str:
    if isinstance(error, sqlite3.OperationalError) and str(error).startswith("no such table"):
        return "it holds no telemetry of Sparse"
    return f"no telemetry of Sparse: {error}"


def _create(measurement: Measurement) -> str:
    tags = [f"\"{tag}\" TEXT NOT NULL DEFAULT ''" for tag in measurement.tags]
    fields = [f'"{field.name}" {_TYPES[field.type]}' for field in measurement.fields]
    columns = ", ".join(["time_ns INTEGER NOT NULL", *tags, *fields])
    return f'CREATE TABLE IF NOT EXISTS "{measurement.name}" ({columns})'


def _insert(measurement: Measurement) -> str:
    places = ", ".join("?" * (1 + len(measurement.tags) + len(measurement.fields)))
    return f'INSERT INTO "{measurement.name}" VALUES ({places})'


def _row(point: TelemetryPoint) -> tuple[FieldValue, ...]:
    known = MEASUREMENTS[point.measurement]
    tags = (point.tags.get(tag, "") for tag in known.tags)
    fields = (point.fields.get(field.name) for field in known.fields)
    return (point.time_ns, *tags, *fields)
