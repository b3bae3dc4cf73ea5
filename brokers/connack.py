"""What a broker answers to CONNECT: what it can do, or that it turns us away (MQTT 5.0 section 3.2). Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from brokers.errors import BrokerUnreachable
from brokers.publication import MAX_REMAINING_BYTES
from brokers.transport import Limits

UNSUPPORTED_VERSION, BAD_PASSWORD, NOT_AUTHORIZED = 0x84, 0x86, 0x87  # section 3.2.2.2

# What paho calls a property -> what it is in `Limits`.
_ANNOUNCED: dict[str, tuple[str, Callable[[int], Any]]] = {
    "MaximumPacketSize": ("max_packet_bytes", int),
    "ReceiveMaximum": ("receive_maximum", int),
    "MaximumQoS": ("max_qos", int),
    "RetainAvailable": ("retain", bool),
    "WildcardSubscriptionAvailable": ("wildcards", bool),
    "SharedSubscriptionAvailable": ("shared", bool),
    "SessionExpiryInterval": ("session_expiry_s", int),
    "ServerKeepAlive": ("keepalive_s", int),
}


@dataclass(eq=False)
class TurnedAway(BrokerUnreachable):
    """A broker that heard our CONNECT and refused it; `code` is its reason code."""

    code: int


def limits_of(properties: object) -> Limits:
    """Read the properties of a CONNACK; what is absent is the protocol's own."""
    told = {
        ours: kind(getattr(properties, name)) for name, (ours, kind) in _ANNOUNCED.items() if hasattr(properties, name)
    }
    return Limits(**{"max_packet_bytes": MAX_REMAINING_BYTES, **told})
