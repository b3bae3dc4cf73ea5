"""Header of an MQTT 5 PUBLISH packet, all bytes before its payload: encoding and parsing (MQTT 5.0 section 3.3).

Only the properties that Sparse uses are kept; Payload Format Indicator and Subscription Identifier are ignored. A Topic
Alias is refused, because this client never allows one: it sends no Topic Alias Maximum (section 3.1.2.11.5).
"""

import struct
from dataclasses import dataclass

from brokers.errors import TooLarge, WireError
from brokers.protocol.transport import Properties

PUBLISH = 0x30
MAX_REMAINING_BYTES = 268_435_455  # four bytes of seven bits: section 1.5.5
MAX_FIELD_BYTES = 65_535  # strings and binary data have two-byte lengths: sections 1.5.4 and 1.5.6
MAX_HEADER_BYTES = 1 << 20  # ours: a header is buffered whole before it is parsed; real ones have less than 300 bytes

_PAYLOAD_FORMAT = 0x01  # property identifiers: section 2.2.2.2
_EXPIRY = 0x02
_CONTENT_TYPE = 0x03
_RESPONSE_TOPIC = 0x08
_CORRELATION = 0x09
_SUBSCRIPTION = 0x0B
_USER = 0x26
_NO_PROPERTIES = Properties()


def bad_packet(problem: str) -> WireError:
    """Return the error for a packet that breaks MQTT 5; its connection cannot be read any further."""
    return WireError("BadPacket", f"bad MQTT packet: {problem}")


@dataclass(frozen=True, slots=True)
class PublishHeader:
    """A PUBLISH without its payload: `header_bytes` is where the payload starts, `payload_bytes` its length.

    A header without a topic has properties that are too large to read; they count as payload, which is to be skipped.
    """

    topic: str
    properties: Properties
    header_bytes: int
    payload_bytes: int
    qos: int = 0
    retain: bool = False
    packet_id: int = 0
    dup: bool = False  # the broker has sent it before, and it was not acknowledged


def encode_publish_header(
    topic: str, properties: Properties, payload_bytes: int, *, qos: int = 0, retain: bool = False, packet_id: int = 0
) -> bytes:
    """Return the bytes of a PUBLISH up to its payload.

    Raises `TooLarge` for a field or a packet over MQTT's limits, `WireError` ("BadPacket") for a topic with wildcards.
    """
    if not topic or "+" in topic or "#" in topic or "\0" in topic:
        raise bad_packet(f"{topic!r} is not a topic to publish to: it is empty, or has a '+', '#' or null character")
    name = _encode_field("topic", topic.encode())
    packed = b"" if properties == _NO_PROPERTIES else _encode_properties(properties)
    identifier = struct.pack("!H", packet_id) if qos else b""
    body = b"".join((name, identifier, encode_varint(len(packed)), packed))
    remaining = len(body) + payload_bytes
    if remaining > MAX_REMAINING_BYTES:
        raise TooLarge(f"publication to {topic!r}", MAX_REMAINING_BYTES, remaining)
    return bytes((PUBLISH | qos << 1 | retain,)) + encode_varint(remaining) + body


def parse_publish_header(data: memoryview) -> PublishHeader | None:
    """Return the header that `data` begins with, or None while more bytes are needed.

    Raises `WireError` ("BadPacket") for bytes that cannot become a PUBLISH. Properties of enormous size are no error:
    one publisher could end the connections of all subscribers, and with a retained message again and again.
    """
    length = parse_varint(data, 1)
    if length is None:
        return None
    remaining, start = length
    end = start + remaining
    flags = data[0] & 0x0F
    qos = flags >> 1 & 3
    if qos == 3:
        raise bad_packet("a PUBLISH with QoS 3")
    topic_start = start + 2
    topic_end = topic_start + _parse_uint16(data, start, end)
    id_end = topic_end + (2 if qos else 0)
    if id_end >= end:
        raise bad_packet("a PUBLISH that ends inside its topic")
    if len(data) <= id_end:
        return None
    properties_length = parse_varint(data, id_end, end)
    if properties_length is None:
        return None
    properties_bytes, properties_start = properties_length
    header_bytes = properties_start + properties_bytes
    if header_bytes > end:
        raise bad_packet("a PUBLISH that ends inside its properties")
    retain = bool(flags & 1)
    packet_id = _parse_uint16(data, topic_end, end) if qos else 0
    if header_bytes > MAX_HEADER_BYTES:
        return PublishHeader("", _NO_PROPERTIES, properties_start, end - properties_start, qos, retain, packet_id)
    if len(data) < header_bytes:
        return None
    properties = _parse_properties(data[properties_start:header_bytes]) if properties_bytes else _NO_PROPERTIES
    topic = _parse_text(data[topic_start:topic_end])
    if not topic:
        raise bad_packet("a PUBLISH without a topic")
    return PublishHeader(topic, properties, header_bytes, end - header_bytes, qos, retain, packet_id, bool(flags & 8))


def encode_varint(number: int) -> bytes:
    """Return a Variable Byte Integer (section 1.5.5)."""
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | 0x80 if number else low)
        if not number:
            return bytes(out)


def parse_varint(data: memoryview, start: int, end: int | None = None) -> tuple[int, int] | None:
    """Return the Variable Byte Integer at `start` and the offset after it; None while bytes are missing."""
    number = 0
    for index in range(4):
        if end is not None and start + index >= end:
            raise bad_packet("a packet that ends inside a length")
        if start + index >= len(data):
            return None
        byte = data[start + index]
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, start + index + 1
    raise bad_packet("a length of more than four bytes")


def _encode_properties(properties: Properties) -> bytes:
    out = bytearray()
    if properties.expiry_s is not None:
        out += struct.pack("!BI", _EXPIRY, properties.expiry_s)
    for identifier, what, data in (
        (_CONTENT_TYPE, "content type", properties.content_type.encode()),
        (_RESPONSE_TOPIC, "response topic", properties.response_topic.encode()),
        (_CORRELATION, "correlation data", properties.correlation_data),
    ):
        if data:
            out.append(identifier)
            out += _encode_field(what, data)
    for name, value in properties.user_properties:
        out.append(_USER)
        out += _encode_field("user property", name.encode())
        out += _encode_field("user property", value.encode())
    return bytes(out)


def _encode_field(what: str, data: bytes) -> bytes:
    if len(data) > MAX_FIELD_BYTES:
        raise TooLarge(what, MAX_FIELD_BYTES, len(data))
    return struct.pack("!H", len(data)) + data


def _parse_properties(data: memoryview) -> Properties:
    values: dict[int, bytes] = {}
    user: list[tuple[str, str]] = []
    offset = 0
    while offset < len(data):
        kind = data[offset]
        offset += 1
        if kind == _USER:
            name, offset = _parse_field(data, offset)
            value, offset = _parse_field(data, offset)
            user.append((_parse_text(name), _parse_text(value)))
        elif kind == _SUBSCRIPTION:  # may be repeated: section 3.3.2.3.8
            identifier = parse_varint(data, offset, len(data))
            assert identifier is not None  # complete, or parse_varint raises
            offset = identifier[1]
        elif kind in values:
            raise bad_packet(f"property 0x{kind:02x} is repeated")
        else:
            values[kind], offset = _parse_value(kind, data, offset)
    return Properties(
        content_type=_parse_text(values.get(_CONTENT_TYPE, b"")),
        correlation_data=values.get(_CORRELATION, b""),
        response_topic=_parse_text(values.get(_RESPONSE_TOPIC, b"")),
        expiry_s=int.from_bytes(values[_EXPIRY], "big") if _EXPIRY in values else None,
        user_properties=tuple(user),
    )


def _parse_value(kind: int, data: memoryview, start: int) -> tuple[bytes, int]:
    if kind in (_CONTENT_TYPE, _RESPONSE_TOPIC, _CORRELATION):
        return _parse_field(data, start)
    width = {_PAYLOAD_FORMAT: 1, _EXPIRY: 4}.get(kind)
    if width is None:
        raise bad_packet(f"property 0x{kind:02x} is not allowed in a PUBLISH")
    if start + width > len(data):
        raise bad_packet("properties that end inside a number")
    return bytes(data[start : start + width]), start + width


def _parse_field(data: memoryview, start: int) -> tuple[bytes, int]:
    end = start + 2 + _parse_uint16(data, start, len(data))
    if end > len(data):
        raise bad_packet("properties that end inside a field")
    return bytes(data[start + 2 : end]), end


def _parse_uint16(data: memoryview, start: int, end: int) -> int:
    """Return a two-byte number that must lie before `end`; 0 while its bytes have not arrived."""
    if start + 2 > end:
        raise bad_packet("a packet that ends inside a number of two bytes")
    return data[start] << 8 | data[start + 1] if start + 2 <= len(data) else 0


def _parse_text(data: bytes | memoryview) -> str:
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise bad_packet("a string that is not UTF-8") from error
