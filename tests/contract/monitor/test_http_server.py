"""The monitor's HTTP server: its answers, and clients that stall, flood or send garbage."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

import pytest

from brokers.errors import PortTaken, UsageError
from monitor.daemon import http_server
from monitor.daemon.http_server import CONNECTIONS_LIMIT, REQUEST_LIMIT_BYTES, HttpServer
from monitor.presence.presence_table import PresenceTable
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.ports import free_port

LARGE_PAGE = b"x" * 20_000_000  # more than the buffers of any socket
DEADLINE_S = 60.0
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def large_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes /metrics a page that stays in the server's buffer until the client reads it."""
    monkeypatch.setattr(http_server, "render_metrics", lambda collector: LARGE_PAGE)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    """The port of a server."""
    server, port = HttpServer(PresenceTable(), None, None), free_port()
    await server.start("127.0.0.1", port)
    try:
        yield port
    finally:
        await server.stop()


async def connect(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port)


async def exchange(port: int, request: bytes) -> bytes:
    """All that the server sends until it closes the connection; empty if it resets it."""
    reader, writer = await connect(port)
    writer.write(request)
    try:
        async with asyncio.timeout(DEADLINE_S):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def http_request(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


async def assert_serves(port: int) -> None:
    assert (await exchange(port, http_request("/health"))).endswith(b"\r\n\r\nwatching this node\n")


async def assert_closed(*clients: Streams) -> None:
    async with asyncio.timeout(DEADLINE_S):
        for reader, _ in clients:
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
    for _, writer in clients:
        writer.transport.abort()


def test_get_returns_page_and_head_only_its_headers() -> None:
    async def test() -> None:
        async with serving() as port:
            head, _, body = (await exchange(port, http_request("/health?any=thing"))).partition(b"\r\n\r\n")
            lines = head.decode().lower().split("\r\n")
            assert lines[0] == "http/1.1 200 ok"
            assert {"content-length: 19", "connection: close", "content-type: text/plain; charset=utf-8"} <= set(lines)
            assert body == b"watching this node\n"
            only_head = await exchange(port, http_request("/health", "HEAD"))
            assert only_head.lower().startswith(b"http/1.1 200 ok\r\n")
            assert b"content-length: 19\r\n" in only_head
            assert only_head.endswith(b"\r\n\r\n")

    run_async(test())


BAD_REQUESTS = [
    (http_request("/"), 404),
    (http_request("/stages"), 404),  # there is no broker
    (http_request("/health/"), 404),
    (http_request("/../etc/passwd"), 404),
    (http_request("http://here/health"), 404),
    (http_request("/health", "POST"), 405),
    (http_request("/health", "DELETE"), 405),
    (http_request("/health", "get"), 405),
    (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 404),
    (b"GET /health\r\n\r\n", 400),
    (b"GET  /health HTTP/1.1\r\n\r\n", 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\xfc\x03\x03" + bytes(500) + b"\r\n\r\n", 400),
    (b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * REQUEST_LIMIT_BYTES, 400),
]


def test_bad_request_is_refused_and_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with serving() as port:
            for request, status in BAD_REQUESTS:
                response = await exchange(port, request)
                # The response to endless headers may be lost, since the server does not read the rest of them.
                may_be_lost = len(request) > REQUEST_LIMIT_BYTES
                assert response.startswith(f"HTTP/1.1 {status} ".encode()) or (may_be_lost and not response), request
                await assert_serves(port)

    run_async(test())
    assert caplog.messages == []


def test_refusals_name_pages_and_methods() -> None:
    async def test() -> None:
        async with serving() as port:
            assert (await exchange(port, http_request("/pages"))).endswith(b"not found: there is /metrics, /health\n")
            refusal = await exchange(port, http_request("/health", "PUT"))
            assert {b"GET", b"HEAD"} == set(re.findall(rb"allow: (\w+), (\w+)\r\n", refusal)[0])

    run_async(test())


@pytest.mark.usefixtures("large_page")
def test_stalled_clients_time_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "EXCHANGE_TIMEOUT_S", 0.3)
    aborted: list[object] = []
    abort = http_server._Connection.abort

    def record_abort(self: http_server._Connection) -> None:
        abort(self)
        aborted.append(self)

    monkeypatch.setattr(http_server._Connection, "abort", record_abort)

    async def test() -> None:
        async with serving() as port:
            silent, slow, not_reading = await connect(port), await connect(port), await connect(port)
            slow[1].write(b"GET /health HT")
            not_reading[1].write(http_request("/metrics"))
            await assert_closed(silent, slow)
            async with asyncio.timeout(DEADLINE_S):
                while len(aborted) < 3:  # noqa: ASYNC110 - a list, which has no event
                    await asyncio.sleep(0.01)
            with contextlib.suppress(ConnectionError):
                assert len(await not_reading[0].read()) < len(LARGE_PAGE)
            not_reading[1].close()

    run_async(test())


def test_idle_connections_keep_no_client_out() -> None:
    async def test() -> None:
        async with serving() as port:
            idle = [await connect(port) for _ in range(10 * CONNECTIONS_LIMIT)]
            for _ in range(5):
                await assert_serves(port)
            still_open = [reader for reader, _ in idle if not (reader.at_eof() or reader.exception())]
            assert len(still_open) <= CONNECTIONS_LIMIT
            for _, writer in idle:
                writer.close()

    run_async(test())


@pytest.mark.usefixtures("large_page")
def test_new_connection_is_refused_while_all_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "CONNECTIONS_LIMIT", 2)

    async def test() -> None:
        async with serving() as port:
            readers = [await connect(port) for _ in range(2)]
            for reader, writer in readers:
                writer.write(http_request("/metrics"))
                await reader.readexactly(1)
            assert await exchange(port, http_request("/health")) == b""
            for _, writer in readers:
                writer.transport.abort()
            async with asyncio.timeout(DEADLINE_S):
                while not await exchange(port, http_request("/health")):
                    pass

    run_async(test())


@pytest.mark.usefixtures("large_page")
def test_stop_aborts_connections() -> None:
    async def test() -> None:
        async with serving() as port:
            silent, not_reading = await connect(port), await connect(port)
            not_reading[1].write(http_request("/metrics"))
            await not_reading[0].readexactly(1)
        await assert_closed(silent)
        not_reading[1].transport.abort()
        with pytest.raises(ConnectionError):
            await connect(port)

    run_async(test())


def test_address_that_cannot_be_used_raises_usage_error() -> None:
    async def start(host: str, port: int) -> None:
        await HttpServer(PresenceTable(), None, None).start(host, port)

    async def test() -> None:
        async with serving() as port:
            with pytest.raises(PortTaken) as taken:
                await start("127.0.0.1", port)
            assert taken.value.fields == {"host": "127.0.0.1", "port": port}
        with pytest.raises(UsageError, match=r"^cannot listen at 192\.0\.2\.1, port 9100: cannot assign requested"):
            await start("192.0.2.1", 9100)
        for host in ("..", "a" * 70, "no-such-host.invalid"):
            with pytest.raises(UsageError) as caught:
                await start(host, 9100)
            assert (caught.value.code, caught.value.fields["reason"]) == ("CannotServe", "no such host")

    run_async(test())
