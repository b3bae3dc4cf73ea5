"""Packets over a socket pair: any split of the bytes yields the same packets, and payloads are received in place."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from brokers.errors import TooLarge, WireError
from brokers.mqtt.packet_io import HEADER_BUFFER_BYTES, PacketReader, PacketWriter
from brokers.mqtt.publish_packet import MAX_HEADER_BYTES, PublishHeader, encode_publish_header
from brokers.protocol.transport import Properties

LIMIT_BYTES = 1 << 20
SocketPair = tuple[socket.socket, socket.socket]


class RecordingHandler:
    """Keeps all packets; payloads go to the beginning of `buffer`, if there is one."""

    def __init__(self, buffer: memoryview | None = None) -> None:
        self.publications: list[tuple[str, bytes]] = []
        self.packets: list[bytes] = []
        self._buffer = buffer

    def get_buffer(self, header: PublishHeader) -> memoryview | None:
        return None if self._buffer is None else self._buffer[: header.payload_bytes]

    def on_publish(self, header: PublishHeader, payload: memoryview) -> None:
        self.publications.append((header.topic, bytes(payload)))

    def on_packet(self, data: bytes) -> None:
        self.packets.append(data)


@pytest.fixture
def pair() -> Iterator[SocketPair]:
    """The reader's socket and the peer's, both non-blocking."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    peer.setblocking(False)
    yield ours, peer
    ours.close()
    peer.close()


def publish(topic: str, payload: bytes, properties: Properties = Properties()) -> bytes:
    return encode_publish_header(topic, properties, len(payload)) + payload


def read_all(pair: SocketPair, handler: RecordingHandler, data: bytes, *, step: int = 50_000) -> None:
    """Send `data` in pieces of at most `step` bytes, and read after each."""
    ours, peer = pair
    reader = PacketReader(ours, handler, 4 * LIMIT_BYTES)
    rest = memoryview(data)
    while rest:
        rest = rest[peer.send(rest[:step]) :]
        reader.read(LIMIT_BYTES)


def mixed_packets(*sizes: int) -> tuple[bytes, list[tuple[str, bytes]], list[bytes]]:
    """Publications of these sizes, with other packets between them."""
    rng = random.Random(1)
    publications = [(f"t/{number}", rng.randbytes(size)) for number, size in enumerate(sizes)]
    others = [b"\x40\x02\x80\x01" if number % 3 else b"\xd0\x00" for number in range(len(sizes))]
    return (
        b"".join(publish(*each) + other for each, other in zip(publications, others, strict=True)),
        publications,
        others,
    )


@pytest.mark.parametrize("step", [1, 2, 7])
def test_small_packets_survive_any_split(pair: SocketPair, step: int) -> None:
    data, publications, others = mixed_packets(0, 1, 5, 127, 128, 3)
    handler = RecordingHandler()
    read_all(pair, handler, data, step=step)
    assert (handler.publications, handler.packets) == (publications, others)


@pytest.mark.parametrize("step", [1000, HEADER_BUFFER_BYTES, 1 << 20])
def test_packets_around_the_buffer_size_survive_any_split(pair: SocketPair, step: int) -> None:
    near = [HEADER_BUFFER_BYTES + difference for difference in (-9, 0, 1)]
    data, publications, others = mixed_packets(0, 128, *near, 70_000, 3, 0, 200_000)
    handler = RecordingHandler()
    read_all(pair, handler, data, step=step)
    assert (handler.publications, handler.packets) == (publications, others)


def test_read_stops_at_its_budget_and_continues(pair: SocketPair) -> None:
    ours, peer = pair
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    handler = RecordingHandler()
    reader = PacketReader(ours, handler, LIMIT_BYTES)
    peer.send(publish("a", bytes(100_000)))
    assert reader.read(1000)
    assert handler.publications == []
    while reader.read(1000):
        pass
    assert [len(payload) for _, payload in handler.publications] == [100_000]


def test_payload_is_received_in_the_given_buffer(pair: SocketPair) -> None:
    buffer = memoryview(bytearray(100_000))
    read_all(pair, RecordingHandler(buffer), publish("a", b"z" * 99_999))
    assert bytes(buffer) == b"z" * 99_999 + b"\0"


def test_header_larger_than_the_buffer_is_read(pair: SocketPair) -> None:
    handler = RecordingHandler()
    properties = Properties(correlation_data=bytes(60_000), content_type="y" * 60_000)
    read_all(pair, handler, publish("a", b"x", properties) * 2)
    assert handler.publications == [("a", b"x")] * 2


def test_publication_with_enormous_properties_is_skipped(pair: SocketPair) -> None:
    """It is passed on without topic and payload, because it needs an acknowledgement."""
    handler = RecordingHandler()
    enormous = publish("a", b"x" * 100_000, Properties(user_properties=(("a", "b" * 60_000),) * 20))
    assert len(enormous) > MAX_HEADER_BYTES
    read_all(pair, handler, publish("a", b"1") + enormous + publish("a", b"2") + enormous * 2 + publish("a", b"3"))
    assert handler.publications == [("a", b"1"), ("", b""), ("a", b"2"), ("", b""), ("", b""), ("a", b"3")]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x30\xff\xff\xff\x7f\x00\x01t\x00", "TooLarge"),  # announces 256 MiB
        (b"\xd0\xff\xff\x7f", "TooLarge"),
        (b"\x90" + b"\xff" * 5, "BadPacket"),
    ],
)
def test_announced_length_over_the_limit_is_refused(pair: SocketPair, data: bytes, code: str) -> None:
    ours, peer = pair
    peer.send(data)
    with pytest.raises(WireError) as caught:
        PacketReader(ours, RecordingHandler(), LIMIT_BYTES).read(LIMIT_BYTES)
    assert caught.value.code == code
    assert isinstance(caught.value, TooLarge) is (code == "TooLarge")


def test_other_packet_types_cannot_be_enormous(pair: SocketPair) -> None:
    ours, peer = pair
    peer.send(b"\x90\xff\xff\xff\x01")
    with pytest.raises(WireError, match="type 9"):
        PacketReader(ours, RecordingHandler(), 8 * MAX_HEADER_BYTES).read(LIMIT_BYTES)


def test_closed_connection_raises_connection_reset_error(pair: SocketPair) -> None:
    ours, peer = pair
    peer.close()
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        PacketReader(ours, RecordingHandler(), LIMIT_BYTES).read(LIMIT_BYTES)


def test_queued_pieces_are_sent_in_order_and_counted(pair: SocketPair) -> None:
    ours, peer = pair
    writer = PacketWriter(ours)
    rng = random.Random(2)
    pieces = [rng.randbytes(rng.choice([0, 1, 100, 50_000])) for _ in range(300)]
    end = writer.push([memoryview(piece) for piece in pieces])
    assert end == writer.accepted_bytes == sum(map(len, pieces))
    received = bytearray()
    while not writer.flush():
        assert writer.sent_bytes < end
        received += peer.recv(1 << 20)
    peer.setblocking(True)
    while len(received) < end:
        received += peer.recv(1 << 20)
    assert bytes(received) == b"".join(pieces)
    assert writer.sent_bytes == end
