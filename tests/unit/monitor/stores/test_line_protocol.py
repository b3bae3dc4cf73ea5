"""Lines for InfluxDB: what is in them comes out again by the grammar, whatever names and texts hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from influxdb_client.client.write.point import Point as ClientPoint

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS
from monitor.stores.line_protocol import LineEncoder, encode_line, sanitize_field_text, sanitize_tag
from tests.support.monitor.line_protocol import parse_line

TEXTS = st.text(st.one_of(st.sampled_from(" ,=\"\\\n\t\r\x00#'"), st.characters(codec="utf-8")), max_size=20)
VALUES = {
    "float": st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(2**60), 2**60),
    "int": st.integers(-(2**64), 2**64),
    "bool": st.booleans(),
    "text": TEXTS,
}
FITS = 1 << 63


@st.composite
def points(draw: st.DrawFn) -> TelemetryPoint:
    known = draw(st.sampled_from(list(MEASUREMENTS.values())))
    tags = {tag: draw(TEXTS) for tag in known.tags if draw(st.booleans())}
    fields = {field.name: draw(st.none() | VALUES[field.type]) for field in known.fields if draw(st.booleans())}
    return TelemetryPoint(known.name, draw(st.integers(0, FITS - 1)), tags, fields)


def kept(point: TelemetryPoint, name: str) -> FieldValue:
    """What InfluxDB can have of a field; None: nothing."""
    value = point.fields.get(name)
    if value is None:
        return None
    match MEASUREMENTS[point.measurement].field(name).type:
        case "float":
            number = float(value)
            return number if abs(number) < float("inf") else None
        case "int":
            return value if -FITS <= int(value) < FITS else None
        case "text":
            return sanitize_field_text(str(value))
    return value


@given(points())
def test_a_line_is_read_as_what_was_written(point: TelemetryPoint) -> None:
    expected = {name: value for name in point.fields if (value := kept(point, name)) is not None}
    found = encode_line(point, point.time_ns)
    if not expected:
        assert found == ""
        return
    tags = {tag: sanitize_tag(value) for tag, value in point.tags.items() if value}
    measurement, read_tags, fields, time_ns = parse_line(found)
    assert (measurement, read_tags, fields, time_ns) == (point.measurement, tags, expected, point.time_ns)
    assert [type(value) for value in fields.values()] == [type(expected[name]) for name in fields]


@given(TEXTS)
def test_only_backslashes_in_tags_and_control_characters_change(text: str) -> None:
    controls = "".join(" " if ord(each) < 32 or ord(each) == 127 else each for each in text)
    assert sanitize_field_text(text) == controls
    assert sanitize_tag(text) == controls.replace("\\", "/")


def test_a_line_is_that_of_influxdbs_own_client() -> None:
    tags = {"node": "n 1", "run": "a,b=c", "gpu": "0", "model": 'The "best"'}
    fields: dict[str, FieldValue] = {"use": 0.25, "memory_used_bytes": 7, "temperature_c": None, "power_w": 1e300}
    theirs = ClientPoint("gpu").time(17)
    for name, tag in tags.items():
        theirs.tag(name, tag)
    for name, value in fields.items():
        theirs.field(name, value)
    ours = encode_line(TelemetryPoint("gpu", 17, tags, fields), 17)
    assert parse_line(ours) == parse_line(theirs.to_line_protocol())
    assert ours.split(" use=")[0] == theirs.to_line_protocol().split(" memory_used_bytes=")[0]


def test_an_unknown_measurement_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError, match="weather"):
        encode_line(TelemetryPoint("weather", 1, {}, {"rain": 1}), 1)


def test_points_of_one_series_and_time_are_put_apart_and_others_are_not() -> None:
    def point(time_ns: int, worker: str) -> TelemetryPoint:
        return TelemetryPoint("batch", time_ns, {"worker": worker}, {"tasks": 1})

    found = LineEncoder().encode(
        [point(5, "a"), point(5, "b"), point(5, "a"), point(5, "a"), point(9, "a"), point(9, "b")]
    )
    assert [parse_line(each)[3] for each in found] == [5, 5, 6, 7, 9, 9]


def test_points_that_come_a_moment_late_are_put_apart_from_those_before_them() -> None:
    found = LineEncoder().encode([TelemetryPoint("batch", time_ns, {}, {"tasks": 1}) for time_ns in (5, 5, 6, 5)])
    assert len({parse_line(each)[3] for each in found}) == 4


def test_a_point_of_long_ago_keeps_its_time() -> None:
    found = LineEncoder().encode([TelemetryPoint("batch", time_ns, {}, {"tasks": 1}) for time_ns in (10**10, 5)])
    assert [parse_line(each)[3] for each in found] == [10**10, 5]


def test_points_of_two_writes_are_put_apart_too() -> None:
    lines = LineEncoder()
    found = [lines.encode([TelemetryPoint("batch", 5, {}, {"tasks": number})])[0] for number in range(3)]
    assert [parse_line(each)[3] for each in found] == [5, 6, 7]
