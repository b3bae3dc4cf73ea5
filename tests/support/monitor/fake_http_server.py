"""An HTTP server with a fixed response, for responses that real servers give rarely."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHttpServer:
    """Its response to every request, and the requests it has received."""

    status: int = 204
    body: str = ""
    url: str = ""
    request_bodies: list[bytes] = field(default_factory=list)
    request_headers: list[dict[str, str]] = field(default_factory=list)

    def respond_with(self, status: int, body: str = "") -> None:
        self.status, self.body = status, body


@contextmanager
def start_fake_http_server() -> Iterator[FakeHttpServer]:
    """Start a server at a free port."""
    fake = FakeHttpServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            fake.request_headers.append(dict(self.headers))
            fake.request_bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))
            self.send_response(fake.status)
            if fake.status != 204:  # No Content has no body
                self.send_header("Content-Length", str(len(fake.body.encode())))
            self.end_headers()
            if fake.status != 204:
                self.wfile.write(fake.body.encode())

        do_POST = do_GET  # noqa: N815  # the name of the base class

        def log_message(self, format: str, *values: object) -> None:  # noqa: A002  # the name of the base class
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="fake-http")
        thread.start()
        fake.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
