"""InfluxDB's HTTP API and line protocol, through influxdb_client: the only file that imports it."""

import json
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import urllib3
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.client.write.point import Point
from influxdb_client.rest import ApiException
from influxdb_client.service.write_service import WriteService

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.points.schema import MEASUREMENTS, FieldType
from monitor.stores.influx.config import InfluxTarget

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 10.0  # between two bytes of a response
_QUERY_CHUNK_ROWS = 10_000  # InfluxDB's default
_SERVER_TEXT_LIMIT = 200  # characters of a server's message that are shown


class InfluxErrorKind(Enum):
    """The reaction to a failed request."""

    RETRYABLE = "the server is unreachable or overloaded: retry with back-off"
    MISCONFIGURED = "a wrong token, address or bucket: retry slowly until the user has corrected it"
    REJECTED = "the server will never accept this request: drop it"


@dataclass(eq=False)
class InfluxError(Exception):
    """A request that failed; `problem` is one line without secrets.

    `dropped_points`: how many of the points the server did not store; None where it does not say.
    """

    kind: InfluxErrorKind
    problem: str
    dropped_points: int | None = None

    def __str__(self) -> str:
        return self.problem


class InfluxClient:
    """A client of one target; it connects on first use. Used by one thread at a time."""

    def __init__(self, target: InfluxTarget) -> None:
        self._target = target
        self._client = InfluxDBClient(
            target.url,
            token=target.token,  # an empty one sends no header
            org=target.org,
            timeout=(1000 * CONNECT_TIMEOUT_S, 1000 * READ_TIMEOUT_S),
            ssl_ca_cert=str(target.ca_file) if target.ca_file else None,
            retries=False,  # callers retry
        )
        self._writes = WriteService(self._client.api_client)

    def write(self, body: bytes, *, encoding: str = "gzip") -> None:
        """Send lines of the line protocol. Raises `InfluxError`."""
        try:
            _, status, _ = self._writes.post_write_with_http_info(
                self._target.org,
                self._target.bucket,
                body,
                precision="ns",
                content_encoding=encoding,
                content_type="text/plain; charset=utf-8",
            )
        except ApiException as error:
            raise self._response_error(error) from None
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise InfluxError(InfluxErrorKind.RETRYABLE, _network_problem(error)) from None
        if status != 204:  # another web server's page: nothing was stored
            problem = f"the server answered {status} to a write, InfluxDB answers 204: check the address"
            raise InfluxError(InfluxErrorKind.MISCONFIGURED, problem)

    def query(self, query: str) -> Iterator[dict[str, Any]]:
        """The JSON objects of the answer to an InfluxQL query as they arrive.

        Versions 1, 2 and 3 all answer InfluxQL. Raises `InfluxError`, also after the first objects.
        """
        parameters = [
            ("db", self._target.bucket),
            ("epoch", "ns"),
            ("chunked", "true"),
            ("chunk_size", _QUERY_CHUNK_ROWS),
            ("q", query),
        ]
        try:
            response = self._client.api_client.call_api(
                "/query", "GET", query_params=parameters, _preload_content=False, _return_http_data_only=True
            )
            try:
                yield from (_json_object(line) for line in response if line.strip())
            finally:
                response.release_conn()
        except ApiException as error:
            raise self._response_error(error) from None
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise InfluxError(InfluxErrorKind.RETRYABLE, _network_problem(error)) from None

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._client.close()

    def _response_error(self, error: ApiException) -> InfluxError:
        """The error for a response: its status decides the reaction, unless another web server sent it."""
        status = error.status or 0
        text, is_html = self._message(error)
        shown = text[:_SERVER_TEXT_LIMIT]
        message = f"{shown} ({status})" if shown else f"the server answered {status}"
        if status >= 500:
            return InfluxError(InfluxErrorKind.RETRYABLE, message)
        match status:
            case 0 | 429:
                return InfluxError(InfluxErrorKind.RETRYABLE, shown or "no answer")
            case 400 | 413 | 422 if not is_html:
                _, separator, count = text.rpartition("dropped=")
                dropped = int(count) if separator and count.isdecimal() else 0
                return InfluxError(InfluxErrorKind.REJECTED, message, dropped or None)
            case 401 if self._target.token:
                problem = "the token is not accepted (401)"
            case 401:
                problem = "a token is required (401): set SPARSE_INFLUX_TOKEN_FILE"
            case 403:
                problem = f"the token does not permit this: {message}"
            case 404 if any(word in text for word in ("bucket", "database", "organization")):
                problem = message
            case 404:
                problem = f"not an InfluxDB 1.8 or later: {message}"
            case _:
                problem = f"not an InfluxDB: the server answered {status} {error.reason or ''}".rstrip()
        return InfluxError(InfluxErrorKind.MISCONFIGURED, problem)

    def _message(self, error: ApiException) -> tuple[str, bool]:
        """The server's message in one line without the token, and whether it was an HTML page instead."""
        body = error.body or (error.reason if not error.status else "") or ""
        text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
        if text.lstrip().startswith("<"):
            return "", True
        try:
            document = json.loads(text)
            text = str(document.get("message") or document.get("error") or "")
        except (ValueError, AttributeError):
            pass  # plain text
        if self._target.token:
            text = text.replace(self._target.token, "...")
        return " ".join(text.split()), False


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise InfluxError(InfluxErrorKind.MISCONFIGURED, "the answer to a query is not JSON: check the address")
    return document


def _network_problem(error: Exception) -> str:
    """One line for the root cause of a network error."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    if isinstance(cause, OSError) and not isinstance(cause, TimeoutError) and cause.strerror:
        return f"cannot be reached: {cause.strerror.lower()}"
    # Tested second: urllib3 has a refused connection among its timeouts.
    if isinstance(cause, TimeoutError) or isinstance(error, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    return " ".join(str(cause).split())[:_SERVER_TEXT_LIMIT] or type(error).__name__


# Line protocol --------------------------------------------------------------------------------------------------------

_SERIES_LIMIT = 4096  # whose last times are remembered
_OVERLAP_NS = 1_000_000  # points of a series that are out of order by less are written in the order of arrival
_INT_LIMIT = 1 << 63
_CONTROL_TO_SPACE = dict.fromkeys((*range(0x20), 0x7F), " ")
_TAG_REPLACEMENTS = {**_CONTROL_TO_SPACE, ord("\\"): "/"}


def sanitize_tag(value: str) -> str:
    """A tag value that every parser of the line protocol reads alike.

    A newline would end the point, and parsers disagree about backslashes in tags: they become a space and a slash.
    """
    return value.translate(_TAG_REPLACEMENTS)


def sanitize_text(value: str) -> str:
    """A text value on one line: control characters become spaces."""
    return value.translate(_CONTROL_TO_SPACE)


class LineEncoder:
    """Encodes points as lines of the line protocol, with the types of `monitor.points.schema`.

    InfluxDB merges points of one series (measurement and tags) with equal times. Their times are therefore made unique:
    a point that is not later than the previous one of its series gets the next nanosecond.
    """

    def __init__(self) -> None:
        self._last_ns: OrderedDict[tuple[str, ...], int] = OrderedDict()  # time of each series' last point

    def encode(self, points: Iterable[TelemetryPoint]) -> list[str]:
        """One line for each point that has a value. Raises `KeyError` for a measurement that is not in the schema."""
        return [line for point in points if (line := _encode(point, self._unique_time(point)))]

    def _unique_time(self, point: TelemetryPoint) -> int:
        series = (point.measurement, *(point.tags.get(tag, "") for tag in MEASUREMENTS[point.measurement].tags))
        time_ns = point.time_ns
        last_ns = self._last_ns.pop(series, 0)
        if 0 <= last_ns - time_ns < _OVERLAP_NS:
            time_ns = last_ns + 1
        self._last_ns[series] = time_ns
        if len(self._last_ns) > _SERIES_LIMIT:
            self._last_ns.popitem(last=False)
        return time_ns


def _encode(point: TelemetryPoint, time_ns: int) -> str:
    """The line of a point; empty if no field has a value. Tags and fields that are not in the schema are left out."""
    measurement = MEASUREMENTS[point.measurement]
    line = Point(point.measurement).time(time_ns)
    for tag in measurement.tags:
        line.tag(tag, sanitize_tag(point.tags.get(tag, "")))
    for field in measurement.fields:
        line.field(field.name, _typed(field.type, point.fields.get(field.name)))
    return str(line.to_line_protocol())


def _typed(kind: FieldType, value: FieldValue) -> FieldValue:
    """A value in its field's type, which InfluxDB does not allow to change: 0 of a float field is 0.0."""
    if value is None:
        return None
    match kind:
        case "float":
            return float(value)
        case "int":
            number = int(value)
            return number if -_INT_LIMIT <= number < _INT_LIMIT else None
        case "text":
            return sanitize_text(str(value))
