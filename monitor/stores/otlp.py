"""Spans for an OpenTelemetry collector, from events with trace ids; needs the extra `otel`.

A task is a span of its stage and a request is a span of its source. Events are sent at the end of a span; its start is
the end less the event's durations.
"""

import logging
from collections.abc import Sequence
from urllib.parse import urlsplit

from brokers.errors import UsageError
from brokers.protocol.stage_timing import STAGE_DURATIONS
from brokers.telemetry.schema import RequestDone, TaskProcessed, TelemetryEvent
from monitor.errors import extra_missing

try:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExportResult
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags
except ModuleNotFoundError as error:
    raise extra_missing("--traces", "otel") from error

log = logging.getLogger(__name__)

_PATH = "/v1/traces"  # OTLP/HTTP specification, "OTLP/HTTP Request"
_TIMEOUT_S = 5.0
_SPANS_PER_REQUEST = 512
_RESOURCES_LIMIT = 256  # service names come from senders, who may make up any number
_SCOPE = InstrumentationScope("sparse")


class TraceExporter:
    """A `Sink` of events. Spans that the collector does not accept are dropped and counted."""

    waiting = 0  # a write delivers or drops all spans

    def __init__(self, url: str, node: str) -> None:
        """`url` is the collector's address, with or without the path of OTLP. Raises `UsageError`."""
        self.sent = 0
        self.dropped = 0
        self._node = node
        self._exporter = OTLPSpanExporter(_endpoint(url), timeout=_TIMEOUT_S)
        self._resources: dict[str, Resource] = {}
        self._failing = False
        # The exporter logs each failure in many lines; one is logged here.
        logging.getLogger("opentelemetry.exporter.otlp").setLevel(logging.CRITICAL)

    def write(self, items: Sequence[TelemetryEvent]) -> None:
        """Send the spans of those events that have one; blocks for some seconds if the collector does not answer."""
        spans = [span for event in items if (span := self._span(event))]
        for begin in range(0, len(spans), _SPANS_PER_REQUEST):
            batch = spans[begin : begin + _SPANS_PER_REQUEST]
            if self._exporter.export(batch) is not SpanExportResult.SUCCESS:
                lost = len(spans) - begin
                self.dropped += lost
                if not self._failing:
                    log.warning("the trace collector did not accept %d spans; further losses are counted", lost)
                self._failing = True
                return
            self.sent += len(batch)
            self._failing = False

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # it has no annotations

    def _span(self, event: TelemetryEvent) -> ReadableSpan | None:
        if not isinstance(event, TaskProcessed | RequestDone):
            return None
        context = _context(event.trace, event.span)
        if context is None:
            return None
        if isinstance(event, TaskProcessed):
            name, kind = event.stage, SpanKind.CONSUMER
            duration_ms = sum(getattr(event, each) for each in STAGE_DURATIONS)
            attributes: tuple[str, ...] = ("worker", *STAGE_DURATIONS, "bytes_in", "bytes_out", "batch")
        else:
            name, kind = event.source, SpanKind.PRODUCER
            duration_ms = event.latency_ms
            attributes = ("network_ms", "attempts", "bytes_out")
        return ReadableSpan(
            name,
            context,
            _context(event.trace, event.parent),
            self._resource(f"{event.pipeline}/{name}"),
            {f"sparse.{key}": getattr(event, key) for key in (*attributes, "request", "run", "site")},
            kind=kind,
            status=Status(StatusCode.ERROR, event.error) if event.error else Status(StatusCode.OK),
            start_time=max(0, event.time_ns - int(duration_ms * 1e6)),
            end_time=event.time_ns,
            instrumentation_scope=_SCOPE,
        )

    def _resource(self, service: str) -> Resource:
        if service not in self._resources:
            if len(self._resources) >= _RESOURCES_LIMIT:
                self._resources.clear()
            self._resources[service] = Resource({"service.name": service, "host.name": self._node})
        return self._resources[service]


def _context(trace: str, span: str) -> SpanContext | None:
    """None if either id is missing or invalid."""
    try:
        context = SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    except ValueError:
        return None
    return context if context.is_valid else None


def _endpoint(url: str) -> str:
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        message = f"--traces {url!r}: expected the address of a collector, such as http://127.0.0.1:4318"
        raise UsageError("BadCollector", message, url=url)
    return url if parts.path not in ("", "/") else url.rstrip("/") + _PATH
