"""Parser of captured MQTT 5 packets, written from the standard, without the code of Sparse."""

from __future__ import annotations

from dataclasses import dataclass, field

PUBLISH = 3
# The properties of PUBLISH by identifier (section 2.2.2.2): bytes of integers, names of strings and binary data.
_FIXED = {0x01: 1, 0x02: 4, 0x23: 2}
_TEXT = {0x03: "content type", 0x08: "response topic", 0x09: "correlation"}
_PAIR, _VARIABLE = 0x26, 0x0B


@dataclass(frozen=True)
class CapturedPublish:
    """A PUBLISH packet: its topic, its properties by name, and its size."""

    topic: str
    properties: dict[str, bytes]
    payload_bytes: int
    packet_bytes: int

    @property
    def dedup_key(self) -> tuple[bytes, ...]:
        """A key that identifies a message about a request."""
        names = ("correlation", "kind", "attempt", "verb", "chunk")
        return (self.topic.encode(), *(self.properties.get(name, b"") for name in names))


@dataclass
class PacketCapture:
    """The packets in one direction of a connection."""

    publishes: list[CapturedPublish] = field(default_factory=list)
    non_publish_bytes: int = 0
    _buffer: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        self._buffer += data
        while (length := _packet_length(self._buffer)) is not None:
            packet = bytes(self._buffer[:length])
            del self._buffer[:length]
            if packet[0] >> 4 == PUBLISH:
                self.publishes.append(_publish(packet))
            else:
                self.non_publish_bytes += length

    @property
    def total_bytes(self) -> int:
        return sum(each.packet_bytes for each in self.publishes) + self.non_publish_bytes


def _packet_length(data: bytearray) -> int | None:
    """The length of the first packet; None while it is incomplete."""
    number, at = _variable(data, 1)
    return at + number if number >= 0 and len(data) >= at + number else None


def _variable(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """A Variable Byte Integer and its end; -1 while it is incomplete."""
    number, shift = 0, 0
    while at < len(data):
        number |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            return number, at
    return -1, at


def _read_string(packet: bytes, at: int) -> tuple[bytes, int]:
    end = at + 2 + int.from_bytes(packet[at : at + 2])
    return packet[at + 2 : end], end


def _publish(packet: bytes) -> CapturedPublish:
    _, at = _variable(packet, 1)
    topic, at = _read_string(packet, at)
    if packet[0] & 0x06:  # at QoS 0 there is no packet identifier
        at += 2
    length, at = _variable(packet, at)
    end, properties = at + length, dict[str, bytes]()
    while at < end:
        kind, at = packet[at], at + 1
        if kind in _FIXED:
            at += _FIXED[kind]
        elif kind in _TEXT:
            properties[_TEXT[kind]], at = _read_string(packet, at)
        elif kind == _VARIABLE:
            _, at = _variable(packet, at)
        else:
            assert kind == _PAIR, f"property {kind:#x} is not allowed in PUBLISH"
            name, at = _read_string(packet, at)
            properties[name.decode()], at = _read_string(packet, at)
    return CapturedPublish(topic.decode(), properties, len(packet) - end, len(packet))
