"""MQTT packets over a non-blocking socket, without copies of payloads in either direction.

Outgoing: the caller's buffers are queued as memoryviews and sent by scatter-gather. Incoming: only headers are
buffered; a payload is received directly into its destination. Neither class uses an event loop: `socket_loop.py` calls
them when the socket is ready.
"""

import socket
import ssl
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

from brokers.errors import TooLarge
from brokers.mqtt.publish_packet import (
    MAX_HEADER_BYTES,
    PUBLISH,
    PublishHeader,
    bad_packet,
    parse_publish_header,
    parse_varint,
)
from brokers.process.aligned_memory import allocate_aligned

# Bytes that arrive together with a header are copied once: small enough to cost nothing, large enough for one read.
HEADER_BUFFER_BYTES = 16 << 10
MAX_SENDMSG_BUFFERS = 64  # buffers in one sendmsg; Linux allows 1024 (IOV_MAX)
SMALL_PAYLOAD_BYTES = 64 << 10  # below this a bytearray is faster than aligned memory

WOULD_BLOCK_ERRORS = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class PacketHandler(Protocol):
    """Receiver of the packets that a `PacketReader` reads."""

    def get_buffer(self, header: PublishHeader) -> memoryview | None:
        """Return the buffer for the payload of this PUBLISH, None for a new one."""

    def on_publish(self, header: PublishHeader, payload: memoryview) -> None:
        """Handle a PUBLISH. One that was skipped has no topic and no payload, and needs its acknowledgement."""

    def on_packet(self, data: bytes) -> None:
        """Handle a packet of any other type."""


class PacketWriter:
    """Queue of outgoing bytes, as views of the caller's buffers; counts the bytes accepted and sent so far."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._pieces: deque[memoryview] = deque()
        self.accepted_bytes = 0
        self.sent_bytes = 0

    def push(self, pieces: Sequence[memoryview]) -> int:
        """Queue one packet; return the value of `sent_bytes` at which it has been sent."""
        for piece in pieces:
            if piece.nbytes:
                self._pieces.append(piece)
                self.accepted_bytes += piece.nbytes
        return self.accepted_bytes

    def flush(self) -> bool:
        """Send until the queue is empty (True) or the socket is full (False); raise OSError if the connection broke."""
        scatter_gather = not isinstance(self._sock, ssl.SSLSocket)  # TLS has none
        while self._pieces:
            try:
                if scatter_gather:
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
    """Splits the bytes of a socket into packets and passes them to a handler; payloads are received in place."""

    def __init__(self, sock: socket.socket, handler: PacketHandler, max_packet_bytes: int) -> None:
        self._sock = sock
        self._handler = handler
        self._max_packet_bytes = max_packet_bytes
        self._scatter_gather = not isinstance(sock, ssl.SSLSocket)
        self._buffer = memoryview(bytearray(HEADER_BUFFER_BYTES))
        self._start = 0  # unparsed bytes are buffer[start:end]
        self._end = 0
        self._header: PublishHeader | None = None  # set while its payload is incomplete
        self._payload = memoryview(b"")
        self._filled = 0
        self.received_bytes = 0

    def read(self, budget_bytes: int) -> bool:
        """Read and handle packets; return whether it stopped because the budget was used up.

        Raises OSError when the connection is broken or closed, `WireError` for bytes after which it cannot continue.
        """
        while budget_bytes > 0:
            try:
                count, capacity = self._receive()
            except WOULD_BLOCK_ERRORS:
                return False
            if not count:
                raise ConnectionResetError("the broker closed the connection")
            self.received_bytes += count
            budget_bytes -= count
            self._parse()
            if self._scatter_gather and count < capacity:  # the socket is empty: save the call that would say so
                return False
        return True

    def _receive(self) -> tuple[int, int]:
        """Receive once; return how many bytes arrived and how many had space."""
        if self._header is None:
            if self._start:
                rest = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(rest)] = rest
                self._start = 0
                self._end = len(rest)
            space = self._buffer[self._end :]
            count = self._sock.recv_into(space)
            self._end += count
            return count, space.nbytes
        missing = self._payload[self._filled :]
        if not self._scatter_gather:
            count = self._sock.recv_into(missing)
            self._filled += count
            return count, missing.nbytes
        # The buffer is empty here, so the same call can receive the header of the next packet.
        count = self._sock.recvmsg_into([missing, self._buffer])[0]
        of_payload = min(count, missing.nbytes)
        self._filled += of_payload
        self._start = 0
        self._end = count - of_payload
        return count, missing.nbytes + self._buffer.nbytes

    def _parse(self) -> None:
        while True:
            if self._header is not None:
                if self._filled < self._header.payload_bytes:
                    return
                header = self._header
                payload = self._payload if header.topic else memoryview(b"")
                self._header = None
                self._payload = memoryview(b"")
                self._handler.on_publish(header, payload)
            elif self._start == self._end:
                self._start = self._end = 0
                return
            elif not (self._start_publish() if self._buffer[self._start] & 0xF0 == PUBLISH else self._parse_packet()):
                self._grow_if_full()
                return

    def _start_publish(self) -> bool:
        """Parse the header of a PUBLISH; return False while it is incomplete."""
        header = parse_publish_header(self._buffer[self._start : self._end])
        if header is None:
            return False
        self._check_size(header.header_bytes + header.payload_bytes)
        self._start += header.header_bytes
        self._header = header
        self._payload = self._allocate(header)
        self._filled = min(header.payload_bytes, self._end - self._start)
        self._payload[: self._filled] = self._buffer[self._start : self._start + self._filled]
        self._start += self._filled
        return True

    def _allocate(self, header: PublishHeader) -> memoryview:
        buffer = self._handler.get_buffer(header) if header.topic and header.payload_bytes else None
        if buffer is not None:
            return buffer
        if header.payload_bytes < SMALL_PAYLOAD_BYTES:
            return memoryview(bytearray(header.payload_bytes))
        return allocate_aligned(header.payload_bytes)

    def _parse_packet(self) -> bool:
        """Parse a packet of another type than PUBLISH; return False while it is incomplete."""
        length = parse_varint(self._buffer[self._start : self._end], 1)
        if length is None:
            return False
        total = sum(length)
        self._check_size(total)
        if total > MAX_HEADER_BYTES:
            raise bad_packet(f"a packet of type {self._buffer[self._start] >> 4} with {total} bytes")
        if self._end - self._start < total:
            return False
        data = bytes(self._buffer[self._start : self._start + total])
        self._start += total
        self._handler.on_packet(data)
        return True

    def _check_size(self, packet_bytes: int) -> None:
        if packet_bytes > self._max_packet_bytes:
            raise TooLarge("a packet from the broker", self._max_packet_bytes, packet_bytes)

    def _grow_if_full(self) -> None:
        """Double the buffer when one header fills it; headers are bounded, so the buffer is too."""
        if self._end - self._start == self._buffer.nbytes:
            larger = memoryview(bytearray(2 * self._buffer.nbytes))
            larger[: self._buffer.nbytes] = self._buffer
            self._buffer = larger
