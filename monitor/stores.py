"""The stores that a daemon writes to: a SQLite file, where one is named."""

from __future__ import annotations

from pathlib import Path

from monitor.points import Point
from monitor.sqlite import SqliteStore
from monitor.writer import Writer


def writers(file: Path | None, limit_bytes: int | None) -> list[Writer[Point]]:
    """A writer to each store that is asked for, not started; raises `BadStore`."""
    found: list[Writer[Point]] = []
    if file is not None:
        found.append(Writer(SqliteStore(file, limit_bytes), str(file)))
    return found
