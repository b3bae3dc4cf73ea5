"""The reactions to InfluxDB's answers, and points in the line protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from monitor.errors import BadStore
from monitor.points.points import FieldValue, TelemetryPoint
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import (
    InfluxClient,
    InfluxError,
    InfluxErrorKind,
    LineEncoder,
    sanitize_tag,
    sanitize_text,
)
from monitor.stores.influx.store import InfluxReader
from tests.support.monitor.fake_http_server import FakeHttpServer, start_fake_http_server

RETRYABLE, MISCONFIGURED, REJECTED = (
    InfluxErrorKind.RETRYABLE,
    InfluxErrorKind.MISCONFIGURED,
    InfluxErrorKind.REJECTED,
)
HTML = "<html><body>The plain HTTP request was sent to HTTPS port</body></html>"


def influx2_error(code: str, message: str) -> str:
    """The body of an error of InfluxDB 2."""
    return json.dumps({"code": code, "message": message})


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHttpServer]:
    with start_fake_http_server() as fake:
        yield fake


@pytest.fixture
def target(server: FakeHttpServer) -> InfluxTarget:
    return InfluxTarget(server.url, token="secret-token")


def write_error(target: InfluxTarget) -> InfluxError:
    client = InfluxClient(target)
    try:
        with pytest.raises(InfluxError) as caught:
            client.write(b"lines")
    finally:
        client.close()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "kind", "problem"),
    [
        (401, influx2_error("unauthorized", "unauthorized access"), MISCONFIGURED, "the token is not accepted (401)"),
        (403, influx2_error("forbidden", "denied"), MISCONFIGURED, "the token does not permit this: denied (403)"),
        (404, influx2_error("not found", 'bucket "x" not found'), MISCONFIGURED, 'bucket "x" not found (404)'),
        (404, influx2_error("not found", "organization not found"), MISCONFIGURED, "organization not found (404)"),
        (404, "404 page not found", MISCONFIGURED, "not an InfluxDB 1.8 or later: 404 page not found (404)"),
        (301, "", MISCONFIGURED, "not an InfluxDB: the server answered 301 Moved Permanently"),
        (405, HTML, MISCONFIGURED, "not an InfluxDB: the server answered 405 Method Not Allowed"),
        (400, HTML, MISCONFIGURED, "not an InfluxDB: the server answered 400 Bad Request"),
        (200, HTML, MISCONFIGURED, "the server answered 200 to a write, InfluxDB answers 204: check the address"),
        (422, influx2_error("unprocessable entity", "beyond retention"), REJECTED, "beyond retention (422)"),
        (413, influx2_error("request too large", "too large"), REJECTED, "too large (413)"),
        (400, influx2_error("invalid", "unable to parse"), REJECTED, "unable to parse (400)"),
        (429, influx2_error("too many requests", "slow down"), RETRYABLE, "slow down"),
        (500, influx2_error("internal error", "disk"), RETRYABLE, "disk (500)"),
        (503, HTML, RETRYABLE, "the server answered 503"),
    ],
)  # fmt: skip
def test_answer_decides_the_reaction(
    server: FakeHttpServer, target: InfluxTarget, status: int, body: str, kind: InfluxErrorKind, problem: str
) -> None:
    server.respond_with(status, body)
    error = write_error(target)
    assert (error.kind, error.problem) == (kind, problem)


def test_partial_write_has_number_of_dropped_points(server: FakeHttpServer, target: InfluxTarget) -> None:
    details = "field type conflict " * 20
    server.respond_with(400, json.dumps({"error": f"partial write: {details} dropped=3"}))
    assert write_error(target).dropped_points == 3
    server.respond_with(400, '{"error":"partial write: unable to parse ... dropped=0"}')
    assert write_error(target).dropped_points is None


def test_error_does_not_contain_the_token(server: FakeHttpServer, target: InfluxTarget) -> None:
    server.respond_with(403, influx2_error("forbidden", "token secret-token may not"))
    assert "secret" not in str(write_error(target))
    assert server.request_headers[-1]["Authorization"] == "Token secret-token"


def test_missing_token_is_named(server: FakeHttpServer) -> None:
    server.respond_with(401, "")
    error = write_error(InfluxTarget(server.url))
    assert error.problem == "a token is required (401): set SPARSE_INFLUX_TOKEN_FILE"
    assert "Authorization" not in server.request_headers[-1]


def test_unreachable_server_is_retryable() -> None:
    error = write_error(InfluxTarget("http://127.0.0.1:1"))
    assert (error.kind, error.problem) == (RETRYABLE, "cannot be reached: connection refused")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<html>", "the answer to a query is not JSON: check the address"),
        ("[]", "the answer to a query is not JSON: check the address"),
        ('{"error": "no"}', "no"),
        ('{"results": [{"error": "bad query"}]}', "bad query"),
        ('{"results": [{"partial": true}]}', "the answer is incomplete: the connection ended too early"),
    ],
)
def test_bad_answer_to_query_raises_bad_store(
    server: FakeHttpServer, target: InfluxTarget, body: str, problem: str
) -> None:
    server.respond_with(200, body)
    with pytest.raises(BadStore) as caught:
        InfluxReader(target).points("node")
    assert str(caught.value) == f"telemetry in {target}: {problem}"


def test_answer_in_chunks_is_read_to_its_end(server: FakeHttpServer, target: InfluxTarget) -> None:
    def chunk(number: int, *, partial: bool) -> str:
        series = {"name": "batch", "columns": [], "values": [[number, *[None] * 10]], "partial": partial}
        return json.dumps({"results": [{"statement_id": 0, "series": [series], "partial": partial}]})

    server.respond_with(200, f"{chunk(1, partial=True)}\n{chunk(2, partial=False)}\n")
    assert [point.time_ns for point in InfluxReader(target).points("batch")] == [1, 2]


# Line protocol --------------------------------------------------------------------------------------------------------


def encode(measurement: str, tags: dict[str, str], fields: dict[str, FieldValue]) -> str:
    return "".join(LineEncoder().encode([TelemetryPoint(measurement, 17, tags, fields)]))


@pytest.mark.parametrize(
    ("measurement", "fields", "encoded"),
    [
        ("node", {"cpu": 0, "load": 5, "memory_used_bytes": 2**53}, "cpu=0,load=5,memory_used_bytes=9007199254740992i"),
        ("node", {"cpu": 0.25, "load": float("nan"), "memory_used_bytes": 7.0}, "cpu=0.25,memory_used_bytes=7i"),
        ("batch", {"tasks": 1 << 63, "rows": -(1 << 63), "unknown": 1}, "rows=-9223372036854775808i"),
        ("task", {"error": 'a "b" \\ c\nd', "queue_ms": None}, r'error="a \"b\" \\ c d"'),
    ],
)
def test_fields_have_the_types_of_the_schema(measurement: str, fields: dict[str, FieldValue], encoded: str) -> None:
    assert encode(measurement, {}, fields) == f"{measurement} {encoded} 17"


def test_tags_are_sorted_and_escaped_and_empty_ones_left_out() -> None:
    tags = {"worker": "a,b=c d", "stage": "x\\", "run": "", "unknown": "y"}
    assert encode("batch", tags, {"tasks": 1}) == r"batch,stage=x/,worker=a\,b\=c\ d tasks=1i 17"


def test_point_without_a_value_has_no_line() -> None:
    assert LineEncoder().encode([TelemetryPoint("batch", 1, {}, {"tasks": None}), TelemetryPoint("batch", 1)]) == []


def test_unknown_measurement_raises_key_error() -> None:
    with pytest.raises(KeyError, match="weather"):
        encode("weather", {}, {"rain": 1})


def test_only_control_characters_and_backslashes_in_tags_are_replaced() -> None:
    text = "a\\b\tc\nd\x00e\x7fü 日本,=\"'"
    assert sanitize_text(text) == "a\\b c d e ü 日本,=\"'"
    assert sanitize_tag(text) == "a/b c d e ü 日本,=\"'"


def encoded_times(encoder: LineEncoder, *points: tuple[int, str]) -> list[int]:
    lines = encoder.encode(
        [TelemetryPoint("batch", time_ns, {"worker": worker}, {"tasks": 1}) for time_ns, worker in points]
    )
    return [int(line.rpartition(" ")[2]) for line in lines]


def test_points_of_one_series_have_unique_times() -> None:
    encoder = LineEncoder()
    points = [(5, "a"), (5, "b"), (5, "a"), (5, "a"), (9, "a"), (9, "b")]
    assert encoded_times(encoder, *points) == [5, 5, 6, 7, 9, 9]
    assert encoded_times(encoder, (8, "a")) == [10]  # a moment late, and of another write


def test_point_of_long_ago_keeps_its_time() -> None:
    assert encoded_times(LineEncoder(), (10**10, "a"), (5, "a")) == [10**10, 5]
