"""What the bytes of a payload are: tensors, a picture, readings. Pure."""

from __future__ import annotations

import re

from brokers.errors import BadPayload
from brokers.protocol import safetensors_codec as codec
from brokers.protocol.messages import JPEG, JSON, PNG, SAFETENSORS, BinaryContent, Content, TensorContent

_JPEG_MAGIC = b"\xff\xd8\xff"
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_JSON_START = re.compile(rb"[ \t\r\n]*[\[{0-9-]")


def detect_content_type(declared: str, payload: memoryview) -> str:
    """The declared content type without its parameters, or what the first bytes say."""
    plain = declared.partition(";")[0].strip().lower()
    if plain:
        return {"image/jpg": JPEG}.get(plain, plain)
    head = bytes(payload[:16])
    if head.startswith(_JPEG_MAGIC):
        return JPEG
    if head.startswith(_PNG_MAGIC):
        return PNG
    # A safetensors body begins with the length of its header, whose first byte is always an opening brace.
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= codec.HEADER_LIMIT_BYTES:
        return SAFETENSORS
    if _JSON_START.match(head):
        return JSON
    raise BadPayload("unknown", f"expected JPEG, PNG, safetensors or JSON, the first bytes are {head[:8].hex(' ')!r}")


def decode_content(declared: str, payload: memoryview) -> Content:
    """A body if the bytes are safetensors, else a blob of the type they declare or show."""
    content_type = detect_content_type(declared, payload)
    if content_type == SAFETENSORS:
        return TensorContent(*codec.unpack(payload))
    return BinaryContent(content_type, payload)
