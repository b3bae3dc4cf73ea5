"""Which trace a message belongs to, and which span of it asked for it: W3C Trace Context, version 00. Pure.

A trace is all that is done for one request, wherever that is; a span is the part that one process does. What travels is
the `traceparent` of https://www.w3.org/TR/trace-context/ (section 3.2): whoever takes a message makes a span of its
own, whose parent is the one that came, and passes its own on. One that breaks the rules is as good as none (section
4.3): a trace is for those who watch, and no request fails for it.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from brokers.errors import property_error

TRACEPARENT = "traceparent"
# Lower case, and not all zeros: sections 3.2.2.3 and 3.2.2.4.
_TRACE, _SPAN = "(?!0{32})[0-9a-f]{32}", "(?!0{16})[0-9a-f]{16}"
_IDS = re.compile(f"{_TRACE}-{_SPAN}")
# Version ff is none (section 3.2.2.1). Behind the flags 00 ends; a later version may have more (section 3.2.4).
_FORM = re.compile(f"(?!ff)([0-9a-f]{{2}})-({_TRACE})-({_SPAN})-([0-9a-f]{{2}})(-.*)?", re.DOTALL)
_FIRST = "00"
_SAMPLED = 1  # the one flag that version 00 has; the others are sent as zeros (section 3.2.2.5.2)


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span: `trace` has 32 hexadecimal digits in lower case, `span` 16. `sampled`: somebody may keep it."""

    trace_id: str
    span_id: str
    sampled: bool = True

    def __post_init__(self) -> None:
        if not _IDS.fullmatch(f"{self.trace_id}-{self.span_id}"):
            problem = f"must be 32 and 16 hexadecimal digits, not all zeros, is {self.trace_id!r} and {self.span_id!r}"
            raise property_error(TRACEPARENT, problem)

    def child(self) -> TraceContext:
        """A new span of the same trace, which this one asks for."""
        return TraceContext(self.trace_id, _new_span(), self.sampled)

    def to_traceparent(self) -> str:
        """The form in which it travels."""
        return f"{_FIRST}-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse_traceparent(text: str | None) -> TraceContext | None:
    """The inverse; None for what is none, and for what is no `traceparent`, which is no error."""
    found = _FORM.fullmatch(text) if text else None
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == _FIRST and more is not None:
        return None
    return TraceContext(trace, span, bool(int(flags, 16) & _SAMPLED))


def start_trace(request: bytes) -> TraceContext:
    """The first span of a request's own trace, whose id is the request's; of an id of zeros, some other."""
    return TraceContext(request.hex() if any(request) else secrets.token_hex(16), _new_span())


def start_span(request: bytes, parent: TraceContext | None) -> TraceContext:
    """A new span for what is done for a request: of its parent's trace, or of one that begins here."""
    return parent.child() if parent else start_trace(request)


def _new_span() -> str:
    # Not of `random`, which two workers may both have seeded alike.
    return f"{secrets.randbits(64) or 1:016x}"
