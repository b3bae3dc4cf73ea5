"""Points as tests compare them, and their conformance to the schema."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from monitor.points.points import TelemetryPoint
from monitor.points.schema import MEASUREMENTS

_TYPES: dict[str, tuple[type, ...]] = {"float": (float,), "int": (int,), "text": (str,)}


def single_point_fields(points: Iterable[TelemetryPoint], measurement: str) -> dict[str, Any]:
    """All fields of the only point of a measurement; None for those that it does not have."""
    (single,) = [point for point in points if point.measurement == measurement]
    return {**dict.fromkeys(field.name for field in MEASUREMENTS[measurement].fields), **single.fields}


def missing_reasons(points: Iterable[TelemetryPoint]) -> dict[str, Any]:
    """The reasons of the values that are reported as missing, by sensor."""
    return {point.tags["sensor"]: point.fields["reason"] for point in points if point.measurement == "missing"}


def assert_matches_schema(points: Iterable[TelemetryPoint]) -> None:
    """Assert that all tags and fields are those of the measurement, in their types."""
    for point in points:
        measurement = MEASUREMENTS[point.measurement]
        types = {field.name: field.type for field in measurement.fields}
        assert set(point.fields) <= set(types), point
        assert set(point.tags) <= set(measurement.tags), point
        for name, value in point.fields.items():
            assert value is None or type(value) in _TYPES[types[name]], (name, value)
