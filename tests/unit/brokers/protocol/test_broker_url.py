"""Broker addresses: parsing, and passwords that are never shown."""

from __future__ import annotations

import pytest

from brokers.errors import UsageError
from brokers.mqtt.client import MqttTransport
from brokers.protocol.broker_url import BrokerAddress, parse_address
from tests.support.errors import raises_error


@pytest.mark.parametrize(
    ("text", "expected", "shown"),
    [
        ("mqtt://fog.example", BrokerAddress("mqtt", "fog.example", 1883), "mqtt://fog.example:1883"),
        ("mqtts://fog.example", BrokerAddress("mqtts", "fog.example", 8883), "mqtts://fog.example:8883"),
        ("mqtt://[::1]:2", BrokerAddress("mqtt", "::1", 2), "mqtt://[::1]:2"),
        ("mqtt://ann:s%40crt@h:9", BrokerAddress("mqtt", "h", 9, "ann", "s@crt"), "mqtt://ann@h:9"),
        ("mqtt+unix:///run/b.sock", BrokerAddress("mqtt+unix", "/run/b.sock"), "mqtt+unix:///run/b.sock"),
    ],
)
def test_address_is_parsed_and_shown_without_password(text: str, expected: BrokerAddress, shown: str) -> None:
    assert parse_address(text) == expected
    assert str(expected) == shown


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost",
        "localhost:1883",
        "http://host",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://host:0",
        "mqtt://host:99999",
        "mqtt://host:port",
        "mqtt://host/topic",
        "mqtt://host?x=1",
        "mqtt://user:secret@host:port",
        "mqtt://user:se/cret@host:1",
        "mqtt://user:1/secret@host",
        "user:secret@host:1883",
        "mqtt+unix://host/path",
        "mqtt+unix:///",
        "mqtt://[::1",
        "mqtt://broker..local",
        "mqtt://.local",
        f"mqtt://{'a' * 64}.local",
        "mqtt://ho st",
        "mqtt://ho\0st",
        "mqtt://ho\udcffst",
        "mqtt+unix:///run/%00",
        "mqtt://user:secret@ho\u2100st",
    ],
)
def test_invalid_address_raises_one_line_without_password(text: str) -> None:
    with raises_error(UsageError, "BadAddress") as caught:
        parse_address(text)
    line = str(caught.value)
    assert "\n" not in line
    assert "expected mqtt://[user[:password]@]host[:port]" in line
    assert "cret" not in line


def test_password_is_not_in_repr_or_address() -> None:
    transport = MqttTransport("mqtt://ann:secret@host")
    assert "secret" not in f"{transport!r} {transport.address} {parse_address('mqtt://ann:secret@host')!r}"
