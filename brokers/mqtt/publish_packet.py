"""The head of an MQTT 5 PUBLISH packet: everything before its payload, to bytes and back (MQTT 5.0 section 3.3). Pure.

Only what Sparse uses is kept; Payload Format Indicator and Subscription Identifier are read over. A Topic Alias is
refused, because this client never allows one (its Topic Alias Maximum is absent, which means 0: section 3.1.2.11.5).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from brokers.errors import TooLarge, WireError
from brokers.protocol.transport import Properties

PUBLISH = 0x30
MAX_REMAINING_BYTES = 268_435_455  # four bytes of seven bits: section 1.5.5
MAX_FIELD_BYTES = 65_535  # strings and binary data have two-byte lengths: sections 1.5.4 and 1.5.6
MAX_HEADER_BYTES = 1 << 20  # ours: a head is buffered whole before it is parsed; real ones have less than 300 bytes

_PAYLOAD_FORMAT = 0x01  # property identifiers: section 2.2.2.2
_EXPIRY = 0x02
_CONTENT_TYPE = 0x03
_RESPONSE_TOPIC = 0x08
_CORRELATION = 0x09
_SUBSCRIPTION = 0x0B
_USER = 0x26
_NO_PROPERTIES = Properties()


@dataclass(eq=False)
class BadPacket(WireError):
    """A packet that breaks MQTT 5; the connection it came on cannot be read any further."""

    problem: str

    def __str__(self) -> str:
        return f"bad MQTT packet: {self.problem}"


@dataclass(frozen=True, slots=True)
class PublishHeader:
    """A PUBLISH without its payload; `head_bytes` is where the payload begins, `payload_bytes` how long it is.

    Without a topic it is to be read over: its properties, which count as payload then, are too large to be read.
    """

    topic: str
    properties: Properties
    header_bytes: int
    payload_bytes: int
    qos: int = 0
    retain: bool = False
    packet_id: int = 0
    dup: bool = False  # DUP: the broker has sent it before, and it was not acknowledged


def encode_publish_header(
    topic: str, properties: Properties, payload_bytes: int, *, qos: int = 0, retain: bool = False, packet_id: int = 0
) -> bytes:
    """Return the bytes of a PUBLISH up to its payload.

    Raises `TooLarge` for a field or a packet over MQTT's own limits, `BadPacket` for a topic with wildcards.
    """
    if not topic or "+" in topic or "#" in topic or "\0" in topic:
        raise BadPacket(f"{topic!r} is not a topic to publish to: it is empty, or holds '+', '#' or a null character")
    name = _field("topic", topic.encode())
    packed = b"" if properties == _NO_PROPERTIES else _encode_properties(properties)
    identifier = struct.pack("!H", packet_id) if qos else b""
    body = b"".join((name, identifier, encode_varint(len(packed)), packed))
    remaining = len(body) + payload_bytes
    if remaining > MAX_REMAINING_BYTES:
        raise TooLarge(f"publication to {topic!r}", MAX_REMAINING_BYTES, remaining)
    return bytes((PUBLISH | qos << 1 | retain,)) + encode_varint(remaining) + body


def parse_publish_header(data: memoryview) -> PublishHeader | None:
    """Return the head that `data` begins with, or None while more bytes are needed to tell.

    Raises `BadPacket` for bytes that no longer can become a PUBLISH. Properties of gigantic size break nothing: whoever
    may publish could end the connections of all who listen, and with a retained message do so for ever.
    """
    length = parse_varint(data, 1)
    if length is None:
        return None
    remaining, start = length
    end = start + remaining
    flags = data[0] & 0x0F
    qos = flags >> 1 & 3
    if qos == 3:
        raise BadPacket("a PUBLISH of QoS 3")
    topic_at = start + 2
    topic_end = topic_at + _short(data, start, end)
    id_end = topic_end + (2 if qos else 0)
    if id_end >= end:
        raise BadPacket("a PUBLISH that ends inside its topic")
    if len(data) <= id_end:
        return None
    properties_length = parse_varint(data, id_end, end)
    if properties_length is None:
        return None
    properties_bytes, properties_at = properties_length
    head_bytes = properties_at + properties_bytes
    if head_bytes > end:
        raise BadPacket("a PUBLISH that ends inside its properties")
    packet_id = _short(data, topic_end, end) if qos else 0
    if head_bytes > MAX_HEADER_BYTES:
        return PublishHeader("", _NO_PROPERTIES, properties_at, end - properties_at, qos, bool(flags & 1), packet_id)
    if len(data) < head_bytes:
        return None
    properties = _parse_properties(data[properties_at:head_bytes]) if properties_bytes else _NO_PROPERTIES
    topic = _text(data[topic_at:topic_end])
    if not topic:
        raise BadPacket("a PUBLISH without a topic")
    again = bool(flags & 8)
    return PublishHeader(topic, properties, head_bytes, end - head_bytes, qos, bool(flags & 1), packet_id, again)


def encode_varint(number: int) -> bytes:
    """Return a Variable Byte Integer (section 1.5.5)."""
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | 0x80 if number else low)
        if not number:
            return bytes(out)


def parse_varint(data: memoryview, at: int, end: int | None = None) -> tuple[int, int] | None:
    """Return a Variable Byte Integer at `at` and where it ends; None while bytes are missing."""
    number = 0
    for index in range(4):
        if end is not None and at + index >= end:
            raise BadPacket("a packet that ends inside a length")
        if at + index >= len(data):
            return None
        byte = data[at + index]
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, at + index + 1
    raise BadPacket("a length of more than four bytes")


def _encode_properties(properties: Properties) -> bytes:
    out = bytearray()
    if properties.expiry_s is not None:
        out += struct.pack("!BI", _EXPIRY, properties.expiry_s)
    if properties.content_type:
        out.append(_CONTENT_TYPE)
        out += _field("content type", properties.content_type.encode())
    if properties.response_topic:
        out.append(_RESPONSE_TOPIC)
        out += _field("response topic", properties.response_topic.encode())
    if properties.correlation_data:
        out.append(_CORRELATION)
        out += _field("correlation data", properties.correlation_data)
    for name, value in properties.user_properties:
        out.append(_USER)
        out += _field("user property", name.encode())
        out += _field("user property", value.encode())
    return bytes(out)


def _field(what: str, data: bytes) -> bytes:
    if len(data) > MAX_FIELD_BYTES:
        raise TooLarge(what, MAX_FIELD_BYTES, len(data))
    return struct.pack("!H", len(data)) + data


def _parse_properties(data: memoryview) -> Properties:
    found: dict[int, bytes] = {}
    user: list[tuple[str, str]] = []
    at = 0
    while at < len(data):
        kind, at = data[at], at + 1
        if kind == _USER:
            name, at = _take_field(data, at)
            value, at = _take_field(data, at)
            user.append((_text(name), _text(value)))
            continue
        if kind == _SUBSCRIPTION:  # may stand there several times: section 3.3.2.3.8
            at = _skip_length(data, at)
            continue
        if kind in found:
            raise BadPacket(f"property 0x{kind:02x} stands there twice")
        found[kind], at = _take_value(kind, data, at)
    return Properties(
        content_type=_text(found.get(_CONTENT_TYPE, b"")),
        correlation_data=found.get(_CORRELATION, b""),
        response_topic=_text(found.get(_RESPONSE_TOPIC, b"")),
        expiry_s=int.from_bytes(found[_EXPIRY], "big") if _EXPIRY in found else None,
        user_properties=tuple(user),
    )


def _take_value(kind: int, data: memoryview, at: int) -> tuple[bytes, int]:
    if kind in (_CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION):
        return _take_field(data, at)
    width = {_PAYLOAD_FORMAT: 1, _EXPIRY: 4}.get(kind)
    if width is None:
        raise BadPacket(f"property 0x{kind:02x} does not belong to a PUBLISH")
    if at + width > len(data):
        raise BadPacket("properties that end inside a number")
    return bytes(data[at : at + width]), at + width


def _take_field(data: memoryview, at: int) -> tuple[bytes, int]:
    start = at + 2
    end = start + _short(data, at, len(data))
    if end > len(data) or start > len(data):
        raise BadPacket("properties that end inside a field")
    return bytes(data[start:end]), end


def _skip_length(data: memoryview, at: int) -> int:
    length = parse_varint(data, at, len(data))
    assert length is not None  # bounded by its end, it is found or it raises
    return length[1]


def _short(data: memoryview, at: int, end: int) -> int:
    """Return a two-byte number that must end before `end`; 0 while its bytes have not come."""
    if at + 2 > end:
        raise BadPacket("a packet that ends inside a number of two bytes")
    return data[at] << 8 | data[at + 1] if at + 2 <= len(data) else 0


def _text(data: bytes | memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise BadPacket("a string that is not UTF-8") from error
