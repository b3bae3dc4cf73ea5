"""Malformed packets: decoding raises a `WireError` with a short message, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import BadPayload, WireError
from brokers.protocol import codec
from brokers.protocol.codec import PROTOCOL_VERSION, decode, encode, make_failure_reply
from brokers.protocol.messages import JPEG, JSON, JSON_INTEGER_LIMIT, SAFETENSORS, Gradient, Message, StepMessage, Task
from brokers.protocol.transport import Properties
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import (
    DONE,
    FAILURE,
    GRADIENT,
    REQUEST,
    STEP,
    TASK,
    packet_payload,
    with_user_properties,
)

# The messages to change, the changed user properties, and the error message.
HOSTILE_USER: dict[str, tuple[list[Message], dict[str, str | None], str]] = {
    "no kind": ([TASK], {"kind": None}, "'kind' is missing"),
    "unknown kind": ([TASK], {"kind": "gradient?"}, "one of task, activation, result, failure, control"),
    "kind of 60 kB": ([TASK], {"kind": "k" * 60_000}, "characters"),
    "kind in capitals": ([TASK], {"kind": "Task"}, "is 'Task'"),
    "attempt zero": ([TASK, FAILURE, DONE, GRADIENT, STEP], {"attempt": "0"}, "1 or more"),
    "attempt negative": ([TASK], {"attempt": "-1"}, "whole number"),
    "attempt with a sign": ([TASK], {"attempt": "+1"}, "whole number"),
    "attempt in other digits": ([TASK], {"attempt": "\N{ARABIC-INDIC DIGIT ONE}"}, "whole number"),
    "attempt fractional": ([TASK], {"attempt": "1.0"}, "whole number"),
    "attempt empty": ([TASK, FAILURE, DONE, GRADIENT, STEP], {"attempt": ""}, "whole number"),
    "attempt too long": ([TASK], {"attempt": "9" * 5000}, "whole number"),
    "deadline zero": ([TASK], {"deadline_ms": "0.000"}, "positive"),
    "deadline negative": ([TASK], {"deadline_ms": "-5"}, "positive"),
    "deadline nan": ([TASK], {"deadline_ms": "nan"}, "positive"),
    "deadline infinite": ([TASK], {"deadline_ms": "inf"}, "positive"),
    "deadline with an exponent": ([TASK], {"deadline_ms": "1e3"}, "positive"),
    "deadline with spaces": ([TASK], {"deadline_ms": " 5 "}, "positive"),
    "deadline past the limit": ([TASK], {"deadline_ms": "9999999999999"}, "0 to 4294967295000"),
    "deadline too long": ([TASK], {"deadline_ms": "9" * 5000}, "positive"),
    "accept unknown": ([TASK], {"accept": "xml"}, "safetensors or json, is 'xml'"),
    "echo odd": ([TASK], {"echo": "abc"}, "hexadecimal"),
    "echo not hexadecimal": ([TASK], {"echo": "zz"}, "hexadecimal"),
    "echo too long": ([TASK], {"echo": "00" * 257}, "at most 256 bytes, is 257"),
    "reply empty": ([TASK], {"reply": ""}, "no address to reply to"),
    "reply a filter": ([TASK], {"reply": "sparse/#"}, "topic to publish to"),
    "priority unknown": ([TASK], {"priority": "urgent"}, "interactive or background"),
    "no verb": ([DONE, STEP], {"verb": None}, "'verb' is missing"),
    "verb empty": ([DONE, STEP], {"verb": ""}, "is ''"),
    "verb of another kind": ([STEP], {"verb": "done"}, "is 'done'"),
    "verb unknown": ([DONE, STEP], {"verb": "stop"}, "is 'stop'"),
    "verb of 60 kB": ([STEP], {"verb": "v" * 60_000}, "one of prepared"),
    "no worker": ([DONE], {"worker": None}, "'worker' is missing"),
    "no term": ([STEP], {"term": None}, "'term' is missing"),
    "term empty": ([STEP], {"term": ""}, "whole number"),
    "term negative": ([STEP], {"term": "-1"}, "whole number"),
    "term fractional": ([STEP], {"term": "1.0"}, "whole number"),
    "term too long": ([STEP], {"term": "9" * 5000}, "whole number"),
    "term past JSON's integers": ([STEP], {"term": str(JSON_INTEGER_LIMIT)}, f"is {JSON_INTEGER_LIMIT}"),
}


@pytest.mark.parametrize("case", HOSTILE_USER)
def test_invalid_user_property_raises_bad_property(case: str) -> None:
    examples, changes, text = HOSTILE_USER[case]
    for message in examples:
        packet = encode(message)
        with raises_error(WireError, "BadProperty", match=text) as caught:
            decode(with_user_properties(packet, **changes), packet_payload(packet))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("version", ["2", ""])
def test_other_protocol_version_is_refused(version: str) -> None:
    packet = encode(TASK)
    with raises_error(WireError, "VersionMismatch", match=f"expected protocol version 1, got '{version}'"):
        decode(with_user_properties(packet, sparse=version), packet_payload(packet))


@pytest.mark.parametrize("message", [TASK, GRADIENT, STEP], ids=lambda message: type(message).__name__)
def test_invalid_request_id_or_inbox_is_refused(message: Message) -> None:
    packet = encode(message)
    for properties in (
        replace(packet.properties, correlation_data=b""),
        replace(packet.properties, correlation_data=b"." * 17),
        replace(packet.properties, response_topic="sparse/#"),
        replace(packet.properties, response_topic="a/" * 100),
    ):
        with raises_error(WireError, "BadProperty"):
            decode(properties, packet_payload(packet))


@pytest.mark.parametrize("message", [TASK, GRADIENT], ids=lambda message: type(message).__name__)
def test_truncated_or_longer_payload_is_refused(message: Message) -> None:
    packet = encode(message)
    payload = packet_payload(packet)
    for length in range(len(payload)):
        with pytest.raises(WireError) as caught:
            decode(packet.properties, payload[:length])
        assert caught.value.code in ("Truncated", "BadHeader")
    with raises_error(WireError, "TrailingBytes"):
        decode(packet.properties, memoryview(payload.tobytes() + b"."))


@pytest.mark.parametrize(
    ("content_type", "payload"), [(JPEG, b"\xff\xd8\xff\xe0"), (JSON, b"[1]"), ("text/plain", b"x")]
)
def test_gradient_requires_tensors(content_type: str, payload: bytes) -> None:
    properties = replace(encode(GRADIENT).properties, content_type=content_type)
    with raises_error(WireError, "BadProperty", match=f"of a gradient must be {SAFETENSORS}, is {content_type}"):
        decode(properties, memoryview(payload))


NOT_OBJECTS = [b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000]


@pytest.mark.parametrize("message", [FAILURE, STEP], ids=["failure", "step"])
def test_payload_must_be_a_json_object(message: Message) -> None:
    for payload in (*NOT_OBJECTS, json.dumps({}).encode("utf-16")):
        with pytest.raises(BadPayload, match="expected a JSON object in UTF-8") as caught:
            decode(encode(message).properties, memoryview(payload))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change", [{"retry": 1}, {"retry": "false"}, {"retry": None}, {"stage": None}, {"worker": 5}, {"reason": ["d"]}]
)
def test_failure_needs_all_its_fields(change: dict[str, object]) -> None:
    payload = json.dumps({**FAILURE.as_dict(), **change}).encode()
    with pytest.raises(BadPayload, match="a failure needs"):
        decode(encode(FAILURE).properties, memoryview(payload))


# Anything at all ----------------------------------------------------------------------------------------------------

OUR_NAMES = ["sparse", "kind", "attempt", "reply", "accept", "echo", "source", "deadline-ms", "chunk", "verb", "worker"]
OUR_VALUES = st.sampled_from([PROTOCOL_VERSION, *codec._DECODERS, "done", "json", "1", "00", "a/b"])
ANY_PROPERTIES = st.builds(
    Properties,
    content_type=st.sampled_from(["", SAFETENSORS, JSON, JPEG]) | st.text(max_size=10),
    correlation_data=st.just(REQUEST) | st.binary(max_size=300),
    response_topic=st.sampled_from(["", "a/b"]) | st.text(max_size=10),
    expiry_s=st.none() | st.integers(0, 0xFFFF_FFFF),
    user_properties=st.dictionaries(
        st.sampled_from(OUR_NAMES) | st.text(max_size=5), OUR_VALUES | st.text(max_size=20), max_size=8
    ).map(lambda user: tuple(user.items())),
)
ANY_PAYLOADS = st.one_of(
    st.binary(max_size=200),
    st.just(packet_payload(encode(TASK)).tobytes()),
    st.recursive(st.none() | st.text(max_size=5), lambda inner: st.dictionaries(st.text(max_size=5), inner)).map(
        lambda value: json.dumps(value).encode()
    ),
)


@given(ANY_PROPERTIES, ANY_PAYLOADS, st.booleans())
def test_any_packet_decodes_or_raises_wire_error(properties: Properties, payload: bytes, ours: bool) -> None:
    if ours:
        properties = replace(properties, user_properties=(*properties.user_properties, ("sparse", PROTOCOL_VERSION)))
    try:
        message = decode(properties, memoryview(payload))
    except WireError as error:
        make_failure_reply(error, properties, "stage", "worker")
    else:
        if not isinstance(message, Task) or message.reply_to.topic:
            packet = encode(message)  # a stage can pass on all that it accepts
            assert type(decode(packet.properties, packet_payload(packet))) is type(message)


@given(st.sampled_from(["gradient", "step"]), st.binary(max_size=200), st.sampled_from(["", SAFETENSORS, JSON]))
def test_any_payload_of_a_training_message_decodes_or_raises(kind: str, payload: bytes, content_type: str) -> None:
    properties = replace(with_user_properties(encode(STEP), kind=kind), content_type=content_type)
    try:
        message = decode(properties, memoryview(payload))
    except WireError:
        return
    assert isinstance(message, Gradient | StepMessage)
