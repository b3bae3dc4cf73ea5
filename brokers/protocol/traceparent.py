"""Trace identifiers: W3C Trace Context, version 00 (https://www.w3.org/TR/trace-context/).

A trace is everything done for one request; a span is the part that one process does. A message carries the span that
caused it in its `traceparent` (section 3.2); the receiver starts a child span and sends that on. A malformed value is
ignored (section 4.3): no request fails because of tracing.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from brokers.errors import property_error

TRACEPARENT = "traceparent"
# Lower case, and not all zeros: sections 3.2.2.3 and 3.2.2.4.
_TRACE_ID = "(?!0{32})[0-9a-f]{32}"
_SPAN_ID = "(?!0{16})[0-9a-f]{16}"
_IDS = re.compile(f"{_TRACE_ID}-{_SPAN_ID}")
# Version ff is invalid (section 3.2.2.1). Version 00 ends after the flags, a later one may go on (section 3.2.4).
_TRACEPARENT = re.compile(f"(?!ff)([0-9a-f]{{2}})-({_TRACE_ID})-({_SPAN_ID})-([0-9a-f]{{2}})(-.*)?", re.DOTALL)
_VERSION = "00"
_SAMPLED = 1  # the only flag of version 00; the others are sent as zeros (section 3.2.2.5.2)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span. `trace_id` has 32 lower-case hexadecimal digits, `span_id` 16.

    `sampled`: the trace may be recorded.
    """

    trace_id: str
    span_id: str
    sampled: bool = True

    def __post_init__(self) -> None:
        if not _IDS.fullmatch(f"{self.trace_id}-{self.span_id}"):
            problem = f"must be 32 and 16 hexadecimal digits, not all zeros, is {self.trace_id!r} and {self.span_id!r}"
            raise property_error(TRACEPARENT, problem)

    def child(self) -> TraceContext:
        """Return a new span of the same trace, with this one as its parent."""
        return TraceContext(self.trace_id, _new_span_id(), self.sampled)

    def to_traceparent(self) -> str:
        return f"{_VERSION}-{self.trace_id}-{self.span_id}-{_SAMPLED if self.sampled else 0:02x}"


def parse_traceparent(text: str | None) -> TraceContext | None:
    """Parse the value of the user property; return None where it is missing or malformed."""
    match = _TRACEPARENT.fullmatch(text) if text else None
    if match is None:
        return None
    version, trace_id, span_id, flags, extension = match.groups()
    if version == _VERSION and extension is not None:
        return None
    return TraceContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def start_trace(request_id: bytes) -> TraceContext:
    """Return the first span of a new trace, whose id is the request id (random if that is all zeros)."""
    return TraceContext(request_id.hex() if any(request_id) else secrets.token_hex(16), _new_span_id())


def start_span(request_id: bytes, parent: TraceContext | None) -> TraceContext:
    """Return a new span for a request: a child of `parent`, or the first one of a new trace."""
    return parent.child() if parent else start_trace(request_id)


def _new_span_id() -> str:
    # Not from `random`: two workers may have been seeded with the same value.
    return f"{secrets.randbits(64) or 1:016x}"
