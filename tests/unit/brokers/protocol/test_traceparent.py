"""Trace contexts: `traceparent` is parsed as W3C Trace Context specifies, and malformed values are ignored."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.traceparent import TraceContext, parse_traceparent, start_span, start_trace
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import TRACES

# The examples of the specification, sections 3.2.3 and 3.2.2.
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
EXAMPLE = f"00-{TRACE}-{SPAN}-01"


@given(TRACES)
def test_parse_is_the_inverse_of_to_traceparent(context: TraceContext) -> None:
    text = context.to_traceparent()
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", text)
    assert parse_traceparent(text) == context


@given(st.text(max_size=70) | st.text("0123456789abcdefABF-", min_size=50, max_size=60))
def test_any_text_parses_without_an_error(text: str) -> None:
    context = parse_traceparent(text)
    if context is not None:
        assert text[3:52] == f"{context.trace_id}-{context.span_id}"


@given(TRACES, st.integers(0, 54), st.sampled_from("gG-_ \n\0é"))
def test_wrong_character_makes_it_invalid(context: TraceContext, place: int, wrong: str) -> None:
    text = context.to_traceparent()
    broken = text[:place] + wrong + text[place + 1 :]
    assert broken == text or parse_traceparent(broken) is None


def test_examples_of_the_specification_are_parsed() -> None:
    assert parse_traceparent(EXAMPLE) == TraceContext(TRACE, SPAN, sampled=True)
    assert parse_traceparent(f"00-{TRACE}-{SPAN}-00") == TraceContext(TRACE, SPAN, sampled=False)


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        EXAMPLE.upper(),
        EXAMPLE + "-more",
        EXAMPLE + "-",
        EXAMPLE + "0",
        EXAMPLE[:-1],
        f"0-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01more",
        f" {EXAMPLE}",
        EXAMPLE + "\n",
    ],
)
def test_invalid_value_is_ignored(text: str | None) -> None:
    assert parse_traceparent(text) is None


@pytest.mark.parametrize("more", ["", "-", "-extension"])
def test_later_version_is_parsed_as_version_zero(more: str) -> None:
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01{more}") == TraceContext(TRACE, SPAN)


@pytest.mark.parametrize(("flags", "sampled"), [("ff", True), ("03", True), ("fe", False), ("02", False)])
def test_unknown_flags_are_not_passed_on(flags: str, sampled: bool) -> None:
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}")
    assert context is not None
    assert context.child().to_traceparent().endswith("-01" if sampled else "-00")


@given(TRACES)
def test_child_has_the_same_trace_and_a_new_span(context: TraceContext) -> None:
    child = context.child()
    assert (child.trace_id, child.sampled) == (context.trace_id, context.sampled)
    assert child.span_id != context.span_id


@given(st.binary(min_size=16, max_size=16))
def test_trace_id_of_a_request_is_its_request_id(request: bytes) -> None:
    first = start_trace(request)
    again = start_span(request, None)
    assert first.sampled
    assert first.span_id != again.span_id
    if any(request):
        assert first.trace_id == again.trace_id == request.hex()


def test_request_id_of_zeros_gets_a_random_trace_id() -> None:
    assert set(start_trace(bytes(16)).trace_id) != {"0"}


@pytest.mark.parametrize(("trace", "span"), [("0" * 32, SPAN), (TRACE, "0" * 16), (TRACE.upper(), SPAN), ("", SPAN)])
def test_invalid_ids_raise_bad_property(trace: str, span: str) -> None:
    with raises_error(WireError, "BadProperty", match="traceparent"):
        TraceContext(trace, span)
