"""Content types: declared, or detected from the first bytes."""

from __future__ import annotations

import pytest

from brokers.errors import BadPayload
from brokers.protocol.codec import encode
from brokers.protocol.media_type import decode_content, detect_content_type
from brokers.protocol.messages import JPEG, JSON, PNG, SAFETENSORS, BinaryContent
from tests.unit.brokers.protocol.strategies import CONTENT, TASK, packet_payload


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
