"""Spans for an OpenTelemetry collector, made of the events that carry trace ids; needs the extra `otel`.

A task is a span of its stage, a request one of its source: both have ended when they are told of, and began so long
before as they say they took.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from brokers.telemetry.schema import RequestDone, TaskProcessed, TelemetryEvent
from monitor.errors import BadCollector, ExtraMissing

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
except ModuleNotFoundError as error:
    raise ExtraMissing("--traces", "otel") from error

log = logging.getLogger(__name__)

_PATH = "/v1/traces"  # OTLP/HTTP specification, "OTLP/HTTP Request"
_TIMEOUT_S = 5.0
_SPANS = 512  # in one request to the collector
_SAID_EVERY_S = 60.0
_SCOPE = InstrumentationScope("sparse")
_TIMES = ("queue_ms", "decode_ms", "compute_ms", "encode_ms")


class TraceExporter:
    """Takes events as a store takes points. A collector that does not take them costs the spans, which are counted."""

    def __init__(self, url: str, node: str) -> None:
        """`url` as people give a collector's, with or without the path; raises `BadCollector`."""
        self.waiting = 0  # between two writes
        self.sent = 0
        self.dropped = 0
        self._node = node
        self._exporter = OTLPSpanExporter(_endpoint(url), timeout=_TIMEOUT_S)
        self._resources: dict[str, Resource] = {}
        self._complained_s = float("-inf")
        # It says by itself, and in many lines, what is said here in one.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)

    def write(self, points: Sequence[TelemetryEvent]) -> None:
        """Send the spans of those events that have any; blocks for some seconds where nobody answers."""
        spans = [span for event in points if (span := self._span(event))]
        for begin in range(0, len(spans), _SPANS):
            batch = spans[begin : begin + _SPANS]
            if self._exporter.export(batch) is not SpanExportResult.SUCCESS:
                # What waits behind it would wait in vain as well, while newer spans pile up.
                self._lose(len(spans) - begin)
                return
            self.sent += len(batch)

    def close(self) -> None:
        """Nothing is in hand between two writes."""
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # it is not annotated

    def _lose(self, count: int) -> None:
        self.dropped += count
        now_s = time.monotonic()
        if now_s - self._complained_s >= _SAID_EVERY_S:
            self._complained_s = now_s
            log.warning("the collector of traces did not take %d spans, %d so far", count, self.dropped)

    def _span(self, event: TelemetryEvent) -> ReadableSpan | None:
        if not isinstance(event, TaskProcessed | RequestDone):
            return None
        context, parent = _context(event.trace, event.span), _context(event.trace, event.parent)
        if context is None:
            return None
        if isinstance(event, TaskProcessed):
            name, kind, took_ms = f"{event.stage}", SpanKind.CONSUMER, sum(getattr(event, each) for each in _TIMES)
            what = {name: getattr(event, name) for name in ("worker", *_TIMES, "bytes_in", "bytes_out", "batch")}
        else:
            name, kind, took_ms = f"{event.source}", SpanKind.PRODUCER, event.latency_ms
            what = {name: getattr(event, name) for name in ("network_ms", "attempts", "bytes_out")}
        what |= {"request": event.request, "run": event.run, "site": event.site}
        return ReadableSpan(
            name,
            context,
            parent,
            self._resource(f"{event.pipeline}/{name}"),
            {f"sparse.{key}": value for key, value in what.items()},
            kind=kind,
            status=Status(StatusCode.ERROR, event.error) if event.error else Status(StatusCode.OK),
            start_time=max(0, event.time_ns - int(took_ms * 1e6)),
            end_time=event.time_ns,
            instrumentation_scope=_SCOPE,
        )

    def _resource(self, service: str) -> Resource:
        if service not in self._resources:
            if len(self._resources) >= 256:  # whoever makes names up does not fill memory
                self._resources.clear()
            self._resources[service] = Resource({"service.name": service, "host.name": self._node})
        return self._resources[service]


def _context(trace: str, span: str) -> SpanContext | None:
    """None where there is no such span, or where it is none."""
    try:
        found = SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    except ValueError:
        return None
    return found if found.is_valid else None


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise BadCollector(url)
    return url if parts.path not in ("", "/") else url.rstrip("/") + _PATH
