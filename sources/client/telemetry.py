"""Telemetry of a source: one event for each request that has ended, with a result or with an error."""

from __future__ import annotations

import os

from brokers.config.pipeline_file import Pipeline
from brokers.errors import RequestFailed, error_code
from brokers.protocol.messages import Content
from brokers.telemetry.client import EventClient, event_client_from_environment
from sources.client.pending_request import PendingRequest


def make_event_client(pipeline: Pipeline, name: str) -> EventClient:
    """The event client of source `name`; the environment names the monitor."""
    site = pipeline.source.site
    return event_client_from_environment(os.environ, "source", name, site=site, pipeline=pipeline.name, source=name)


def emit_request_done(
    events: EventClient, request: PendingRequest, content: Content, error: BaseException | None
) -> None:
    """Emit `request_done` for a request that has ended, with its result or with `error`."""
    hops = () if error else request.result.hops
    # The remainder of the round trip; hops are measured by other clocks, so it may come out negative.
    network_ms = max(0.0, request.latency_ms - sum(hop.total_ms for hop in hops)) if hops else 0.0
    events.emit(
        "request_done",
        request=request.request_id,
        latency_ms=round(request.latency_ms, 3),
        network_ms=round(network_ms, 3),
        attempts=request.attempt,
        bytes_out=content.nbytes,
        error=failure_code(error) if error else "",
        hops=hops,
        trace=request.trace.trace_id,
        span=request.trace.span_id,
        parent=request.parent.span_id if request.parent else "",
    )


def failure_code(error: BaseException) -> str:
    """The code of what a request ended with; for `RequestFailed` that of the failure at the stage."""
    return error.error if isinstance(error, RequestFailed) else error_code(error)
