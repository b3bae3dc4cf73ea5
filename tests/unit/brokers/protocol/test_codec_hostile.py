"""What may come in the place of a message: whatever it is, a `WireError` and nothing else says so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import BadPayload, WireError
from brokers.protocol import codec as wire
from brokers.protocol.codec import PROTOCOL_VERSION, decode, encode, make_failure_reply
from brokers.protocol.messages import JPEG, JSON, SAFETENSORS, Failure, Task, TaskDone
from brokers.protocol.safetensors_codec import pack
from brokers.protocol.stage_timing import HOPS_KEY
from brokers.protocol.transport import Properties
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.test_codec import BODY, REQUEST, REQUESTS, TASK, packet_payload, with_user_properties

HOSTILE_USER: dict[str, tuple[dict[str, str | None], str, str]] = {
    "another version": ({"sparse": "2"}, "VersionMismatch", "version 1 is spoken here, the message is of version '2'"),
    "an empty version": ({"sparse": ""}, "VersionMismatch", "''"),
    "no kind": ({"kind": None}, "BadProperty", "'kind' is missing"),
    "an unknown kind": ({"kind": "gradient?"}, "BadProperty", "one of task, activation, result, failure, control"),
    "a kind of 60 kB": ({"kind": "k" * 60_000}, "BadProperty", "characters"),
    "a kind in capitals": ({"kind": "Task"}, "BadProperty", "is 'Task'"),
    "attempt zero": ({"attempt": "0"}, "BadProperty", "1 or more"),
    "attempt negative": ({"attempt": "-1"}, "BadProperty", "whole number"),
    "attempt with a sign": ({"attempt": "+1"}, "BadProperty", "whole number"),
    "attempt in other digits": ({"attempt": "\N{ARABIC-INDIC DIGIT ONE}"}, "BadProperty", "whole number"),
    "attempt fractional": ({"attempt": "1.0"}, "BadProperty", "whole number"),
    "attempt empty": ({"attempt": ""}, "BadProperty", "whole number"),
    "attempt endless": ({"attempt": "9" * 5000}, "BadProperty", "whole number"),
    "deadline zero": ({"deadline_ms": "0.000"}, "BadProperty", "positive"),
    "deadline negative": ({"deadline_ms": "-5"}, "BadProperty", "positive"),
    "deadline nan": ({"deadline_ms": "nan"}, "BadProperty", "positive"),
    "deadline infinite": ({"deadline_ms": "inf"}, "BadProperty", "positive"),
    "deadline with an exponent": ({"deadline_ms": "1e3"}, "BadProperty", "positive"),
    "deadline with blanks": ({"deadline_ms": " 5 "}, "BadProperty", "positive"),
    "deadline past the limit": ({"deadline_ms": "9999999999999"}, "BadProperty", "0 to 4294967295000"),
    "deadline endless": ({"deadline_ms": "9" * 5000}, "BadProperty", "positive"),
    "accept unknown": ({"accept": "xml"}, "BadProperty", "safetensors or json, is 'xml'"),
    "echo odd": ({"echo": "abc"}, "BadProperty", "hexadecimal"),
    "echo no hexadecimal": ({"echo": "zz"}, "BadProperty", "hexadecimal"),
    "echo too long": ({"echo": "00" * 257}, "BadProperty", "at most 256 bytes, is 257"),
    "reply empty": ({"reply": ""}, "BadProperty", "nowhere to answer"),
    "reply a filter": ({"reply": "sparse/#"}, "BadProperty", "topic to publish to"),
}


@pytest.mark.parametrize("kind", ["task", "activation"])
@pytest.mark.parametrize("case", HOSTILE_USER)
def test_a_hostile_property_is_refused_with_its_own_error(case: str, kind: str) -> None:
    user, expected, text = HOSTILE_USER[case]
    packet = encode(TASK)
    with raises_error(WireError, expected, match=text) as caught:
        decode(with_user_properties(packet, **{"kind": kind, **user}), packet_payload(packet))
    assert len(str(caught.value)) < 500


HOPS_TEXTS = [
    "",
    "5",
    "null",
    "{}",
    '"x"',
    "[5]",
    "[[]]",
    "[" * 100_000,
    '[{"stage":"a"}]',
    '[{"stage":"a","worker":5}]',
]
HOPS_VALUES = ['"1"', "null", "-1", "NaN", "Infinity", "1e999", "true", "[]", "9" * 400]


@pytest.mark.parametrize(
    "text",
    HOPS_TEXTS
    + [f'[{{"stage":"a","worker":"b","{key}":{value}}}]' for key in ("queue_ms", "batch") for value in HOPS_VALUES],
)
def test_hops_that_are_none_are_refused(text: str) -> None:
    packet = encode(TASK)
    forged = pack(BODY.tensors, {HOPS_KEY: text})
    with raises_error(WireError, "BadProperty", match="JSON list of hops"):
        decode(packet.properties, memoryview(b"".join(forged)))


@pytest.mark.parametrize("length", range(len(packet_payload(encode(TASK)))))
def test_a_payload_truncated_at_any_byte_is_refused(length: int) -> None:
    packet = encode(TASK)
    with pytest.raises(WireError) as caught:
        decode(packet.properties, packet_payload(packet)[:length])
    assert caught.value.code in ("Truncated", "BadHeader")


def test_trailing_bytes_are_refused() -> None:
    packet = encode(TASK)
    with raises_error(WireError, "TrailingBytes"):
        decode(packet.properties, memoryview(packet_payload(packet).tobytes() + b"."))


FAILURE = {"stage": "a", "worker": "b", "error": "c", "reason": "d", "retry": True}
BAD_FIELDS: list[dict[str, object]] = [
    {"retry": 1},
    {"retry": "false"},
    {"retry": None},
    {"stage": None},
    {"worker": 5},
    {"reason": ["d"]},
]
BAD_FAILURES = [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b"{}", json.dumps(FAILURE).encode("utf-16")]


@pytest.mark.parametrize("payload", BAD_FAILURES + [json.dumps({**FAILURE, **bad}).encode() for bad in BAD_FIELDS])
def test_a_failure_that_is_none_is_refused(payload: bytes) -> None:
    properties = encode(Failure(request_id=REQUEST, stage="a", worker="b", error="c", reason="d")).properties
    with pytest.raises(BadPayload, match="a failure needs"):
        decode(properties, memoryview(payload))


@pytest.mark.parametrize(
    ("user", "text"),
    [({"verb": None}, "'verb' is missing"), ({"verb": "stop"}, "is 'stop'"), ({"worker": None}, "'worker'")],
)
def test_a_control_that_is_none_is_refused(user: dict[str, str | None], text: str) -> None:
    with raises_error(WireError, "BadProperty", match=text):
        decode(with_user_properties(encode(TaskDone(request_id=REQUEST, worker="w")), **user), memoryview(b""))


OUR_NAMES = ["sparse", "kind", "attempt", "reply", "accept", "echo", "source", "deadline-ms", "chunk", "verb", "worker"]
OUR_VALUES = st.sampled_from([PROTOCOL_VERSION, *wire._DECODERS, "done", "json", "1", "00", "a/b"]) | st.text(
    max_size=20
)
ANY_PROPERTIES = st.builds(
    Properties,
    content_type=st.sampled_from(["", SAFETENSORS, JSON, JPEG]) | st.text(max_size=10),
    correlation_data=REQUESTS | st.binary(max_size=300),
    response_topic=st.sampled_from(["", "a/b"]) | st.text(max_size=10),
    expiry_s=st.none() | st.integers(0, 0xFFFF_FFFF),
    user_properties=st.dictionaries(st.sampled_from(OUR_NAMES) | st.text(max_size=5), OUR_VALUES, max_size=8).map(
        lambda user: tuple(user.items())
    ),
)
ANY_PAYLOADS = st.one_of(
    st.binary(max_size=64),
    st.just(packet_payload(encode(TASK)).tobytes()),
    st.recursive(st.none() | st.text(max_size=5), lambda inner: st.dictionaries(st.text(max_size=5), inner)).map(
        lambda value: json.dumps(value).encode()
    ),
)


@given(ANY_PROPERTIES, ANY_PAYLOADS, st.booleans())
def test_no_packet_raises_anything_but_a_wire_error(properties: Properties, payload: bytes, ours: bool) -> None:
    if ours:
        properties = replace(properties, user_properties=(*properties.user_properties, ("sparse", PROTOCOL_VERSION)))
    try:
        found = decode(properties, memoryview(payload))
    except WireError as error:
        make_failure_reply(error, properties, "stage", "worker")  # nor does answering it
    else:
        if not isinstance(found, Task) or found.reply_to.topic:
            packet = encode(found)  # what is read can be passed on, and be read again
            assert type(decode(packet.properties, packet_payload(packet))) is type(found)
