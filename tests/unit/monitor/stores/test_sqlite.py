"""The SQLite store as a file: bounded in size, and a single file after close."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.stores.sqlite import SqliteReader, SqliteStore
from tests.support.errors import raises_error

LIMIT_BYTES = 500_000
BATCH_POINTS = 200


def make_batch(number: int, time_ns: int | None = None) -> list[TelemetryPoint]:
    """Points of one time, as a worker sends them, and a rare one."""
    when_ns = number + 1 if time_ns is None else time_ns
    tags = {"node": "here", "run": "r", "stage": "body", "worker": "w1"}
    fields: dict[str, FieldValue] = {"compute_ms": 1.0, "request": "ab" * 16}
    tasks = [TelemetryPoint("task", when_ns, tags, fields) for _ in range(BATCH_POINTS)]
    return [*tasks, TelemetryPoint("node", when_ns, {"node": "here"}, {"cpu": 0.5})]


def test_file_stays_below_its_limit_and_keeps_newest_points(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    store = SqliteStore(path, LIMIT_BYTES)
    store.write([TelemetryPoint("missing", 1, {"node": "here", "sensor": "gpu"}, {"reason": "no driver"})])
    for number in range(50):
        store.write(make_batch(number))
    store.close()
    assert path.stat().st_size < 1.2 * LIMIT_BYTES
    times = [point.time_ns for point in SqliteReader(path).points("task")]
    assert times[-BATCH_POINTS:] == [50] * BATCH_POINTS
    assert times == sorted(times)
    assert 1 < times[0] < 49  # the oldest are deleted, and not much more
    assert len(SqliteReader(path).points("missing")) == 1  # a short table is kept


def test_made_up_times_do_not_defeat_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    store = SqliteStore(path, LIMIT_BYTES)
    for number in range(40):
        store.write(make_batch(number, time_ns=(1 << 62) - number if number % 2 else 1))
    store.close()
    assert path.stat().st_size < 1.2 * LIMIT_BYTES
    assert len(SqliteReader(path).points("task")) > BATCH_POINTS


def test_closed_store_is_one_file_without_a_limit(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "telemetry.sqlite")
    for number in range(5):
        store.write(make_batch(number))
    store.close()
    assert len(SqliteReader(tmp_path / "telemetry.sqlite").points("task")) == 5 * BATCH_POINTS
    assert [path.name for path in tmp_path.iterdir()] == ["telemetry.sqlite"]


def test_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    SqliteStore(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("ALTER TABLE request RENAME COLUMN attempts TO tries")
    with raises_error(BadStore, "BadStore", match="'request' has the columns of another version"):
        SqliteStore(path)
    with raises_error(BadStore, "BadStore", match="no such column: request.attempts"):
        SqliteReader(path).points("request")
