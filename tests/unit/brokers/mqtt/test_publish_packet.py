"""The head of a PUBLISH: to bytes and back, by the specification's own examples, cut at every byte, and hostile."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import TooLarge
from brokers.mqtt.publish_packet import (
    MAX_HEADER_BYTES,
    MAX_REMAINING_BYTES,
    BadPacket,
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
FULL = Properties("c/t", b"\x00\x01", "back", 7, (("k", "v"), ("k", "")))


@given(TOPIC, PROPERTIES, st.integers(0, 2**27), st.sampled_from([0, 1]), st.booleans(), st.integers(1, 65_535))
def test_what_is_encoded_is_parsed_again(
    topic: str, properties: Properties, payload_bytes: int, qos: int, retain: bool, packet_id: int
) -> None:
    packet_id = packet_id if qos else 0
    data = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=packet_id)
    expected = PublishHeader(topic, properties, len(data), payload_bytes, qos, retain, packet_id)
    assert parse_publish_header(memoryview(data)) == expected
    assert parse_publish_header(memoryview(data + b"payload")) == expected


@given(TOPIC, PROPERTIES, st.integers(0, 300), st.sampled_from([0, 1]))
def test_a_head_that_is_cut_anywhere_asks_for_more(
    topic: str, properties: Properties, payload_bytes: int, qos: int
) -> None:
    data = encode_publish_header(topic, properties, payload_bytes, qos=qos, packet_id=1)
    for length in range(1, len(data)):
        assert parse_publish_header(memoryview(data)[:length]) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_or_refused(data: bytes) -> None:
    try:
        head = parse_publish_header(memoryview(b"\x30" + data))
    except BadPacket:
        return
    assert head is None or head.header_bytes <= len(data) + 1


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_head_with_one_wrong_byte_is_parsed_or_refused(at: int, value: int) -> None:
    data = bytearray(encode_publish_header("sparse/local/p/s/in/w", FULL, 100, qos=1, packet_id=9))
    data[1 + at % (len(data) - 1)] = value
    with contextlib.suppress(BadPacket):  # and nothing else
        parse_publish_header(memoryview(data))


def test_the_bytes_are_those_of_the_specification() -> None:
    # Section 3.3: type and flags, remaining length, topic, packet identifier, properties in their order, then the
    # payload.
    assert encode_publish_header("a/b", Properties(), 0) == b"\x30\x06\x00\x03a/b\x00"
    assert (
        encode_publish_header("a/b", Properties(), 2, qos=1, retain=True, packet_id=10)
        == b"\x33\x0a\x00\x03a/b\x00\x0a\x00"
    )
    expected = (
        b"\x30\x28\x00\x01t\x24"
        b"\x02\x00\x00\x00\x07"
        b"\x03\x00\x03c/t"
        b"\x08\x00\x04back"
        b"\x09\x00\x02\x00\x01"
        b"\x26\x00\x01k\x00\x01v"
        b"\x26\x00\x01k\x00\x00"
    )
    assert encode_publish_header("t", FULL, 0) == expected


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
def test_lengths_are_those_of_table_1_1(number: int, data: bytes) -> None:
    assert encode_varint(number) == data
    assert parse_varint(memoryview(data), 0) == (number, len(data))


def test_what_other_clients_add_is_read_over() -> None:
    # A Payload Format Indicator, and two Subscription Identifiers of one and two bytes.
    properties = b"\x01\x01\x0b\x05\x0b\x80\x01\x03\x00\x01c"
    data = bytes((0x30, 4 + len(properties))) + b"\x00\x01t" + bytes((len(properties),)) + properties
    head = parse_publish_header(memoryview(data))
    assert head is not None
    assert head.properties == Properties(content_type="c")


def _with_properties(properties: bytes) -> bytes:
    return bytes((0x30, 4 + len(properties))) + b"\x00\x01t" + bytes((len(properties),)) + properties


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
        (_with_properties(b"\x23\x00\x01"), "0x23 does not belong"),  # a Topic Alias, which we never allowed
        (_with_properties(b"\x03\x00\x01a\x03\x00\x01b"), "twice"),
        (_with_properties(b"\x03\x00\x09a"), "inside a field"),
        (_with_properties(b"\x02\x00\x00"), "inside a number"),
        (_with_properties(b"\x03\x00"), "two bytes"),
        (_with_properties(b"\x0b\x80"), "inside a length"),
    ],
)
def test_what_breaks_the_protocol_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(BadPacket, match=problem):
        parse_publish_header(memoryview(data))


def test_gigantic_properties_are_to_be_read_over_before_they_have_come() -> None:
    remaining = encode_varint(MAX_REMAINING_BYTES)
    data = b"\x32" + remaining + b"\x00\x01t\x00\x07" + encode_varint(MAX_HEADER_BYTES)
    head = parse_publish_header(memoryview(data))
    assert head is not None
    assert (head.topic, head.qos, head.packet_id, head.properties) == ("", 1, 7, Properties())
    assert head.header_bytes + head.payload_bytes == 1 + len(remaining) + MAX_REMAINING_BYTES


@pytest.mark.parametrize("topic", ["", "a/+", "#", "a\0b"])
def test_a_topic_that_cannot_be_published_to_is_refused(topic: str) -> None:
    with pytest.raises(BadPacket, match="not a topic to publish to"):
        encode_publish_header(topic, Properties(), 0)


def test_what_is_over_the_limits_of_mqtt_is_refused() -> None:
    with pytest.raises(TooLarge, match="65536"):
        encode_publish_header("t", Properties(correlation_data=bytes(65_536)), 0)
    with pytest.raises(TooLarge, match="65536"):
        encode_publish_header("t" * 65_536, Properties(), 0)
    with pytest.raises(TooLarge, match=str(MAX_REMAINING_BYTES)):
        encode_publish_header("t", Properties(), MAX_REMAINING_BYTES)
