"""Packets of MQTT 3.1.1."""

from __future__ import annotations

import pytest

from brokers.doctor.mqtt311 import decode_connack, encode_connect


def test_connect_is_encoded_as_specified() -> None:
    assert encode_connect("ab", None, None) == b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x0a\x00\x02ab"
    assert encode_connect("a", "u", "p") == b"\x10\x13\x00\x04MQTT\x04\xc2\x00\x0a\x00\x01a\x00\x01u\x00\x01p"
    assert encode_connect("a", "u", None)[9] == 0x82


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"\x20\x02\x00\x00", 0), (b"\x20\x02\x01\x05", 5), (b"\x20\x03\x00\x00", None), (b"HTTP", None), (b"", None)],
)
def test_only_connack_of_this_version_is_decoded(data: bytes, code: int | None) -> None:
    assert decode_connack(data) == code
