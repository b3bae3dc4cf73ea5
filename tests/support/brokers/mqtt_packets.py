"""MQTT 5 packets as a wire between two brokers has them: read here by the standard alone, with none of our own code."""

from __future__ import annotations

from dataclasses import dataclass, field

PUBLISH = 3
# Properties of a PUBLISH by identifier (section 2.2.2.2), and how each is laid out.
_FIXED = {0x01: 1, 0x02: 4, 0x23: 2}
_TEXT = {0x03: "content type", 0x08: "response topic", 0x09: "correlation"}
_PAIR, _VARIABLE = 0x26, 0x0B


@dataclass(frozen=True)
class CapturedPublish:
    """One PUBLISH: its topic, its properties by name, and how large it is."""

    topic: str
    properties: dict[str, bytes]
    payload_bytes: int
    packet_bytes: int

    @property
    def dedup_key(self) -> tuple[bytes, ...]:
        """What no two messages about requests share."""
        names = ("correlation", "kind", "attempt", "verb", "chunk")
        return (self.topic.encode(), *(self.properties.get(name, b"") for name in names))


@dataclass
class PacketCapture:
    """One direction of one connection, as its bytes come."""

    publishes: list[CapturedPublish] = field(default_factory=list)
    non_publish_bytes: int = 0
    _rest: bytearray = field(default_factory=bytearray)

    def feed(self, piece: bytes) -> None:
        self._rest += piece
        while (length := _whole(self._rest)) is not None:
            packet = bytes(self._rest[:length])
            del self._rest[:length]
            if packet[0] >> 4 == PUBLISH:
                self.publishes.append(_publish(packet))
            else:
                self.non_publish_bytes += length

    @property
    def total_bytes(self) -> int:
        return sum(each.packet_bytes for each in self.publishes) + self.non_publish_bytes


def _whole(data: bytearray) -> int | None:
    """The length of the first packet; None while it is not all there."""
    number, at = _variable(data, 1)
    return at + number if number >= 0 and len(data) >= at + number else None


def _variable(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """A Variable Byte Integer and where it ends; -1 while it is not all there."""
    number, shift = 0, 0
    while at < len(data):
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return number, at
    return -1, at


def _counted(packet: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + int.from_bytes(packet[at : at + 2])
    return packet[at + 2 : end], end


def _publish(packet: bytes) -> CapturedPublish:
    _, at = _variable(packet, 1)
    topic, at = _counted(packet, at)
    if packet[0] & 0x06:  # at QoS 0 there is no packet identifier
        at += 2
    length, at = _variable(packet, at)
    end, properties = at + length, dict[str, bytes]()
    while at < end:
        kind, at = packet[at], at + 1
        if kind in _FIXED:
            at += _FIXED[kind]
        elif kind in _TEXT:
            properties[_TEXT[kind]], at = _counted(packet, at)
        elif kind == _VARIABLE:
            _, at = _variable(packet, at)
        else:
            assert kind == _PAIR, f"property {kind:#x} is not one of a PUBLISH"
            name, at = _counted(packet, at)
            properties[name.decode()], at = _counted(packet, at)
    return CapturedPublish(topic.decode(), properties, len(packet) - end, len(packet))
