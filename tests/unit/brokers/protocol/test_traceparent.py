"""The `traceparent` of W3C Trace Context: inverse, as the specification's text says, and an error to nobody."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.codec import decode, encode
from brokers.protocol.traceparent import TRACEPARENT, TraceContext, parse_traceparent, start_span, start_trace
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.test_codec import TASK, packet_payload

DIGITS = "0123456789abcdef"
TRACES = st.text(DIGITS, min_size=32, max_size=32).filter(lambda text: set(text) != {"0"})
SPANS = st.text(DIGITS, min_size=16, max_size=16).filter(lambda text: set(text) != {"0"})
CONTEXTS = st.builds(TraceContext, TRACES, SPANS, st.booleans())

# The examples of the specification, sections 3.2.3 and 3.2.2.
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
EXAMPLE = f"00-{TRACE}-{SPAN}-01"


@given(CONTEXTS)
def test_what_is_written_is_read_again(context: TraceContext) -> None:
    text = context.to_traceparent()
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", text)
    assert parse_traceparent(text) == context


@given(st.text(max_size=70) | st.text("0123456789abcdefABF-", min_size=50, max_size=60))
def test_any_text_is_a_context_or_none_and_never_an_error(text: str) -> None:
    found = parse_traceparent(text)
    if found is not None:
        assert text[3:52] == f"{found.trace_id}-{found.span_id}"


@given(CONTEXTS, st.integers(0, 54), st.sampled_from("gG-_ \n\0é"))
def test_one_wrong_character_makes_it_none(context: TraceContext, place: int, wrong: str) -> None:
    text = context.to_traceparent()
    broken = text[:place] + wrong + text[place + 1 :]
    assert broken == text or parse_traceparent(broken) is None


def test_the_examples_of_the_specification_are_read_as_it_says() -> None:
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
def test_what_the_specification_calls_invalid_is_none(text: str | None) -> None:
    assert parse_traceparent(text) is None


@pytest.mark.parametrize("more", ["", "-", "-what the future brings"])
def test_of_a_later_version_what_is_known_is_read(more: str) -> None:
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-01{more}") == TraceContext(TRACE, SPAN)


@pytest.mark.parametrize(("flags", "sampled"), [("ff", True), ("03", True), ("fe", False), ("02", False)])
def test_flags_that_are_not_known_are_not_passed_on(flags: str, sampled: bool) -> None:
    found = parse_traceparent(f"00-{TRACE}-{SPAN}-{flags}")
    assert found is not None
    assert found.child().to_traceparent().endswith("-01" if sampled else "-00")


@given(CONTEXTS)
def test_a_child_is_another_span_of_the_same_trace(context: TraceContext) -> None:
    child = context.child()
    assert (child.trace_id, child.sampled) == (context.trace_id, context.sampled)
    assert child.span_id != context.span_id


@given(st.binary(min_size=16, max_size=16))
def test_a_request_begins_a_trace_of_its_own_id(request: bytes) -> None:
    first, again = start_trace(request), start_span(request, None)
    assert first.sampled
    assert first.span_id != again.span_id
    if any(request):
        assert first.trace_id == again.trace_id == request.hex()


def test_a_request_whose_id_is_zeros_has_a_trace_that_may_be() -> None:
    assert set(start_trace(bytes(16)).trace_id) != {"0"}


@pytest.mark.parametrize(("trace", "span"), [("0" * 32, SPAN), (TRACE, "0" * 16), (TRACE.upper(), SPAN), ("", SPAN)])
def test_an_illegal_context_cannot_be_made(trace: str, span: str) -> None:
    with raises_error(WireError, "BadProperty", match="traceparent"):
        TraceContext(trace, span)


# On the wire ----------------------------------------------------------------------------------------------------------


def test_a_broken_one_costs_no_task_and_of_several_the_last_counts() -> None:
    packet = encode(TASK)
    for texts, expected in [
        (["nonsense"], None),
        (["nonsense", EXAMPLE], TraceContext(TRACE, SPAN)),
        ([EXAMPLE, "nonsense"], None),
        ([EXAMPLE, f"00-{TRACE}-{'1' * 16}-00"], TraceContext(TRACE, "1" * 16, sampled=False)),
    ]:
        repeated = (*packet.properties.user_properties, *((TRACEPARENT, text) for text in texts))
        found = decode(replace(packet.properties, user_properties=repeated), packet_payload(packet))
        assert found == replace(TASK, trace=expected)
