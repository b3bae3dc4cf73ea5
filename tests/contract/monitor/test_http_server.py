"""The small HTTP server: what it answers, and that no client can hurt it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest

from brokers.errors import PortTaken
from monitor.daemon import http_server as web
from monitor.daemon.http_server import CONNECTIONS_LIMIT, HEAD_LIMIT_BYTES, HttpResponse, HttpServer
from monitor.errors import CannotServe
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.ports import free_port

LARGE = "x" * 20_000_000  # more than any socket's buffers hold
PAGES = {
    "/page": lambda: HttpResponse("hé\n"),
    "/large": lambda: HttpResponse(LARGE),
    "/sick": lambda: HttpResponse("not now\n", status=HTTPStatus.SERVICE_UNAVAILABLE),
}
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[int]:
    server, port = HttpServer(PAGES), free_port()
    await server.start("127.0.0.1", port)
    try:
        yield port
    finally:
        await server.stop()


async def dial(port: int) -> Streams:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(port: int, said: bytes) -> bytes:
    """All that is answered until the connection ends."""
    reader, writer = await dial(port)
    writer.write(said)
    try:
        async with asyncio.timeout(20):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode()


async def is_well(port: int) -> bool:
    return (await ask(port, get("/page"))).endswith("\r\n\r\nhé\n".encode())


def test_a_page_is_given_whole_with_its_length_and_a_head_without_it() -> None:
    async def test() -> None:
        async with serving() as port:
            given = await ask(port, get("/page?any=thing"))
            head, _, body = given.partition(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            assert lines[0] == "HTTP/1.1 200 OK"
            assert {"Content-Length: 4", "Connection: close", "Content-Type: text/plain; charset=utf-8"} <= set(lines)
            assert body.decode() == "hé\n"
            only_head = await ask(port, get("/page", "HEAD"))
            assert only_head.split(b"Date")[0] == given.split(b"Date")[0]
            assert only_head.endswith(b"\r\n\r\n")
            assert b"Content-Length: 4\r\n" in only_head
            assert (await ask(port, get("/large"))).endswith(LARGE[-100:].encode())
            assert (await ask(port, get("/sick"))).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")

    run_async(test())


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (get("/"), 404),
        (get("/page/"), 404),
        (get("/../etc/passwd"), 404),
        (get("http://here/page"), 404),
        (get("/page", "POST"), 405),
        (get("/page", "DELETE"), 405),
        (get("/page", "get"), 405),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /page\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"GET  /page HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\xfc\x03\x03" + bytes(500) + b"\r\n\r\n", 400),
        (b"GET /page HTTP/1.1\r\n" + b"a: b\r\n" * HEAD_LIMIT_BYTES, 431),
    ],
)
def test_what_is_no_question_for_a_page_is_refused(said: bytes, status: int) -> None:
    async def test() -> None:
        async with serving() as port:
            given = await ask(port, said)
            # Of a head that never ends the rest is not read, and the answer may be lost with it.
            assert given.startswith(f"HTTP/1.1 {status} ".encode()) or (status == 431 and not given)
            assert await is_well(port)

    run_async(test())


def test_what_cannot_be_asked_for_is_told_what_can() -> None:
    async def test() -> None:
        async with serving() as port:
            assert (await ask(port, get("/pages"))).endswith(b"not found: there is /page, /large, /sick\n")
            assert b"Allow: GET, HEAD\r\n" in await ask(port, get("/page", "PUT"))

    run_async(test())


def test_whoever_says_nothing_or_takes_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "ASKING_S", 0.3)
    monkeypatch.setattr(web, "TAKING_S", 0.3)

    async def test() -> None:
        async with serving() as port:
            silent, slow, deaf = await dial(port), await dial(port), await dial(port)
            slow[1].write(b"GET /page HT")
            deaf[1].write(get("/large"))
            async with asyncio.timeout(5):
                assert await silent[0].read() == b""
                assert await slow[0].read() == b""
                await asyncio.sleep(0.5)
                with contextlib.suppress(ConnectionError):
                    assert len(await deaf[0].read()) < len(LARGE)
            for _, writer in (silent, slow, deaf):
                writer.close()

    run_async(test())


def test_a_crowd_that_asks_nothing_keeps_nobody_out() -> None:
    async def test() -> None:
        async with serving() as port:
            crowd = [await dial(port) for _ in range(10 * CONNECTIONS_LIMIT)]
            for _ in range(5):
                assert await is_well(port)
            here = [reader for reader, _ in crowd if not (reader.at_eof() or reader.exception())]
            assert len(here) < CONNECTIONS_LIMIT
            for _, writer in crowd:
                writer.close()

    run_async(test())


def test_where_all_places_are_taken_by_answers_the_next_is_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "CONNECTIONS_LIMIT", 2)

    async def test() -> None:
        async with serving() as port:
            deaf = [await dial(port) for _ in range(2)]
            for _, writer in deaf:
                writer.write(get("/large"))
            await asyncio.sleep(0.3)
            assert await ask(port, get("/page")) == b""
            for _, writer in deaf:
                writer.transport.abort()
            await asyncio.sleep(0.3)
            assert await is_well(port)

    run_async(test())


def test_stopping_ends_what_is_under_way() -> None:
    async def test() -> None:
        async with serving() as port:
            silent, deaf = await dial(port), await dial(port)
            deaf[1].write(get("/large"))
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            assert await silent[0].read() == b""
        for _, writer in (silent, deaf):
            writer.transport.abort()
        with pytest.raises(ConnectionError):
            await dial(port)

    run_async(test())


def test_a_place_where_it_cannot_listen_is_one_line() -> None:
    async def test() -> None:
        async with serving() as port:
            with pytest.raises(PortTaken, match=f"port {port} on 127.0.0.1 is taken"):
                await HttpServer({}).start("127.0.0.1", port)
        with pytest.raises(CannotServe, match=r"^cannot listen at 192\.0\.2\.1, port 9100: cannot assign requested"):
            await HttpServer({}).start("192.0.2.1", 9100)
        for host in ("..", "a" * 70, "no-such-host.invalid"):
            with pytest.raises(CannotServe, match=r"no such host$"):
                await HttpServer({}).start(host, 9100)

    run_async(test())
