"""The line to an InfluxDB: what it is asked, and what it means. The only file that imports `influxdb_client`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import urllib3
from influxdb_client.client.influxdb_client import InfluxDBClient
from influxdb_client.rest import ApiException
from influxdb_client.service.write_service import WriteService

from monitor.stores.influx.config import InfluxTarget

CONNECT_TIMEOUT_S = 3.0
READ_TIMEOUT_S = 10.0  # between two bytes of an answer
_ROWS = 10_000  # of one piece of an answer: what InfluxDB itself suggests
_SHOWN_CHARACTERS = 200  # of what a server says
_PIECE_BYTES = 1 << 16


class InfluxErrorKind(Enum):
    """Who has to act."""

    RETRYABLE = "it is not there, or has too much to do: try again"
    MISCONFIGURED = "a token, an address, a bucket: a person has to mend it, and then it goes on"
    REJECTED = "these very bytes will never be taken"


@dataclass(eq=False)
class InfluxError(Exception):
    """A request that did not succeed: what that means, and one line that says why, without any secret.

    `dropped`: of the points that were sent, how many the server says it did not keep; None where it does not say.
    """

    kind: InfluxErrorKind
    problem: str
    dropped_points: int | None = None

    def __str__(self) -> str:
        return self.problem


class InfluxClient:
    """Speaks with the server of a target. Nothing is sent before the first call. One thread at a time."""

    def __init__(self, target: InfluxTarget) -> None:
        self._target = target
        self._client = InfluxDBClient(
            target.url,
            token=target.token,  # empty: no such header
            org=target.org,
            timeout=(1000 * CONNECT_TIMEOUT_S, 1000 * READ_TIMEOUT_S),
            ssl_ca_cert=str(target.ca_file) if target.ca_file else None,
            retries=False,  # when to try again is for those to say who call
        )
        self._writes = WriteService(self._client.api_client)

    def write(self, body: bytes, *, encoding: str = "gzip") -> None:
        """Send lines; raises `InfluxError`."""
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
            raise self._trouble(error) from None
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise InfluxError(InfluxErrorKind.RETRYABLE, _reason(error)) from None
        if status != 204:  # a page for people, say: whoever answers has kept nothing
            raise InfluxError(
                InfluxErrorKind.MISCONFIGURED,
                f"it answers {status} to a write, where InfluxDB answers 204: wrong address?",
            )

    def query(self, query: str) -> Iterator[dict[str, Any]]:
        """The pieces of the answer to a query in InfluxQL, as they come; raises `InfluxError`, also between two pieces."""
        asked = [("db", self._target.bucket), ("epoch", "ns"), ("chunked", "true"), ("chunk_size", _ROWS), ("q", query)]
        try:
            response = self._client.api_client.call_api(
                "/query", "GET", query_params=asked, _preload_content=False, _return_http_data_only=True
            )
            try:
                yield from _documents(response.stream(_PIECE_BYTES))
            finally:
                response.release_conn()
        except ApiException as error:
            raise self._trouble(error) from None
        except (urllib3.exceptions.HTTPError, OSError, UnicodeError) as error:
            raise InfluxError(InfluxErrorKind.RETRYABLE, _reason(error)) from None

    def close(self) -> None:
        """Leave the server. May be called twice."""
        self._client.close()

    def _trouble(self, error: ApiException) -> InfluxError:
        status, said = error.status or 0, self._said(error)
        told = f"{said.text} ({status})" if said.text else f"it answers {status}"
        match status:
            case 401:
                there = "the token is not accepted" if self._target.token else "it wants a token, and none is given"
                return InfluxError(InfluxErrorKind.MISCONFIGURED, f"{there} (401)")
            case 403:
                return InfluxError(InfluxErrorKind.MISCONFIGURED, f"the token does not allow it: {told}")
            case 404:
                known = any(word in said.text for word in ("bucket", "database", "organization"))
                return InfluxError(
                    InfluxErrorKind.MISCONFIGURED, told if known else f"no InfluxDB 1.8 or later is there: {told}"
                )
            case 400 | 413 | 422 if not said.page:
                return InfluxError(InfluxErrorKind.REJECTED, told, said.dropped)
            case 0 | 429:
                return InfluxError(InfluxErrorKind.RETRYABLE, said.text or "no answer")
            case _ if status >= 500:
                return InfluxError(InfluxErrorKind.RETRYABLE, told)
            case _:  # a proxy's page, or its way to another address
                return InfluxError(
                    InfluxErrorKind.MISCONFIGURED,
                    f"no InfluxDB is there: it answers {status} {error.reason or ''}".rstrip(),
                )

    def _said(self, error: ApiException) -> _ErrorResponse:
        body = error.body or (error.reason if not error.status else "") or ""
        text = body.decode("utf-8", "replace") if isinstance(body, bytes) else str(body)
        if text.lstrip().startswith("<"):
            return _ErrorResponse("", page=True)
        try:
            found = json.loads(text)
            text = str(found.get("message") or found.get("error") or "")
        except (ValueError, AttributeError):
            pass
        _, found_dropped, count = text.rpartition("dropped=")
        dropped = int(count) if found_dropped and count.isdecimal() and int(count) else None
        if self._target.token:
            text = text.replace(self._target.token, "...")
        return _ErrorResponse(" ".join(text.split())[:_SHOWN_CHARACTERS], dropped)


@dataclass(frozen=True, slots=True)
class _ErrorResponse:
    """What a server says to a request that it does not grant. `page`: it is for a browser, so no InfluxDB said it."""

    text: str
    dropped: int | None = None
    page: bool = False


def _documents(pieces: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """JSON objects, each on a line of its own."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (_document(line) for line in lines if line.strip())
    if rest.strip():
        yield _document(rest)


def _document(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InfluxError(InfluxErrorKind.MISCONFIGURED, "its answer to a query is no JSON: wrong address?")
    return found


def _reason(error: Exception) -> str:
    """The last and plainest cause of an error of the network."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    if isinstance(cause, OSError) and not isinstance(cause, TimeoutError) and cause.strerror:
        return f"it cannot be reached: {cause.strerror.lower()}"
    # A refused connection is one of urllib3's timeouts, too: so that comes second.
    if isinstance(cause, TimeoutError) or isinstance(error, urllib3.exceptions.TimeoutError):
        return "no answer in time"
    return " ".join(str(cause).split())[:_SHOWN_CHARACTERS] or type(error).__name__
