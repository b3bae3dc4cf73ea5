"""The points in a telemetry file, also while a monitor writes it."""

from __future__ import annotations

from pathlib import Path

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.stores.sqlite import SqliteReader


def read_points(file: Path, measurement: str) -> list[TelemetryPoint]:
    """The points so far; none while the file does not exist."""
    try:
        return SqliteReader(file).points(measurement)
    except BadStore:
        return []


def finished_request_ids(file: Path) -> list[str]:
    """The ids of finished requests, in hex, in order of time."""
    return [str(point.fields["request"]) for point in read_points(file, "request")]
