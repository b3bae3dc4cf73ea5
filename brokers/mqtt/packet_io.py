"""MQTT packets over a non-blocking socket without copying payloads, in either direction.

Out: the caller's own buffers wait in a queue as memoryviews and leave by scatter-gather. In: only heads are buffered; a
payload is received into the place where it shall stay. Both know sockets and packets, and no event loop:
`connection.py` calls them when the socket is ready.
"""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import numpy as np

from brokers.errors import TooLarge
from brokers.mqtt.publish_packet import (
    MAX_HEADER_BYTES,
    PUBLISH,
    BadPacket,
    PublishHeader,
    parse_publish_header,
    parse_varint,
)

HEADER_BUFFER_BYTES = (
    16 << 10
)  # what arrives with a head is copied once: small enough to cost nothing, large enough for one read
MAX_SENDMSG_BUFFERS = 64  # buffers in one sendmsg; Linux takes 1024 (IOV_MAX)
SMALL_PAYLOAD_BYTES = 64 << 10  # below this a bytearray is faster than an uninitialised array

WOULD_BLOCK_ERRORS = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class PacketHandler(Protocol):
    """Who gets what a reader finds."""

    def get_buffer(self, head: PublishHeader) -> memoryview | None:
        """Say where the payload of this PUBLISH shall be written; None for a fresh buffer."""
        ...

    def on_publish(self, head: PublishHeader, payload: memoryview) -> None:
        """Take a whole PUBLISH; one that was read over has no topic and no payload, and wants its acknowledgement."""
        ...

    def on_packet(self, data: bytes) -> None:
        """Take a whole packet of any other type."""
        ...


class PacketWriter:
    """Bytes on their way out, in order, as views of the buffers they came in; counts what it took and what has left."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pieces: deque[memoryview] = deque()
        self.accepted_bytes = 0
        self.sent_bytes = 0

    def push(self, pieces: Sequence[memoryview]) -> int:
        """Queue one whole packet; return the count of sent bytes at which it has left."""
        for piece in pieces:
            if piece.nbytes:
                self._pieces.append(piece)
                self.accepted_bytes += piece.nbytes
        return self.accepted_bytes

    def flush(self) -> bool:
        """Send until nothing is left (True) or the socket is full (False); raise OSError for a broken connection."""
        gather = not isinstance(self._sock, ssl.SSLSocket)  # TLS has no scatter-gather
        while self._pieces:
            try:
                if gather:
                    sent = self._sock.sendmsg(islice(self._pieces, MAX_SENDMSG_BUFFERS))
                else:
                    sent = self._sock.send(self._pieces[0])
            except WOULD_BLOCK_ERRORS:
                return False
            self.sent_bytes += sent
            self._drop(sent)
        return True

    def _drop(self, sent: int) -> None:
        while sent:
            first = self._pieces[0]
            if sent < first.nbytes:
                self._pieces[0] = first[sent:]
                return
            sent -= first.nbytes
            self._pieces.popleft()


class PacketReader:
    """Cuts what a socket gives into packets; payloads are received in place."""

    def __init__(self, sock: socket.socket, sink: PacketHandler, max_packet_bytes: int) -> None:
        self._sock = sock
        self._sink = sink
        self._max_packet_bytes = max_packet_bytes
        self._scatter = not isinstance(sock, ssl.SSLSocket)
        self._buffer = memoryview(bytearray(HEADER_BUFFER_BYTES))
        self._start = 0  # what is not yet parsed lies in buffer[start:end]
        self._end = 0
        self._head: PublishHeader | None = None  # set while its payload is on the way
        self._payload = memoryview(b"")
        self._filled = 0
        self._passing: PublishHeader | None = None  # set while a PUBLISH is read over
        self._passing_bytes = 0  # what is still to come of it
        self.received_bytes = 0

    def read(self, budget_bytes: int) -> bool:
        """Read and hand out packets; return whether the budget ended before the bytes did.

        Raises OSError when the connection is broken or closed, `BadPacket` or `TooLarge` when what came cannot be read
        on.
        """
        while budget_bytes > 0:
            try:
                count, room = self._receive()
            except WOULD_BLOCK_ERRORS:
                return False
            if not count:
                raise ConnectionResetError("the broker closed the connection")
            self.received_bytes += count
            budget_bytes -= count
            self._parse()
            if self._scatter and count < room:  # the socket is empty; one more call would only say so
                return False
        return True

    def _receive(self) -> tuple[int, int]:
        """Receive once; return how many bytes came and how many could have."""
        if self._head is None:
            if self._start:
                rest = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            place = self._buffer[self._end :]
            count = self._sock.recv_into(place)
            self._end += count
            return count, place.nbytes
        rest_of_payload = self._payload[self._filled :]
        if not self._scatter:
            count = self._sock.recv_into(rest_of_payload)
            self._filled += count
            return count, rest_of_payload.nbytes
        # The buffer is empty here, so the next packet's head can come in with the same call.
        count = self._sock.recvmsg_into([rest_of_payload, self._buffer])[0]
        taken = min(count, rest_of_payload.nbytes)
        self._filled += taken
        self._start, self._end = 0, count - taken
        return count, rest_of_payload.nbytes + self._buffer.nbytes

    def _parse(self) -> None:
        while True:
            if self._head is not None:
                if self._filled < self._head.payload_bytes:
                    return
                head, payload, self._head, self._payload = self._head, self._payload, None, memoryview(b"")
                self._sink.on_publish(head, payload)
            elif self._passing is not None:
                if not self._pass_over(self._passing):
                    return
            elif self._start == self._end:
                self._start = self._end = 0
                return
            elif not (self._begin_publish() if self._buffer[self._start] & 0xF0 == PUBLISH else self._take_packet()):
                self._make_room()
                return

    def _begin_publish(self) -> bool:
        head = parse_publish_header(self._buffer[self._start : self._end])
        if head is None:
            return False
        self._check_size(head.header_bytes + head.payload_bytes)
        self._start += head.header_bytes
        if not head.topic:
            self._passing, self._passing_bytes = head, head.payload_bytes
            return True
        self._head = head
        self._payload = self._place(head)
        self._filled = min(head.payload_bytes, self._end - self._start)
        self._payload[: self._filled] = self._buffer[self._start : self._start + self._filled]
        self._start += self._filled
        return True

    def _pass_over(self, head: PublishHeader) -> bool:
        """Throw away what came of a PUBLISH that nobody can read; return whether that was all of it."""
        taken = min(self._passing_bytes, self._end - self._start)
        self._start += taken
        self._passing_bytes -= taken
        if self._passing_bytes:
            self._start = self._end = 0
            return False
        self._passing = None
        self._sink.on_publish(head, memoryview(b""))
        return True

    def _place(self, head: PublishHeader) -> memoryview:
        place = self._sink.get_buffer(head) if head.payload_bytes else None
        if place is not None:
            return place
        if head.payload_bytes < SMALL_PAYLOAD_BYTES:
            return memoryview(bytearray(head.payload_bytes))
        return np.empty(head.payload_bytes, np.uint8).data  # not zeroed, and not paid for until bytes come

    def _take_packet(self) -> bool:
        length = parse_varint(self._buffer[self._start : self._end], 1)
        if length is None:
            return False
        total = sum(length)
        self._check_size(total)
        if total > MAX_HEADER_BYTES:
            raise BadPacket(f"a packet of type {self._buffer[self._start] >> 4} with {total} bytes")
        if self._end - self._start < total:
            return False
        data = bytes(self._buffer[self._start : self._start + total])
        self._start += total
        self._sink.on_packet(data)
        return True

    def _check_size(self, packet_bytes: int) -> None:
        if packet_bytes > self._max_packet_bytes:
            raise TooLarge("a packet from the broker", self._max_packet_bytes, packet_bytes)

    def _make_room(self) -> None:
        """Double the buffer when one head fills it; a head is bounded, and so is this."""
        if self._end - self._start == self._buffer.nbytes:
            larger = memoryview(bytearray(2 * self._buffer.nbytes))
            larger[: self._end - self._start] = self._buffer[self._start : self._end]
            self._buffer, self._start, self._end = larger, 0, self._end - self._start
