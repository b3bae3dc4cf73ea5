"""Messages are encoded and decoded without loss; packets that cannot be decoded get a failure reply."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import example, given

from brokers.errors import WireError
from brokers.protocol.chunking import chunk_error
from brokers.protocol.codec import decode, encode, make_failure_reply
from brokers.protocol.messages import (
    DEADLINE_LIMIT_MS,
    ECHO_LIMIT_BYTES,
    JSON,
    SAFETENSORS,
    BinaryContent,
    Message,
    ReplyTo,
    Task,
    TensorContent,
)
from brokers.protocol.traceparent import TRACEPARENT, TraceContext
from brokers.protocol.transport import Properties
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import (
    CONTENT,
    FAILURE,
    GRADIENT,
    HOP,
    MESSAGES,
    REQUEST,
    STEP,
    TASK,
    packet_payload,
    with_user_properties,
)


@given(MESSAGES)
@example(
    replace(TASK, reply_to=ReplyTo("größe/☃", "json", b"\x00\xff"), source="kamera ü", deadline_ms=DEADLINE_LIMIT_MS)
)
@example(replace(FAILURE, reason="line\nüber 💥", attempt=3))
def test_decode_is_the_inverse_of_encode(message: Message) -> None:
    packet = encode(message)
    decoded = decode(packet.properties, packet_payload(packet))
    assert type(decoded) is type(message)
    assert decoded == message
    assert packet.nbytes == len(packet_payload(packet))


def test_task_without_sender_inbox_uses_its_reply_topic() -> None:
    packet = encode(replace(TASK, sender_inbox=""))
    assert decode(packet.properties, packet_payload(packet)) == TASK


def test_defaults_are_not_written() -> None:
    user = (("sparse", "1"), ("kind", "task"))
    assert encode(TASK).properties == Properties(SAFETENSORS, REQUEST, "a/inbox", None, user)
    user = (("sparse", "1"), ("kind", "gradient"))
    assert encode(GRADIENT).properties == Properties(SAFETENSORS, REQUEST, "sparse/local/t/tail/in/t-1", None, user)


def test_step_message_has_verb_and_term_as_properties() -> None:
    packet = encode(STEP)
    user = (("sparse", "1"), ("kind", "step"), ("verb", "commit"), ("term", "1700000000000"))
    assert packet.properties == Properties(JSON, REQUEST, "s/inbox", None, user)
    assert json.loads(bytes(packet_payload(packet))) == STEP.details


@pytest.mark.parametrize(
    ("deadline_ms", "text", "expiry_s"), [(0.0001, "0.001", 1), (1, "1.000", 1), (1000.5, "1000.500", 2)]
)
def test_deadline_is_also_the_message_expiry_rounded_up(deadline_ms: float, text: str, expiry_s: int) -> None:
    properties = encode(replace(TASK, deadline_ms=deadline_ms)).properties
    assert dict(properties.user_properties)["deadline-ms"] == text
    assert properties.expiry_s == expiry_s
    assert isinstance(decode(properties, packet_payload(encode(TASK))), Task)


def test_unknown_user_properties_and_hop_fields_are_ignored() -> None:
    packet = encode(replace(TASK, content=TensorContent(CONTENT.tensors), hops=(HOP,)))
    later = packet_payload(packet).tobytes().replace(b'\\"batch\\":4', b'\\"b\\":null ')
    decoded = decode(with_user_properties(packet, trace="abc", colour="blue"), memoryview(later))
    assert isinstance(decoded, Task)
    assert decoded.hops == (replace(HOP, batch=1),)


def test_malformed_traceparent_is_ignored_and_the_last_one_counts() -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    valid = f"00-{trace}-{parent}-01"
    packet = encode(TASK)
    for texts, expected in [
        (["nonsense"], None),
        (["nonsense", valid], TraceContext(trace, parent)),
        ([valid, "nonsense"], None),
        ([valid, f"00-{trace}-{'1' * 16}-00"], TraceContext(trace, "1" * 16, sampled=False)),
    ]:
        user = (*packet.properties.user_properties, *((TRACEPARENT, text) for text in texts))
        decoded = decode(replace(packet.properties, user_properties=user), packet_payload(packet))
        assert decoded == replace(TASK, trace=expected)


# Foreign clients ----------------------------------------------------------------------------------------------------


def test_packet_without_version_is_a_foreign_task_with_json_reply() -> None:
    properties = Properties(
        response_topic="my/answers", correlation_data=b"42", expiry_s=3, user_properties=(("kind", "result"),)
    )
    task = decode(properties, memoryview(b"[1, 2]"))
    assert isinstance(task, Task)
    assert task.content == BinaryContent(JSON, b"[1, 2]")
    assert task.reply_to == ReplyTo("my/answers", "json", b"42")
    assert (task.sender_inbox, task.deadline_ms, task.attempt) == ("", 3000, 1)
    assert task.request_id != decode(properties, memoryview(b"[1, 2]")).request_id


def test_longest_foreign_expiry_can_be_passed_on() -> None:
    packet = encode(decode(Properties(response_topic="t", expiry_s=0xFFFF_FFFF), memoryview(b"1")))
    assert packet.properties.expiry_s == 0xFFFF_FFFF
    assert isinstance(decode(packet.properties, packet_payload(packet)), Task)


def test_too_long_foreign_correlation_data_gets_a_failure_reply() -> None:
    properties = Properties(response_topic="t", correlation_data=b"." * (ECHO_LIMIT_BYTES + 1))
    with raises_error(WireError, "BadProperty", match="at most 256 bytes, is 257") as caught:
        decode(properties, memoryview(b"1"))
    reply = make_failure_reply(caught.value, properties, "s", "w")
    assert reply is not None
    assert reply[0] == ReplyTo("t", "json", properties.correlation_data)


# Failure replies ----------------------------------------------------------------------------------------------------


def test_failure_reply_has_the_address_and_format_of_the_result() -> None:
    task = replace(TASK, sender_inbox="b/inbox", reply_to=ReplyTo("a", "json", b"7"), attempt=4)
    reply = make_failure_reply(chunk_error("lost"), encode(task).properties, "body", "body-1")
    assert reply is not None
    reply_to, failure = reply
    assert reply_to == task.reply_to
    assert (failure.request_id, failure.attempt, failure.stage, failure.worker) == (REQUEST, 4, "body", "body-1")
    assert (failure.error, failure.reason, failure.retry) == ("BadChunk", "bad chunk: lost", True)


@pytest.mark.parametrize("user", [{"accept": "xml"}, {"echo": "?"}, {"attempt": "x"}, {"sparse": "2"}])
def test_malformed_properties_get_a_reply_at_their_topic(user: dict[str, str | None]) -> None:
    error = WireError("TrailingBytes", "2 bytes too many")
    reply = make_failure_reply(error, with_user_properties(encode(TASK), **user), "s", "w")
    assert reply is not None
    assert reply[0] == ReplyTo("a/inbox")
    assert (reply[1].request_id, reply[1].attempt, reply[1].retry) == (REQUEST, 1, False)


@pytest.mark.parametrize(
    "properties",
    [
        Properties(),
        Properties(user_properties=(("sparse", "1"),)),
        Properties(response_topic="#"),
        with_user_properties(encode(TASK), reply="a/+"),
    ],
)
def test_packet_without_valid_reply_topic_gets_no_reply(properties: Properties) -> None:
    assert make_failure_reply(chunk_error(""), properties, "s", "w") is None
