"""A small HTTP server that only shows pages: GET and HEAD, one request a connection, and an end to all of it.

Whoever connects and says nothing, or garbage, or never takes its answer, holds one of a few places for a few seconds;
when they are all taken, the oldest that has not asked for anything yet makes room for the next.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from http import HTTPStatus

from brokers.errors import PortTaken
from monitor.errors import CannotServe

log = logging.getLogger(__name__)

# A scraper's request has some hundred bytes.
HEAD_LIMIT_BYTES = 8192
# From the connection to the end of the head: a scraper sends it at once.
ASKING_S = 5.0
# For the answer to be taken; Prometheus gives up after 10 s unless told otherwise.
TAKING_S = 10.0
CONNECTIONS_LIMIT = 16
_TEXT = "text/plain; charset=utf-8"


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """What a page says."""

    body: str
    content_type: str = _TEXT
    status: HTTPStatus = HTTPStatus.OK


PageHandler = Callable[[], HttpResponse]


class HttpServer:
    """Shows pages by path. Life: `start`, `stop`."""

    def __init__(self, pages: Mapping[str, PageHandler]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._asking: dict[asyncio.Task[None], None] = {}  # those that have not asked yet, the oldest first

    async def start(self, host: str, port: int) -> None:
        """Listen; raise `PortTaken` or `CannotServe`."""
        try:
            self._server = await asyncio.start_server(self._connected, host, port, limit=HEAD_LIMIT_BYTES)
        except (OSError, UnicodeError) as error:  # the latter for what no name of a host can be
            if not isinstance(error, OSError) or isinstance(error, socket.gaierror):
                raise CannotServe(host, port, "no such host") from error
            if error.errno == errno.EADDRINUSE:
                raise PortTaken(host, port) from error
            reason = os.strerror(error.errno) if error.errno else str(error)  # asyncio's own texts repeat the address
            raise CannotServe(host, port, reason) from error

    async def stop(self) -> None:
        """Stop listening, and end what is under way."""
        if self._server is None:
            return
        self._server.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= CONNECTIONS_LIMIT:
            if not self._asking:
                writer.transport.abort()
                return
            oldest = next(iter(self._asking))
            self._asking.pop(oldest)
            oldest.cancel()
        task = asyncio.create_task(self._serve(reader, writer), name="http connection")
        self._connections.add(task)
        self._asking[task] = None
        task.add_done_callback(partial(self._over, writer.transport))

    def _over(self, transport: asyncio.WriteTransport, task: asyncio.Task[None]) -> None:
        transport.abort()  # here, since a task that is cancelled before it begins has no `finally`
        self._connections.discard(task)
        self._asking.pop(task, None)
        if not task.cancelled() and (problem := task.exception()):
            log.error("an HTTP connection failed", exc_info=problem)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(ASKING_S):
                method, answer = await self._asked(reader)
            self._asking.pop(asyncio.current_task(), None)  # type: ignore[arg-type]  # this is a task
            async with asyncio.timeout(TAKING_S):
                writer.write(_response(method, answer))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (OSError, TimeoutError, EOFError):
            log.debug("an HTTP client left, or took too long")

    async def _asked(self, reader: asyncio.StreamReader) -> tuple[str, HttpResponse]:
        """The method, and the answer to what was asked; raises EOFError when there is no whole head."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return "", _refusal(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return "", _refusal(HTTPStatus.BAD_REQUEST)
        method, target, _ = words
        if method not in ("GET", "HEAD"):
            return method, _refusal(HTTPStatus.METHOD_NOT_ALLOWED)
        page = self._pages.get(target.partition("?")[0])
        if page is None:
            return method, _refusal(HTTPStatus.NOT_FOUND, f"there is {', '.join(self._pages)}")
        return method, page()


def _refusal(status: HTTPStatus, more: str = "") -> HttpResponse:
    return HttpResponse(f"{status.phrase.lower()}{more and ': '}{more}\n", status=status)


def _response(method: str, answer: HttpResponse) -> bytes:
    body = answer.body.encode(errors="replace")
    lines = [
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}",
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Type: {answer.content_type}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if answer.status == HTTPStatus.METHOD_NOT_ALLOWED:
        lines.append("Allow: GET, HEAD")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    return head if method == "HEAD" else head + body
