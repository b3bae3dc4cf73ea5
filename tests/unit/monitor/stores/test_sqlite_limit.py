"""A file of telemetry that may not grow for ever: the oldest points make room, and their place is used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from monitor.points.points import TelemetryPoint
from monitor.stores.sqlite import SqliteReader, SqliteStore

LIMIT_BYTES = 1_000_000
BATCH = 500


def batch(number: int) -> list[TelemetryPoint]:
    """Points as a worker's, of which those of one batch have one time; and a rare one."""
    tags = {"node": "here", "run": "r", "stage": "body", "worker": "w1"}
    tasks = [TelemetryPoint("task", number + 1, tags, {"compute_ms": 1.0, "request": "ab" * 16}) for _ in range(BATCH)]
    return [*tasks, TelemetryPoint("node", number + 1, {"node": "here"}, {"cpu": 0.5})]


def test_a_file_stays_below_its_limit_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    store = SqliteStore(path, LIMIT_BYTES)
    store.write([TelemetryPoint("missing", 1, {"node": "here", "sensor": "gpu"}, {"reason": "there is none"})])
    for number in range(100):
        store.write(batch(number))
    store.close()
    assert path.stat().st_size < 1.2 * LIMIT_BYTES
    times = [point.time_ns for point in SqliteReader(path).points("task")]
    assert times[-BATCH:] == [100] * BATCH
    assert times == sorted(times)
    assert 1 < times[0] < 95  # the oldest are gone, and not much more than had to go
    nodes = [point.time_ns for point in SqliteReader(path).points("node")]
    assert nodes == list(range(nodes[0], 101))
    assert len(SqliteReader(path).points("missing")) == 1  # what is said once is not what makes a file large


def test_a_file_that_was_closed_is_one_file_and_stays_so_when_it_is_read(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "telemetry.sqlite")
    store.write(batch(0))
    store.close()
    assert SqliteReader(tmp_path / "telemetry.sqlite").points("node")
    assert [path.name for path in tmp_path.iterdir()] == ["telemetry.sqlite"]


def test_times_that_a_sender_made_up_do_not_keep_a_file_from_being_bounded(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    store = SqliteStore(path, LIMIT_BYTES)
    for number in range(60):
        time_ns = (1 << 62) - number if number % 2 else 1
        store.write([replace(point, time_ns=time_ns) for point in batch(0)])
    store.close()
    assert path.stat().st_size < 1.2 * LIMIT_BYTES
    assert len(SqliteReader(path).points("task")) > BATCH


def test_without_a_limit_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.sqlite"
    store = SqliteStore(path)
    for number in range(20):
        store.write(batch(number))
    store.close()
    assert len(SqliteReader(path).points("task")) == 20 * BATCH
