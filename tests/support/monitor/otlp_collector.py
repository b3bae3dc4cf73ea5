"""An OpenTelemetry collector, as far as traces go: takes OTLP over HTTP, and keeps the spans."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class OtlpCollector:
    """`spans` by name of service, in the order in which they came."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.status = 200
        self.request_count = 0

    def add_export(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            names = {each.key: each.value.string_value for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [(names["service.name"], span) for span in scope.spans]


@contextmanager
def start_otlp_collector(port: int = 0) -> Iterator[tuple[OtlpCollector, str]]:
    """A collector that listens, and its address."""
    found = OtlpCollector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            found.request_count += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces" and found.status == 200:
                found.add_export(gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body)
            self.send_response(found.status if self.path == "/v1/traces" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="collector")
    thread.start()
    try:
        yield found, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
