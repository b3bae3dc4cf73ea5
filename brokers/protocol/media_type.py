"""Detect the content type of a payload, and decode safetensors bodies."""

import re

from brokers.errors import BadPayload
from brokers.protocol import safetensors_codec
from brokers.protocol.messages import JPEG, JSON, PNG, SAFETENSORS, BinaryContent, Content, TensorContent

JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JSON_START = re.compile(rb"[ \t\r\n]*[\[{0-9-]")


def detect_content_type(declared: str, payload: memoryview) -> str:
    """Return the declared content type without its parameters, or the one that the first bytes show.

    Raises `BadPayload` where nothing is declared and the bytes are neither JPEG, PNG, safetensors nor JSON.
    """
    media_type = declared.partition(";")[0].strip().lower()
    if media_type:
        return JPEG if media_type == "image/jpg" else media_type
    head = bytes(payload[:16])
    if head.startswith(JPEG_SIGNATURE):
        return JPEG
    if head.startswith(PNG_SIGNATURE):
        return PNG
    # A safetensors body starts with the length of its header, whose first byte is an opening brace.
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes <= safetensors_codec.HEADER_LIMIT_BYTES:
        return SAFETENSORS
    if _JSON_START.match(head):
        return JSON
    raise BadPayload("unknown", f"expected JPEG, PNG, safetensors or JSON, the first bytes are {head[:8].hex(' ')!r}")


def decode_content(declared: str, payload: memoryview) -> Content:
    """Return the tensors of a safetensors body, any other payload with its detected type, without copying it."""
    content_type = detect_content_type(declared, payload)
    if content_type == SAFETENSORS:
        return TensorContent(*safetensors_codec.unpack(payload))
    return BinaryContent(content_type, payload)
