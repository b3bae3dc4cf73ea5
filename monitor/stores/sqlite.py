"""Telemetry in one SQLite file: a table for each measurement, with a column for each tag and field."""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint, row_to_point
from monitor.points.schema import MEASUREMENTS, Measurement

TELEMETRY_FILE = "telemetry.sqlite"  # in the folder of a run
_TYPES = {"float": "REAL", "int": "INTEGER", "text": "TEXT"}
_BUSY_TIMEOUT_S = 10.0  # a reader may lock the file for a moment
_DELETED_SHARE = 0.1  # of each table, when the file reaches its limit; SQLite reuses the pages
_SHORT_TABLE_ROWS = 1000


class SqliteStore:
    """Writes points to a file, which is created if missing; used by one thread at a time. Raises `BadStore`."""

    waiting = 0  # a write stores all points or raises
    dropped = 0

    def __init__(self, path: Path, limit_bytes: int | None = None) -> None:
        """A file that reaches `limit_bytes` loses its oldest points."""
        self.path = path
        self._limit_bytes = limit_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, check_same_thread=False)
            # Readers are not blocked by writes; a power failure loses the last transactions and nothing else.
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            for measurement in MEASUREMENTS.values():
                self._connection.execute(_create_table(measurement))
                self._check_columns(measurement)
            self._connection.commit()
        except (OSError, sqlite3.Error) as error:
            raise BadStore(str(path), str(error)) from None

    def write(self, items: Sequence[TelemetryPoint]) -> None:
        """Store all points in one transaction."""
        rows: dict[str, list[tuple[FieldValue, ...]]] = defaultdict(list)
        for point in items:
            rows[point.measurement].append(_row(point))
        try:
            with self._connection:
                for name, values in rows.items():
                    self._connection.executemany(_insert(MEASUREMENTS[name]), values)
            if self._limit_bytes is not None and self._used_bytes() > self._limit_bytes:
                self._delete_oldest()
        except sqlite3.Error as error:
            raise BadStore(str(self.path), str(error)) from None

    def close(self) -> None:
        """Merge the write-ahead log into the file, so that it is the only one left."""
        with suppress(sqlite3.Error):  # a reader has it open
            self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()

    def _check_columns(self, measurement: Measurement) -> None:
        """Refuse a file of another version: rows are inserted by position."""
        columns = [row[1] for row in self._connection.execute(f'PRAGMA table_info("{measurement.name}")')]
        if columns != ["time_ns", *_columns(measurement)]:
            self._connection.close()
            problem = f"its table {measurement.name!r} has the columns of another version of Sparse: name another file"
            raise BadStore(str(self.path), problem)

    def _used_bytes(self) -> int:
        pages, free_pages, page_bytes = (
            self._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return int((pages - free_pages) * page_bytes)

    def _delete_oldest(self) -> None:
        """Delete the oldest rows of each long table, in the order of writing: times are what senders claim.

        Short tables hold records written once, such as missing sensors, and are kept.
        """
        for name in MEASUREMENTS:
            first, last = self._connection.execute(f'SELECT min(rowid), max(rowid) FROM "{name}"').fetchone()
            if first is not None and last - first >= _SHORT_TABLE_ROWS:
                keep_from = first + max(1, int((last - first) * _DELETED_SHARE))
                with self._connection:  # one short transaction for each table
                    self._connection.execute(f'DELETE FROM "{name}" WHERE rowid < ?', (keep_from,))


class SqliteReader:
    """Reads points back from the file of a `SqliteStore`, also while it is written; raises `BadStore`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise BadStore(str(path), "there is no such file")

    def runs(self) -> list[str]:
        """The names of the runs that have requests or steps, oldest first; "" is points without a run."""
        ends = "SELECT run, time_ns FROM request UNION ALL SELECT run, time_ns FROM step"
        return [str(run) for (run,) in self._query(f"SELECT run FROM ({ends}) GROUP BY run ORDER BY min(time_ns)")]

    def points(self, measurement: str, run: str | None = None) -> list[TelemetryPoint]:
        """The points of a measurement, of all runs or one, in the order of time."""
        schema = MEASUREMENTS[measurement]
        # With its table: SQLite takes a quoted name alone for a text where there is no such column.
        columns = ", ".join(f'"{measurement}"."{name}"' for name in _columns(schema))
        where, values = ("WHERE run = ?", (run,)) if run is not None else ("", ())
        rows = self._query(f'SELECT time_ns, {columns} FROM "{measurement}" {where} ORDER BY time_ns', values)
        return [row_to_point(measurement, row) for row in rows]

    def _query(self, query: str, values: Iterable[FieldValue] = ()) -> list[tuple[Any, ...]]:
        uri = f"{self.path.resolve().as_uri()}?mode=ro"
        try:
            with closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S)) as connection:
                return connection.execute(query, tuple(values)).fetchall()
        except sqlite3.Error as error:
            no_table = isinstance(error, sqlite3.OperationalError) and str(error).startswith("no such table")
            problem = "it holds no telemetry of Sparse" if no_table else f"no telemetry of Sparse: {error}"
            raise BadStore(str(self.path), problem) from None


def _columns(measurement: Measurement) -> list[str]:
    return [*measurement.tags, *(field.name for field in measurement.fields)]


def _create_table(measurement: Measurement) -> str:
    tags = [f"\"{tag}\" TEXT NOT NULL DEFAULT ''" for tag in measurement.tags]
    fields = [f'"{field.name}" {_TYPES[field.type]}' for field in measurement.fields]
    columns = ", ".join(["time_ns INTEGER NOT NULL", *tags, *fields])
    return f'CREATE TABLE IF NOT EXISTS "{measurement.name}" ({columns})'


def _insert(measurement: Measurement) -> str:
    placeholders = ", ".join("?" * (1 + len(_columns(measurement))))
    return f'INSERT INTO "{measurement.name}" VALUES ({placeholders})'


def _row(point: TelemetryPoint) -> tuple[FieldValue, ...]:
    measurement = MEASUREMENTS[point.measurement]
    tags = (point.tags.get(tag, "") for tag in measurement.tags)
    fields = (point.fields.get(field.name) for field in measurement.fields)
    return (point.time_ns, *tags, *fields)
