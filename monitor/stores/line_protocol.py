"""InfluxDB's line protocol: one line for each point. Pure.

A line is `measurement,tag=value,... field=value,... time_ns`. Types are those of `monitor.points.schema`, so that a measured 0
is a float where the next one may be 0.5: InfluxDB refuses a field that changes its type. What has no value is left out.

What a tag cannot carry there is put otherwise: a backslash at its end would escape what follows, whatever stands before
it, and within a tag parsers differ about it; the end of a line ends the point. So a backslash in a tag becomes a slash,
and a control character, in tags and texts, a space. Everything else comes back as it was. That a point is exactly one
line is what the spool counts by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS, FieldType

_SERIES_LIMIT = 4096  # whose last times are remembered, and whose text is
# Points of a series that come out of order by less than this are written in the order in which they come.
_NEAR_NS = 1_000_000
_INT_LIMIT = 1 << 63  # of a signed integer of 64 bits
_CONTROLS = dict.fromkeys((*range(0x20), 0x7F), " ")
_PLAIN_TAG = str.maketrans({**_CONTROLS, ord("\\"): "/"})
_ESCAPED_TAG = str.maketrans({",": r"\,", "=": r"\=", " ": r"\ "})
_TEXT = str.maketrans({**_CONTROLS, ord("\\"): r"\\", ord('"'): r"\""})


def sanitize_tag(value: str) -> str:
    """A tag's value as InfluxDB has it: see above."""
    return value.translate(_PLAIN_TAG)


def sanitize_field_text(value: str) -> str:
    """A text's value as InfluxDB has it."""
    return value.translate(_CONTROLS)


class LineEncoder:
    """Makes lines of points, in order. To InfluxDB two points of one series at one time are one point: the second comes
    a nanosecond later, the third two. A clock that counts milliseconds makes such points, and all shall be there: also
    those that another thread had a moment earlier, and that come a moment later.
    """

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # of each series: the time that was written last

    def encode(self, points: Iterable[TelemetryPoint]) -> list[str]:
        """A line for each point that has a value; raises `KeyError` for a measurement that is none of the schema's."""
        return [made for point in points if (made := encode_line(point, self._apart(point)))]

    def _apart(self, point: TelemetryPoint) -> int:
        last = self._last
        key = series_key(point)
        time_ns, before_ns = point.time_ns, last.get(key, 0)
        if 0 <= before_ns - time_ns < _NEAR_NS:
            time_ns = before_ns + 1
        if len(last) >= _SERIES_LIMIT:
            last.clear()
        last[key] = time_ns
        return time_ns


def encode_line(point: TelemetryPoint, time_ns: int) -> str:
    """The point as of that time, without an end of line; empty where no field has a value, since that is no point.

    Raises `KeyError` for a measurement that the schema does not have; fields that it does not have are left out.
    """
    get = point.fields.get
    fields = ",".join(
        [
            f"{key}{written}"
            for name, key, write in _FIELDS[point.measurement]
            if (value := get(name)) is not None and (written := write(value))
        ]
    )
    return f"{series_key(point)} {fields} {time_ns}" if fields else ""


def series_key(point: TelemetryPoint) -> str:
    """What InfluxDB knows a point by, beside its time: the measurement and its tags."""
    get = point.tags.get
    return _series(point.measurement, tuple([get(tag, "") for tag in MEASUREMENTS[point.measurement].tags]))


@lru_cache(maxsize=_SERIES_LIMIT)
def _series(measurement: str, values: tuple[str, ...]) -> str:
    # Names are our own, and hold nothing to escape. InfluxDB likes tags in the order of their names.
    tags = sorted(zip(MEASUREMENTS[measurement].tags, values, strict=True))
    written = [f",{tag}={sanitize_tag(value).translate(_ESCAPED_TAG)}" for tag, value in tags if value]
    return measurement + "".join(written)


def _float(value: FieldValue) -> str:
    number = float(value)  # type: ignore[arg-type]  # which is never None here
    return repr(number) if math.isfinite(number) else ""


def _int(value: FieldValue) -> str:
    number = int(value)  # type: ignore[arg-type]
    return f"{number}i" if -_INT_LIMIT <= number < _INT_LIMIT else ""


def _bool(value: FieldValue) -> str:
    return "true" if value else "false"


def _text(value: FieldValue) -> str:
    return f'"{str(value).translate(_TEXT)}"'


_WRITERS: Mapping[FieldType, Callable[[FieldValue], str]] = {"float": _float, "int": _int, "bool": _bool, "text": _text}
_FIELDS = {
    name: [(field.name, f"{field.name}=", _WRITERS[field.type]) for field in measurement.fields]
    for name, measurement in MEASUREMENTS.items()
}
