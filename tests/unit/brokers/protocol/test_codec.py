"""Messages to packets and back: inverse for every kind, and a `WireError` for everything that is not one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brokers.errors import BadPayload, WireError
from brokers.protocol import messages
from brokers.protocol.chunking import chunk_error
from brokers.protocol.codec import EncodedMessage, decode, encode, make_failure_reply, parse_reply_to
from brokers.protocol.media_type import detect_content_type
from brokers.protocol.messages import (
    DEADLINE_LIMIT_MS,
    ECHO_LIMIT_BYTES,
    JPEG,
    JSON,
    PNG,
    SAFETENSORS,
    Activation,
    BinaryContent,
    Failure,
    Message,
    ReplyTo,
    Result,
    Task,
    TaskDone,
    TensorContent,
)
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.stage_timing import HOPS_KEY, Hop
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Properties
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.test_safetensors_codec import METADATA, NAMES, tensor_views

REQUEST = bytes(range(16))
BODY = TensorContent({"x": from_numpy(np.arange(6, dtype=np.float32).reshape(2, 3))}, {"k": "v"})
TASK = Task(request_id=REQUEST, content=BODY, reply_to=ReplyTo("a/inbox"), sender_inbox="a/inbox")
HOP = Hop("head", "head-1", 0.5, 0.25, 33.125, 0.0, 10, 20, 4)

WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TOPICS = st.text("abcäß☃/", min_size=1, max_size=20)
REQUESTS = st.binary(min_size=16, max_size=16)
ATTEMPTS = st.integers(1, 999_999_999)
MILLISECONDS = st.integers(0, 10**9).map(lambda thousandths: thousandths / 1000)
COUNTS = st.integers(0, 1 << 53)
BODIES = st.builds(TensorContent, st.dictionaries(NAMES, tensor_views(), max_size=3), METADATA)
BLOBS = st.builds(
    BinaryContent, st.sampled_from([JPEG, PNG, JSON, "text/plain"]), st.binary(max_size=40).map(memoryview)
)
HOP_LISTS = st.lists(
    st.builds(Hop, WORDS, WORDS, *[MILLISECONDS] * 4, bytes_in=COUNTS, bytes_out=COUNTS, batch=COUNTS), max_size=3
).map(tuple)
REPLIES = st.builds(ReplyTo, TOPICS, st.sampled_from(["safetensors", "json"]), st.binary(max_size=ECHO_LIMIT_BYTES))
TASK_FIELDS: dict[str, Any] = {
    "request_id": REQUESTS,
    "reply_to": REPLIES,
    "sender_inbox": TOPICS,
    "source": WORDS,
    "attempt": ATTEMPTS,
    "deadline_ms": st.none() | MILLISECONDS.filter(bool),
    "trace": st.none()
    | st.builds(
        lambda trace, span, sampled: TraceContext(f"{trace:032x}", f"{span:016x}", sampled),
        st.integers(1, (1 << 128) - 1),
        st.integers(1, (1 << 64) - 1),
        st.booleans(),
    ),
}
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Task, content=BLOBS, **TASK_FIELDS),
    st.builds(Task, content=BODIES, hops=HOP_LISTS, **TASK_FIELDS),
    st.builds(Activation, content=BODIES, hops=HOP_LISTS, **TASK_FIELDS),
    st.builds(Result, request_id=REQUESTS, content=BODIES, attempt=ATTEMPTS, hops=HOP_LISTS),
    st.builds(Result, request_id=REQUESTS, content=BLOBS, attempt=ATTEMPTS),
    st.builds(Failure, request_id=REQUESTS, stage=WORDS, worker=WORDS, error=WORDS, reason=WORDS, attempt=ATTEMPTS),
    st.builds(TaskDone, request_id=REQUESTS, worker=WORDS, attempt=ATTEMPTS),
)


def packet_payload(packet: EncodedMessage) -> memoryview:
    return memoryview(b"".join(packet.buffers))


def with_user_properties(packet: EncodedMessage, **user: str | None) -> Properties:
    """The packet's properties with some user properties set, or removed where they are None."""
    kept = {
        **dict(packet.properties.user_properties),
        **{name.replace("_", "-"): value for name, value in user.items()},
    }
    return replace(
        packet.properties, user_properties=tuple((name, value) for name, value in kept.items() if value is not None)
    )


# Inverse ------------------------------------------------------------------------------------------------------------


@given(MESSAGES)
@example(
    replace(TASK, reply_to=ReplyTo("größe/☃", "json", b"\x00\xff"), source="kamera ü", deadline_ms=DEADLINE_LIMIT_MS)
)
@example(Failure(request_id=REQUEST, stage="s", worker="w", error="E", reason="line\nüber 💥", retry=True, attempt=3))
def test_what_is_encoded_is_decoded_again(message: Message) -> None:
    packet = encode(message)
    found = decode(packet.properties, packet_payload(packet))
    assert type(found) is type(message)
    assert found == message
    assert packet.nbytes == len(packet_payload(packet))


def test_a_task_without_a_sender_reports_to_where_it_is_answered() -> None:
    packet = encode(replace(TASK, sender_inbox=""))
    assert decode(packet.properties, packet_payload(packet)) == TASK


def test_only_what_differs_from_the_default_is_written() -> None:
    properties = encode(TASK).properties
    assert properties == Properties(SAFETENSORS, REQUEST, "a/inbox", None, (("sparse", "1"), ("kind", "task")))


@pytest.mark.parametrize(
    ("deadline_ms", "text", "expiry_s"), [(0.0001, "0.001", 1), (1, "1.000", 1), (1000.5, "1000.500", 2)]
)
def test_a_deadline_travels_in_milliseconds_and_as_an_expiry_rounded_up(
    deadline_ms: float, text: str, expiry_s: int
) -> None:
    properties = encode(replace(TASK, deadline_ms=deadline_ms)).properties
    assert dict(properties.user_properties)["deadline-ms"] == text
    assert properties.expiry_s == expiry_s
    assert isinstance(decode(properties, packet_payload(encode(TASK))), Task)


def test_unknown_user_properties_and_hop_fields_are_read_over() -> None:
    packet = encode(replace(TASK, content=TensorContent(BODY.tensors), hops=(HOP,)))
    later = packet_payload(packet).tobytes().replace(b'\\"batch\\":4', b'\\"b\\":null ')
    found = decode(with_user_properties(packet, trace="abc", colour="blue"), memoryview(later))
    assert isinstance(found, Task)
    assert found.hops == (replace(HOP, batch=1),)


# Legal on construction ----------------------------------------------------------------------------------------------

ILLEGAL: dict[str, tuple[dict[str, Any], str]] = {
    "a request id of 15 bytes": ({"request_id": b"." * 15}, "16 bytes, is 15"),
    "a request id of 17 bytes": ({"request_id": b"." * 17}, "16 bytes, is 17"),
    "attempt 0": ({"attempt": 0}, "1 or more, is 0"),
    "a negative deadline": ({"deadline_ms": -1.0}, "is -1"),
    "a deadline that is no number": ({"deadline_ms": float("nan")}, "is nan"),
    "a deadline past what an expiry can say": ({"deadline_ms": DEADLINE_LIMIT_MS + 1}, "0 to 4294967295000"),
    "an echo that is too long": (
        {"reply_to": ReplyTo("t", "json", b"." * (ECHO_LIMIT_BYTES + 1))},
        "at most 256 bytes, is 257",
    ),
    "hops beside a picture": ({"content": BinaryContent(JPEG, b""), "hops": (HOP,)}, "with tensors only"),
    "hops forged in the metadata": ({"content": TensorContent({}, {HOPS_KEY: "[]"})}, "by the stages themselves"),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_message_cannot_be_made(case: str) -> None:
    fields, text = ILLEGAL[case]
    with raises_error(WireError, "BadProperty", match=text):
        replace(TASK, **fields)


@pytest.mark.parametrize("topic", ["a/+/b", "#", "a\0b"])
def test_an_answer_cannot_go_to_a_filter(topic: str) -> None:
    with raises_error(WireError, "BadProperty", match="topic to publish to"):
        ReplyTo(topic)


@pytest.mark.parametrize("topic", ["a/" * 64, "t" * 1025, "ü" * 513], ids=["levels", "bytes", "bytes of UTF-8"])
def test_an_answer_cannot_go_where_it_would_cost_us_our_connection(topic: str) -> None:
    with raises_error(WireError, "BadProperty", match="at most 64 levels and 1024 bytes"):
        ReplyTo(topic)
    assert ReplyTo("a/" * 63 + "a").topic
    assert ReplyTo("t" * 1024).topic


def test_an_activation_is_tensors() -> None:
    with raises_error(WireError, "BadProperty", match=f"must be {SAFETENSORS}, is image/jpeg"):
        Activation(request_id=REQUEST, content=BinaryContent(JPEG, b""), reply_to=ReplyTo("t"))


# Foreign clients ----------------------------------------------------------------------------------------------------


def test_a_packet_without_our_version_is_a_foreign_task_answered_in_json() -> None:
    properties = Properties(
        response_topic="my/answers", correlation_data=b"42", expiry_s=3, user_properties=(("kind", "result"),)
    )
    found = decode(properties, memoryview(b"[1, 2]"))
    assert isinstance(found, Task)
    assert found.content == BinaryContent(JSON, b"[1, 2]")
    assert found.reply_to == ReplyTo("my/answers", "json", b"42")
    assert (found.sender_inbox, found.deadline_ms, found.attempt) == ("", 3000, 1)
    assert found.request_id != decode(properties, memoryview(b"[1, 2]")).request_id


def test_the_longest_expiry_of_a_foreign_client_can_be_passed_on() -> None:
    found = decode(Properties(response_topic="t", expiry_s=0xFFFF_FFFF), memoryview(b"1"))
    packet = encode(found)
    assert packet.properties.expiry_s == 0xFFFF_FFFF
    assert isinstance(decode(packet.properties, packet_payload(packet)), Task)


def test_a_foreign_correlation_that_could_not_travel_on_is_refused_and_answered() -> None:
    properties = Properties(response_topic="t", correlation_data=b"." * (ECHO_LIMIT_BYTES + 1))
    with raises_error(WireError, "BadProperty", match="at most 256 bytes, is 257") as caught:
        decode(properties, memoryview(b"1"))
    told = make_failure_reply(caught.value, properties, "s", "w")
    assert told is not None
    assert told[0] == ReplyTo("t", "json", properties.correlation_data)


@pytest.mark.parametrize(
    ("declared", "payload", "expected"),
    [
        ("", b"\xff\xd8\xff\xe0", JPEG),
        ("", b"\x89PNG\r\n\x1a\n..", PNG),
        ("", packet_payload(encode(TASK)).tobytes(), SAFETENSORS),
        ("", b' \n{"a": 1}', JSON),
        ("", b"[1]", JSON),
        ("", b"-1.5", JSON),
        ("image/jpg", b"", JPEG),
        ("Application/JSON; charset=utf-8", b"1", JSON),
        ("text/plain", b"\xff\xd8\xff", "text/plain"),
    ],
)
def test_content_is_told_by_its_declaration_or_its_first_bytes(declared: str, payload: bytes, expected: str) -> None:
    assert detect_content_type(declared, memoryview(payload)) == expected


@pytest.mark.parametrize(
    "payload", [b"", b" ", b"hello", b"GIF89a", b"\xff\xd8", (2 << 20).to_bytes(8, "little") + b"{"]
)
def test_content_that_cannot_be_told_says_what_was_expected(payload: bytes) -> None:
    with pytest.raises(BadPayload, match="expected JPEG, PNG, safetensors or JSON"):
        detect_content_type("", memoryview(payload))


# Whom to tell -------------------------------------------------------------------------------------------------------


def test_a_refusal_goes_where_the_answer_would_have_gone() -> None:
    task = replace(TASK, sender_inbox="b/inbox", reply_to=ReplyTo("a", "json", b"7"), attempt=4)
    told = make_failure_reply(chunk_error("lost"), encode(task).properties, "body", "body-1")
    assert told is not None
    reply, failure = told
    assert reply == task.reply_to
    assert (failure.request_id, failure.attempt, failure.stage, failure.worker) == (REQUEST, 4, "body", "body-1")
    assert (failure.error, failure.reason, failure.retry) == ("BadChunk", "bad chunk: lost", True)


@pytest.mark.parametrize("user", [{"accept": "xml"}, {"echo": "?"}, {"attempt": "x"}, {"sparse": "2"}])
def test_even_broken_properties_are_answered_if_they_say_where(user: dict[str, str | None]) -> None:
    told = make_failure_reply(
        WireError("TrailingBytes", "2 bytes too many"), with_user_properties(encode(TASK), **user), "s", "w"
    )
    assert told is not None
    assert told[0] == ReplyTo("a/inbox")
    assert (told[1].request_id, told[1].attempt, told[1].retry) == (REQUEST, 1, False)


@pytest.mark.parametrize(
    "properties",
    [
        Properties(),
        Properties(user_properties=(("sparse", "1"),)),
        Properties(response_topic="#"),
        with_user_properties(encode(TASK), reply="a/+"),
    ],
)
def test_nobody_is_told_where_nobody_can_be(properties: Properties) -> None:
    assert parse_reply_to(properties) is None
    assert make_failure_reply(chunk_error(""), properties, "s", "w") is None


def test_request_ids_are_random_and_of_sixteen_bytes() -> None:
    ids = {messages.new_request_id() for _ in range(100)}
    assert {len(request) for request in ids} == {16}
    assert len(ids) == 100
