"""PUBLISH headers: encoding and parsing are inverse, by the specification's examples, truncated and malformed."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokers.errors import TooLarge, WireError
from brokers.mqtt.publish_packet import (
    MAX_HEADER_BYTES,
    MAX_REMAINING_BYTES,
    PublishHeader,
    encode_publish_header,
    encode_varint,
    parse_publish_header,
    parse_varint,
)
from brokers.protocol.transport import Properties

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TOPIC = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="+#\0"), min_size=1, max_size=60)
PROPERTIES = st.builds(
    Properties,
    content_type=TEXT,
    correlation_data=st.binary(max_size=40),
    response_topic=TEXT,
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    user_properties=st.lists(st.tuples(TEXT, TEXT), max_size=5).map(tuple),
)
ALL_PROPERTIES = Properties("c/t", b"\x00\x01", "back", 7, (("k", "v"), ("k", "")))


@settings(max_examples=50)
@given(TOPIC, PROPERTIES, st.integers(0, 2**27), st.sampled_from([0, 1]), st.booleans(), st.integers(1, 65_535))
def test_parsing_inverts_encoding(
    topic: str, properties: Properties, payload_bytes: int, qos: int, retain: bool, packet_id: int
) -> None:
    packet_id = packet_id if qos else 0
    data = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=packet_id)
    expected = PublishHeader(topic, properties, len(data), payload_bytes, qos, retain, packet_id)
    assert parse_publish_header(memoryview(data)) == expected
    assert parse_publish_header(memoryview(data + b"payload")) == expected


@settings(max_examples=30)
@given(TOPIC, PROPERTIES, st.integers(0, 300), st.sampled_from([0, 1]))
def test_truncated_header_needs_more_bytes(topic: str, properties: Properties, payload_bytes: int, qos: int) -> None:
    data = encode_publish_header(topic, properties, payload_bytes, qos=qos, packet_id=1)
    for length in range(1, len(data)):
        assert parse_publish_header(memoryview(data)[:length]) is None


@given(st.binary(max_size=200))
def test_random_bytes_are_parsed_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        header = parse_publish_header(memoryview(b"\x30" + data))
        assert header is None or header.header_bytes <= len(data) + 1


@given(st.integers(0, 400), st.integers(0, 255))
def test_header_with_one_changed_byte_is_parsed_or_refused(position: int, value: int) -> None:
    data = bytearray(encode_publish_header("sparse/local/p/s/in/w", ALL_PROPERTIES, 100, qos=1, packet_id=9))
    data[1 + position % (len(data) - 1)] = value
    with contextlib.suppress(WireError):  # and no other exception
        parse_publish_header(memoryview(data))


def test_encoding_follows_section_3_3() -> None:
    # Type and flags, remaining length, topic, packet identifier, properties in their order.
    assert encode_publish_header("a/b", Properties(), 0) == b"\x30\x06\x00\x03a/b\x00"
    data = encode_publish_header("a/b", Properties(), 2, qos=1, retain=True, packet_id=10)
    assert data == b"\x33\x0a\x00\x03a/b\x00\x0a\x00"
    expected = (
        b"\x30\x28\x00\x01t\x24"
        b"\x02\x00\x00\x00\x07"
        b"\x03\x00\x03c/t"
        b"\x08\x00\x04back"
        b"\x09\x00\x02\x00\x01"
        b"\x26\x00\x01k\x00\x01v"
        b"\x26\x00\x01k\x00\x00"
    )
    assert encode_publish_header("t", ALL_PROPERTIES, 0) == expected


@pytest.mark.parametrize(
    ("number", "data"),
    [
        (0, b"\0"),
        (127, b"\x7f"),
        (128, b"\x80\x01"),
        (16_384, b"\x80\x80\x01"),
        (MAX_REMAINING_BYTES, b"\xff\xff\xff\x7f"),
    ],
)
def test_variable_byte_integers_follow_table_1_1(number: int, data: bytes) -> None:
    assert encode_varint(number) == data
    assert parse_varint(memoryview(data), 0) == (number, len(data))


def with_properties(properties: bytes) -> bytes:
    return bytes((0x30, 4 + len(properties))) + b"\x00\x01t" + bytes((len(properties),)) + properties


def test_unused_properties_are_ignored() -> None:
    # A Payload Format Indicator, and two Subscription Identifiers of one and two bytes.
    header = parse_publish_header(memoryview(with_properties(b"\x01\x01\x0b\x05\x0b\x80\x01\x03\x00\x01c")))
    assert header is not None
    assert header.properties == Properties(content_type="c")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x36\x06\x00\x03a/b\x00", "QoS 3"),
        (b"\x30\x02\x00\x00", "ends inside"),
        (b"\x30\x03\x00\x00\x00", "without a topic"),
        (b"\x30\x05\x00\x09a/b", "ends inside its topic"),
        (b"\x30\x04\x00\x01t\x05", "ends inside its properties"),
        (b"\x30\x04\x00\x01\xff\x00", "not UTF-8"),
        (b"\x30\xff\xff\xff\xff\x01", "more than four bytes"),
        (with_properties(b"\x23\x00\x01"), "0x23 is not allowed"),  # a Topic Alias
        (with_properties(b"\x03\x00\x01a\x03\x00\x01b"), "repeated"),
        (with_properties(b"\x03\x00\x09a"), "inside a field"),
        (with_properties(b"\x02\x00\x00"), "inside a number"),
        (with_properties(b"\x03\x00"), "two bytes"),
        (with_properties(b"\x0b\x80"), "inside a length"),
    ],
)
def test_malformed_packet_raises_wire_error(data: bytes, problem: str) -> None:
    with pytest.raises(WireError, match=problem) as caught:
        parse_publish_header(memoryview(data))
    assert caught.value.code == "BadPacket"


def test_enormous_properties_are_to_be_skipped() -> None:
    remaining = encode_varint(MAX_REMAINING_BYTES)
    header = parse_publish_header(
        memoryview(b"\x32" + remaining + b"\x00\x01t\x00\x07" + encode_varint(MAX_HEADER_BYTES))
    )
    assert header is not None
    assert (header.topic, header.qos, header.packet_id, header.properties) == ("", 1, 7, Properties())
    assert header.header_bytes + header.payload_bytes == 1 + len(remaining) + MAX_REMAINING_BYTES


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b"])
def test_invalid_publish_topic_raises_wire_error(topic: str) -> None:
    with pytest.raises(WireError, match="not a topic to publish to"):
        encode_publish_header(topic, Properties(), 0)


@pytest.mark.parametrize(
    ("topic", "properties", "payload_bytes", "limit", "actual"),
    [
        ("t", Properties(correlation_data=bytes(65_536)), 0, 65_535, 65_536),
        ("t" * 65_536, Properties(), 0, 65_535, 65_536),
        ("t", Properties(), MAX_REMAINING_BYTES, MAX_REMAINING_BYTES, MAX_REMAINING_BYTES + 4),
    ],
)
def test_over_the_limits_of_mqtt_raises_too_large(
    topic: str, properties: Properties, payload_bytes: int, limit: int, actual: int
) -> None:
    with pytest.raises(TooLarge) as caught:
        encode_publish_header(topic, properties, payload_bytes)
    assert caught.value.fields == {"limit_bytes": limit, "actual_bytes": actual}
