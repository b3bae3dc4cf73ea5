"""Points, as tests look at them; and that each is what the schema says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from monitor.points.points import TelemetryPoint
from monitor.points.schema import MEASUREMENTS

_TYPES: dict[str, tuple[type, ...]] = {"float": (float,), "int": (int,), "bool": (bool,), "text": (str,)}


def single_point_fields(points: Iterable[TelemetryPoint], measurement: str) -> dict[str, Any]:
    """The fields of the one point of a measurement."""
    (found,) = [point for point in points if point.measurement == measurement]
    return dict(found.fields)


def missing_reasons(points: Iterable[TelemetryPoint]) -> dict[str, Any]:
    """What is said to be missing, and why."""
    return {point.tags["sensor"]: point.fields["reason"] for point in points if point.measurement == "missing"}


def assert_matches_schema(points: Iterable[TelemetryPoint]) -> None:
    """Assert that each has all fields of its measurement, in their types, and no tag of another."""
    for point in points:
        measurement = MEASUREMENTS[point.measurement]
        assert set(point.fields) == {field.name for field in measurement.fields}, point
        assert set(point.tags) <= set(measurement.tags), point
        for field in measurement.fields:
            value = point.fields[field.name]
            assert value is None or type(value) in _TYPES[field.type], (field.name, value)
