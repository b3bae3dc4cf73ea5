"""CONNACK properties as limits of the broker."""

from __future__ import annotations

from types import SimpleNamespace

from brokers.mqtt.connection import parse_limits
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.transport import BrokerLimits


def test_absent_limits_have_the_defaults_of_mqtt() -> None:
    assert parse_limits(None) == BrokerLimits(MAX_REMAINING_BYTES)


def test_announced_limits_are_parsed() -> None:
    properties = SimpleNamespace(
        MaximumPacketSize=4096, MaximumQoS=1, RetainAvailable=0, SharedSubscriptionAvailable=0, ServerKeepAlive=3
    )
    expected = BrokerLimits(4096, 65_535, 1, retain_available=False, shared_available=False, keepalive_s=3)
    assert parse_limits(properties) == expected
