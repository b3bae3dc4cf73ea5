"""What a source tells the monitor of its node: each request that has come to its end, with a result or without."""

from __future__ import annotations

import os
import time

from brokers.config.pipeline_file import Pipeline
from brokers.errors import RequestFailed, error_code
from brokers.protocol.messages import Content
from brokers.protocol.stage_timing import Hop
from brokers.telemetry.client import EventClient, event_client_from_environment
from sources.client.pending_request import PendingRequest


def make_event_client(pipeline: Pipeline, name: str) -> EventClient:
    """By which a source of this name tells the monitor that its environment names, or the one that is there."""
    site = pipeline.source.site
    return event_client_from_environment(os.environ, "source", name, site=site, pipeline=pipeline.name, source=name)


def emit_request_done(
    events: EventClient,
    flight: PendingRequest,
    content: Content,
    hops: tuple[Hop, ...] = (),
    error: BaseException | None = None,
) -> None:
    """A request has ended now: with a result that came by these hops, or with an error."""
    latency_ms = 1000 * (time.monotonic() - flight.started_s)
    # Clocks are of several machines, and of several batches: what is left is never less than nothing.
    network_ms = max(0.0, latency_ms - sum(hop.total_ms for hop in hops)) if hops else 0.0
    events.emit(
        "request_done",
        request=flight.request_id,
        latency_ms=round(latency_ms, 3),
        network_ms=round(network_ms, 3),
        attempts=flight.attempt,
        bytes_out=content.nbytes,
        error=error_name(error) if error else "",
        hops=hops,
        trace=flight.trace.trace_id,
        span=flight.trace.span_id,
        parent=flight.parent.span_id if flight.parent else "",
    )


def error_name(error: BaseException) -> str:
    """What a request ended with: what a stage said, or the class of ours."""
    return error.error if isinstance(error, RequestFailed) else error_code(error)
