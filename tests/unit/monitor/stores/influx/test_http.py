"""What the answers of a server mean: who has to act, and the one line that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from monitor.errors import BadStore
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.http import InfluxClient, InfluxError, InfluxErrorKind
from monitor.stores.influx.reader import InfluxReader
from tests.support.monitor.fake_http_server import FakeHttpServer, start_fake_http_server

AWAY, WRONG, REFUSED = InfluxErrorKind.RETRYABLE, InfluxErrorKind.MISCONFIGURED, InfluxErrorKind.REJECTED
PAGE = "<html><body>The plain HTTP request was sent to HTTPS port</body></html>"


def two(code: str, message: str) -> str:
    """An error as InfluxDB 2 says it."""
    return json.dumps({"code": code, "message": message})


@pytest.fixture
def server() -> Iterator[FakeHttpServer]:
    with start_fake_http_server() as found:
        yield found


@pytest.fixture
def target(server: FakeHttpServer) -> InfluxTarget:
    return InfluxTarget(server.url, token="secret-token")


def trouble(target: InfluxTarget) -> InfluxError:
    http = InfluxClient(target)
    try:
        with pytest.raises(InfluxError) as caught:
            http.write(b"lines")
    finally:
        http.close()
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "meaning", "problem"),
    [
        (401, two("unauthorized", "unauthorized access"), WRONG, "the token is not accepted (401)"),
        (403, two("forbidden", "no permission"), WRONG, "the token does not allow it: no permission (403)"),
        (404, two("not found", 'bucket "nope" not found'), WRONG, 'bucket "nope" not found (404)'),
        (404, two("not found", 'organization "nope" not found'), WRONG, 'organization "nope" not found (404)'),
        (404, "404 page not found", WRONG, "no InfluxDB 1.8 or later is there: 404 page not found (404)"),
        (301, "", WRONG, "no InfluxDB is there: it answers 301 Moved Permanently"),
        (405, PAGE, WRONG, "no InfluxDB is there: it answers 405 Method Not Allowed"),
        (400, PAGE, WRONG, "no InfluxDB is there: it answers 400 Bad Request"),
        (200, PAGE, WRONG, "it answers 200 to a write, where InfluxDB answers 204: wrong address?"),
        (422, two("unprocessable entity", "beyond retention"), REFUSED, "beyond retention (422)"),
        (413, two("request too large", "too large"), REFUSED, "too large (413)"),
        (400, two("invalid", "unable to parse"), REFUSED, "unable to parse (400)"),
        (429, two("too many requests", "slow down"), AWAY, "slow down"),
        (500, two("internal error", "disk"), AWAY, "disk (500)"),
        (503, PAGE, AWAY, "it answers 503"),
    ],
)  # fmt: skip
def test_an_answer_says_who_has_to_act(
    server: FakeHttpServer, target: InfluxTarget, status: int, body: str, meaning: InfluxErrorKind, problem: str
) -> None:
    server.respond_with(status, body)
    found = trouble(target)
    assert (found.kind, found.problem) == (meaning, problem)


def test_a_server_that_keeps_some_points_says_how_many_it_did_not(server: FakeHttpServer, target: InfluxTarget) -> None:
    server.respond_with(400, '{"error":"partial write: field type conflict: ... dropped=3"}')
    assert trouble(target).dropped_points == 3
    server.respond_with(400, '{"error":"partial write: unable to parse ... dropped=0"}')
    assert trouble(target).dropped_points is None


def test_no_token_stands_in_what_is_said(server: FakeHttpServer, target: InfluxTarget) -> None:
    server.respond_with(403, two("forbidden", "token secret-token may not"))
    assert "secret" not in str(trouble(target))
    assert "secret" not in repr(target)
    assert server.request_headers[-1]["Authorization"] == "Token secret-token"


def test_who_gives_no_token_is_told_that_one_is_wanted(server: FakeHttpServer) -> None:
    server.respond_with(401, "")
    assert trouble(InfluxTarget(server.url)).problem == "it wants a token, and none is given (401)"
    assert "Authorization" not in server.request_headers[-1]


def test_a_server_that_is_not_there_is_away() -> None:
    found = trouble(InfluxTarget("http://127.0.0.1:1"))
    assert (found.kind, found.problem) == (AWAY, "it cannot be reached: connection refused")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<html>", "its answer to a query is no JSON: wrong address?"),
        ("[]", "its answer to a query is no JSON: wrong address?"),
        ('{"error": "no"}', "no"),
        ('{"results": [{"error": "bad query"}]}', "bad query"),
        ('{"results": [{"partial": true}]}', "its answer is not complete: it ended in the middle"),
    ],
)  # fmt: skip
def test_an_answer_to_a_query_that_is_none_is_one_line(
    server: FakeHttpServer, target: InfluxTarget, body: str, problem: str
) -> None:
    server.respond_with(200, body)
    with pytest.raises(BadStore) as caught:
        InfluxReader(target).points("node")
    assert str(caught.value) == f"telemetry in {target}: {problem}"


def test_an_answer_in_pieces_is_read_to_its_end(server: FakeHttpServer, target: InfluxTarget) -> None:
    def piece(number: int, *, more: bool) -> str:
        row = [number, *[None] * 10]
        series = {"name": "batch", "columns": [], "values": [row], "partial": more}
        return json.dumps({"results": [{"statement_id": 0, "series": [series], "partial": more}]})

    server.respond_with(200, f"{piece(1, more=True)}\n{piece(2, more=False)}\n")
    assert [point.time_ns for point in InfluxReader(target).points("batch")] == [1, 2]
