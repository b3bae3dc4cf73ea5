"""Packets over a real socket pair: any cut of the bytes gives the same packets, and payloads stay in place."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest

from brokers.errors import TooLarge
from brokers.mqtt.packet_io import HEADER_BUFFER_BYTES, PacketReader, PacketWriter
from brokers.mqtt.publish_packet import MAX_HEADER_BYTES, BadPacket, PublishHeader, encode_publish_header
from brokers.protocol.transport import Properties


class Kept:
    """A sink that keeps everything."""

    def __init__(self, place: memoryview | None = None) -> None:
        self.publications: list[tuple[str, bytes]] = []
        self.packets: list[bytes] = []
        self._place = place

    def get_buffer(self, head: PublishHeader) -> memoryview | None:
        return None if self._place is None else self._place[: head.payload_bytes]

    def on_publish(self, head: PublishHeader, payload: memoryview) -> None:
        self.publications.append((head.topic, bytes(payload)))

    def on_packet(self, data: bytes) -> None:
        self.packets.append(data)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def publish(topic: str, payload: bytes, properties: Properties = Properties()) -> bytes:
    return encode_publish_header(topic, properties, len(payload)) + payload


def mixture() -> tuple[bytes, list[tuple[str, bytes]], list[bytes]]:
    """Publications of sizes around every boundary, with other packets among them."""
    chance = random.Random(1)
    sizes = [
        0,
        1,
        5,
        127,
        128,
        HEADER_BUFFER_BYTES - 9,
        HEADER_BUFFER_BYTES,
        HEADER_BUFFER_BYTES + 1,
        70_000,
        3,
        0,
        200_000,
    ]
    publications = [(f"t/{number}", chance.randbytes(size)) for number, size in enumerate(sizes)]
    puback, pong = b"\x40\x02\x80\x01", b"\xd0\x00"
    data = b"".join(publish(*each) + (puback if number % 3 else pong) for number, each in enumerate(publications))
    return data, publications, [puback if number % 3 else pong for number in range(len(sizes))]


@pytest.mark.parametrize("step", [1, 2, 7, 1000, HEADER_BUFFER_BYTES, 1 << 20])
def test_any_cut_of_the_bytes_gives_the_same_packets(pair: tuple[socket.socket, socket.socket], step: int) -> None:
    ours, theirs = pair
    data, publications, packets = mixture()
    if step < 1000:  # one call a byte: the small packets are enough
        end = data.index(publications[5][1][:50])
        data, publications, packets = data[: end - 30], publications[:4], packets[:4]
    kept = Kept()
    reader = PacketReader(ours, kept, 1 << 20)
    rest = memoryview(data)
    while rest:
        rest = rest[theirs.send(rest[:step]) :]
        reader.read(1 << 20)
    assert kept.publications[: len(publications)] == publications
    assert kept.packets[: len(packets)] == packets


def test_a_budget_ends_a_turn_and_the_next_one_goes_on(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    kept = Kept()
    reader = PacketReader(ours, kept, 1 << 20)
    theirs.send(publish("a", bytes(100_000)))
    assert reader.read(1000)
    assert kept.publications == []
    while reader.read(1000):
        pass
    assert [len(payload) for _, payload in kept.publications] == [100_000]


def test_a_payload_lands_in_its_place(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    place = memoryview(bytearray(100_000))
    kept = Kept(place)
    reader = PacketReader(ours, kept, 1 << 20)
    rest = memoryview(publish("a", b"z" * 99_999))
    while rest:
        rest = rest[theirs.send(rest) :]
        reader.read(1 << 20)
    assert bytes(place) == b"z" * 99_999 + b"\0"


def test_a_head_larger_than_the_buffer_is_read(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    kept = Kept()
    reader = PacketReader(ours, kept, 1 << 20)
    rest = memoryview(publish("a", b"x", Properties(correlation_data=bytes(60_000), content_type="y" * 60_000)) * 2)
    while rest:
        rest = rest[theirs.send(rest) :]
        reader.read(1 << 20)
    assert kept.publications == [("a", b"x")] * 2


def test_a_publication_of_gigantic_properties_is_read_over_and_handed_out_for_its_acknowledgement(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    kept = Kept()
    reader = PacketReader(ours, kept, 1 << 22)
    gigantic = publish("a", b"x" * 100_000, Properties(user_properties=(("a", "b" * 60_000),) * 20))
    assert len(gigantic) > MAX_HEADER_BYTES
    rest = memoryview(publish("a", b"1") + gigantic + publish("a", b"2") + gigantic * 2 + publish("a", b"3"))
    while rest:
        rest = rest[theirs.send(rest[:50_000]) :]
        reader.read(1 << 20)
    assert kept.publications == [("a", b"1"), ("", b""), ("a", b"2"), ("", b""), ("", b""), ("a", b"3")]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\x30\xff\xff\xff\x7f\x00\x01t\x00", TooLarge),  # a claim of 256 MiB where 1 MiB is allowed
        (b"\xd0\xff\xff\x7f", TooLarge),
        (b"\x90" + b"\xff" * 5, BadPacket),
    ],
)
def test_a_claim_beyond_the_limit_ends_the_reading(
    pair: tuple[socket.socket, socket.socket], data: bytes, error: type[Exception]
) -> None:
    ours, theirs = pair
    theirs.send(data)
    with pytest.raises(error):
        PacketReader(ours, Kept(), 1 << 20).read(1 << 20)


def test_a_packet_that_is_no_publication_may_not_be_gigantic(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.send(b"\x90\xff\xff\xff\x01")
    with pytest.raises(BadPacket, match="type 9"):
        PacketReader(ours, Kept(), 8 * MAX_HEADER_BYTES).read(1 << 20)


def test_the_end_of_the_connection_is_an_error(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ConnectionResetError, match="closed the connection"):
        PacketReader(ours, Kept(), 1 << 20).read(1 << 20)


def test_what_is_queued_leaves_in_order_and_is_counted(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    queue = PacketWriter(ours)
    chance = random.Random(2)
    pieces = [chance.randbytes(chance.choice([0, 1, 100, 50_000])) for _ in range(300)]
    end = queue.push([memoryview(piece) for piece in pieces])
    assert end == queue.accepted_bytes == sum(map(len, pieces))
    came = bytearray()
    while not queue.flush():
        assert queue.sent_bytes < end
        came += theirs.recv(1 << 20)
    theirs.setblocking(True)
    while len(came) < end:
        came += theirs.recv(1 << 20)
    assert bytes(came) == b"".join(pieces)
    assert queue.sent_bytes == end
