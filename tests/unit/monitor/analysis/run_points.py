"""The points of a small run, whose metrics can be computed by hand."""

from __future__ import annotations

from collections.abc import Mapping

from monitor.points.points import FieldValue, TelemetryPoint

S = 1_000_000_000  # nanoseconds


def make_point(
    measurement: str, at_s: float, tags: Mapping[str, str] | None = None, **fields: FieldValue
) -> TelemetryPoint:
    return TelemetryPoint(measurement, round(at_s * S), tags or {}, fields)


def make_request(
    number: int, at_s: float, latency_ms: float, network_ms: float = 0.0, **fields: FieldValue
) -> TelemetryPoint:
    values: dict[str, FieldValue] = {"latency_ms": latency_ms, "network_ms": network_ms}
    values |= {"attempts": 1, "request": f"{number:02}", "error": "", **fields}
    return make_point("request", at_s, {"source": "s"}, **values)


# The first begins at 10.0 s; four results, at 10.5, 11.0, 11.5 and 13.0 s, and one failure.
REQUESTS = [
    make_request(0, 10.5, 500, 100),
    make_request(1, 11.0, 200, 20),
    make_request(2, 11.5, 300, 40),
    make_request(3, 12.0, 900, 0, error="BadPayload", attempts=3),
    make_request(4, 13.0, 400, 60, attempts=2),
]
