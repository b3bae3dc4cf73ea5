"""A web server that says what a test wants: for what no real server can be made to say when it is needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHttpServer:
    """What it says to every request from now on, and what it was sent."""

    status: int = 204
    body: str = ""
    url: str = ""
    request_bodies: list[bytes] = field(default_factory=list)
    request_headers: list[dict[str, str]] = field(default_factory=list)

    def respond_with(self, status: int, body: str = "") -> None:
        self.status, self.body = status, body


@contextmanager
def start_fake_http_server() -> Iterator[FakeHttpServer]:
    """A server on a port of its own."""
    answers = FakeHttpServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answers.request_headers.append(dict(self.headers))
            answers.request_bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(answers.status)
            if answers.status != 204:  # which has no body, and no length
                self.send_header("Content-Length", str(len(answers.body.encode())))
            self.end_headers()
            if answers.status != 204:
                self.wfile.write(answers.body.encode())

        do_POST = do_GET  # noqa: N815  # the name is the library's

        def log_message(self, format: str, *values: object) -> None:  # noqa: A002  # as the library has it
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="answers")
        thread.start()
        answers.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield answers
        finally:
            server.shutdown()
            thread.join()
