"""Messages: the checks of their fields, and the content type of a payload."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from brokers.errors import BadPayload, WireError
from brokers.protocol.codec import encode
from brokers.protocol.messages import (
    DEADLINE_LIMIT_MS,
    ECHO_LIMIT_BYTES,
    JPEG,
    JSON,
    JSON_INTEGER_LIMIT,
    PNG,
    SAFETENSORS,
    Activation,
    BinaryContent,
    Message,
    ReplyTo,
    TensorContent,
    decode_content,
    detect_content_type,
    new_request_id,
)
from brokers.protocol.stage_timing import HOPS_KEY
from tests.support.errors import raises_error
from tests.unit.brokers.protocol.strategies import (
    CONTENT,
    DONE,
    FAILURE,
    GRADIENT,
    HOP,
    REQUEST,
    STEP,
    TASK,
    packet_payload,
)

INVALID: dict[str, tuple[Message, dict[str, Any], str]] = {
    "negative deadline": (TASK, {"deadline_ms": -1.0}, "is -1"),
    "deadline not a number": (TASK, {"deadline_ms": float("nan")}, "is nan"),
    "deadline too long": (TASK, {"deadline_ms": DEADLINE_LIMIT_MS + 1}, "0 to 4294967295000"),
    "echo too long": (
        TASK,
        {"reply_to": ReplyTo("t", "json", b"." * (ECHO_LIMIT_BYTES + 1))},
        "at most 256 bytes, is 257",
    ),
    "unknown priority": (TASK, {"priority": "urgent"}, "interactive or background, is 'urgent'"),
    "hops beside a picture": (TASK, {"content": BinaryContent(JPEG, b""), "hops": (HOP,)}, "with tensors only"),
    "hops in the metadata": (TASK, {"content": TensorContent({}, {HOPS_KEY: "[]"})}, "is reserved"),
    "negative term": (STEP, {"term": -1}, f"0 to {JSON_INTEGER_LIMIT - 1}, is -1"),
    "term too large": (STEP, {"term": JSON_INTEGER_LIMIT}, f"is {JSON_INTEGER_LIMIT}"),
    "unknown verb": (STEP, {"verb": "forget"}, r"one of prepared, commit, .*, is 'forget'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_field_raises_bad_property(case: str) -> None:
    message, change, text = INVALID[case]
    with raises_error(WireError, "BadProperty", match=text):
        replace(message, **change)


@pytest.mark.parametrize("message", [TASK, FAILURE, DONE, GRADIENT, STEP], ids=lambda message: type(message).__name__)
def test_every_message_checks_request_id_and_attempt(message: Any) -> None:
    for change, text in (
        ({"request_id": b"." * 15}, "16 bytes, is 15"),
        ({"request_id": b"." * 17}, "16 bytes, is 17"),
        ({"attempt": 0}, "1 or more, is 0"),
    ):
        with raises_error(WireError, "BadProperty", match=text):
            replace(message, **change)


@pytest.mark.parametrize("message", [TASK, GRADIENT, STEP], ids=lambda message: type(message).__name__)
def test_sender_inbox_must_be_a_valid_reply_topic(message: Any) -> None:
    for topic, text in (("a/+", "topic to publish to"), ("sparse/local/t/tail/tasks", "shared task topic")):
        with raises_error(WireError, "BadProperty", match=text):
            replace(message, sender_inbox=topic)


@pytest.mark.parametrize("topic", ["a/+/b", "#", "a\0b"])
def test_reply_topic_must_not_be_a_filter(topic: str) -> None:
    with raises_error(WireError, "BadProperty", match="topic to publish to"):
        ReplyTo(topic)


@pytest.mark.parametrize("topic", ["a/" * 64, "t" * 1025, "ü" * 513], ids=["levels", "bytes", "bytes of UTF-8"])
def test_reply_topic_has_limits_on_levels_and_bytes(topic: str) -> None:
    with raises_error(WireError, "BadProperty", match="at most 64 levels and 1024 bytes"):
        ReplyTo(topic)
    assert ReplyTo("a/" * 63 + "a").topic
    assert ReplyTo("t" * 1024).topic


def test_activation_requires_tensors() -> None:
    with raises_error(WireError, "BadProperty", match=f"must be {SAFETENSORS}, is image/jpeg"):
        Activation(request_id=REQUEST, content=BinaryContent(JPEG, b""), reply_to=ReplyTo("t"))


def test_request_ids_are_sixteen_random_bytes() -> None:
    ids = {new_request_id() for _ in range(100)}
    assert {len(request) for request in ids} == {16}
    assert len(ids) == 100


@pytest.mark.parametrize(
    ("declared", "payload", "expected"),
    [
        ("", b"\xff\xd8\xff\xe0", JPEG),
        ("", b"\x89PNG\r\n\x1a\n..", PNG),
        ("", packet_payload(encode(TASK)).tobytes(), SAFETENSORS),
        ("", b' \n{"a": 1}', JSON),
        ("", b"[1]", JSON),
        ("", b"-1.5", JSON),
        (";", b"[1]", JSON),
        ("image/jpg", b"", JPEG),
        ("Application/JSON; charset=utf-8", b"1", JSON),
        ("text/plain", b"\xff\xd8\xff", "text/plain"),
    ],
)
def test_declared_type_comes_before_the_first_bytes(declared: str, payload: bytes, expected: str) -> None:
    assert detect_content_type(declared, memoryview(payload)) == expected


@pytest.mark.parametrize(
    "payload", [b"", b" ", b"hello", b"GIF89a", b"\xff\xd8", (2 << 20).to_bytes(8, "little") + b"{"]
)
def test_unknown_payload_raises_bad_payload(payload: bytes) -> None:
    with pytest.raises(BadPayload, match="expected JPEG, PNG, safetensors or JSON"):
        detect_content_type("", memoryview(payload))


def test_only_safetensors_are_decoded() -> None:
    body = packet_payload(encode(TASK))
    assert decode_content("", body) == CONTENT
    assert decode_content("text/plain", body) == BinaryContent("text/plain", body)
