"""What is in a file of telemetry, read while it is written or afterwards."""

from __future__ import annotations

from pathlib import Path

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.stores.sqlite import SqliteReader


def read_points(file: Path, measurement: str) -> list[TelemetryPoint]:
    """Those that are there; none, where there is no file yet."""
    try:
        return SqliteReader(file).points(measurement)
    except BadStore:
        return []


def finished_request_ids(file: Path) -> list[str]:
    """The ids of the requests that have come to an end, in hex, by time."""
    return [str(point.fields["request"]) for point in read_points(file, "request")]
