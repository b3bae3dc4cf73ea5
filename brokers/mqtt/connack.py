"""What a broker announces in its answer to CONNECT (MQTT 5.0 section 3.2). Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.transport import BrokerLimits

# What paho calls a property -> what it is in `BrokerLimits`.
_ANNOUNCED: dict[str, tuple[str, Callable[[int], Any]]] = {
    "MaximumPacketSize": ("max_packet_bytes", int),
    "ReceiveMaximum": ("receive_maximum", int),
    "MaximumQoS": ("max_qos", int),
    "RetainAvailable": ("retain_available", bool),
    "WildcardSubscriptionAvailable": ("wildcards_available", bool),
    "SharedSubscriptionAvailable": ("shared_available", bool),
    "SessionExpiryInterval": ("session_expiry_s", int),
    "ServerKeepAlive": ("keepalive_s", int),
}


def parse_limits(properties: object) -> BrokerLimits:
    """Read the properties of a CONNACK; what is absent is the protocol's own."""
    told = {
        ours: kind(getattr(properties, name)) for name, (ours, kind) in _ANNOUNCED.items() if hasattr(properties, name)
    }
    return BrokerLimits(**{"max_packet_bytes": MAX_REMAINING_BYTES, **told})
