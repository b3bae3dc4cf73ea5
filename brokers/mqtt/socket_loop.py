"""A connected socket on the asyncio loop: sends and receives packets, and detects the end of the connection."""

import asyncio
import contextlib
import fcntl
import socket
import ssl
import sys
import termios
from collections import deque
from collections.abc import Sequence

from brokers.errors import WireError
from brokers.mqtt.packet_io import PacketHandler, PacketReader, PacketWriter

READ_BUDGET_BYTES = 4 << 20  # per wake-up; then the other tasks of the loop run
# Bytes that may be queued when another packet is added: about one chunk. Senders wait for that before they add theirs,
# so a publication that is cancelled on a slow link (its deadline passed) has usually queued nothing.
QUEUE_LIMIT_BYTES = 512 << 10
TICK_S = 1.0
PING_AFTER_TICKS = 2  # quiet ticks before a PINGREQ
DEAD_AFTER_TICKS = 6  # quiet ticks before the connection is closed; ticks, because a blocked loop misses none of them

_PINGREQ = memoryview(b"\xc0\x00")


class ConnectionLost(Exception):
    """The connection ended while a call waited on it; the text says why. `MqttTransport` reconnects."""


class PacketSocket:
    """Moves packets between a socket and a handler until the connection ends; `lost` is then done, with the reason."""

    def __init__(self, sock: socket.socket, handler: PacketHandler, max_packet_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._descriptor = sock.fileno()
        self._writer = PacketWriter(sock)
        self._reader = PacketReader(sock, handler, max_packet_bytes)
        self._writing = False  # whether the loop waits for the socket to become writable
        self._paused = False
        self._send_lock = asyncio.Lock()  # fair: senders queue in order of arrival
        self._send_waiters: deque[tuple[int, asyncio.Future[None]]] = deque()  # (sent bytes to wait for, future)
        self._timer: asyncio.TimerHandle | None = None
        self._quiet_ticks = 0
        self._received_bytes = 0  # at the last tick
        self._acknowledged_bytes = 0
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.error: OSError | WireError | None = None  # what ended the connection, if it was an error

    def start(self) -> None:
        self._loop.add_reader(self._descriptor, self._on_readable)

    def start_keepalive(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)

    def set_reading_paused(self, paused: bool) -> None:
        """Pause or resume reading. While paused, the peer's send buffer fills and the peer has to wait."""
        if self.lost.done() or paused == self._paused:
            return
        self._paused = paused
        if paused:
            self._loop.remove_reader(self._descriptor)
        else:
            self._loop.add_reader(self._descriptor, self._on_readable)
            self._loop.call_soon(self._on_readable)  # bytes that TLS has decrypted do not make the socket readable

    def push(self, pieces: Sequence[memoryview]) -> int:
        """Queue a packet and send as much as the socket accepts; return the argument for `wait_sent`."""
        self.raise_if_lost()
        end = self._writer.push(pieces)
        if not self._writing:
            self._on_writable()
        return end

    async def send(self, pieces: Sequence[memoryview]) -> None:
        """Queue a packet when there is space, and wait until it has been sent; raise `ConnectionLost`."""
        async with self._send_lock:
            while self._writer.accepted_bytes - self._writer.sent_bytes > QUEUE_LIMIT_BYTES:
                await self.wait_sent(self._writer.accepted_bytes - QUEUE_LIMIT_BYTES)
            end = self.push(pieces)
        await self.wait_sent(end)

    async def wait_sent(self, end: int | None = None) -> None:
        """Wait until `end` bytes in all have been sent, by default all that were queued; raise `ConnectionLost`."""
        end = self._writer.accepted_bytes if end is None else end
        if self._writer.sent_bytes < end:
            self.raise_if_lost()
            future: asyncio.Future[None] = self._loop.create_future()
            self._send_waiters.append((end, future))
            await future

    def raise_if_lost(self) -> None:
        if self.lost.done():
            raise ConnectionLost(self.lost.result())

    async def half_close(self, timeout_s: float) -> None:
        """Shut down the sending side, and wait up to `timeout_s` for the broker to close its own.

        Closing a socket with unread bytes resets the connection, and the reset may overtake our last packet.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        await asyncio.wait((self.lost,), timeout=timeout_s)

    def close(self, reason: str) -> None:
        """Close at once; all waiting calls raise `ConnectionLost`."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
        for _, future in self._send_waiters:
            if not future.done():
                future.set_exception(ConnectionLost(reason))
        self._send_waiters.clear()

    def _on_readable(self) -> None:
        if self._paused or self.lost.done():
            return
        try:
            more = self._reader.read(READ_BUDGET_BYTES)
        except (OSError, WireError) as error:
            self._fail(error)
            return
        if more and isinstance(self._socket, ssl.SSLSocket):  # decrypted bytes do not make the socket readable again
            self._loop.call_soon(self._on_readable)

    def _on_writable(self) -> None:
        try:
            empty = self._writer.flush()
        except OSError as error:
            self._fail(self._read_tls_alert() or error)
            return
        while self._send_waiters and self._send_waiters[0][0] <= self._writer.sent_bytes:
            future = self._send_waiters.popleft()[1]
            if not future.done():
                future.set_result(None)
        if empty == self._writing:  # a writer is registered exactly while bytes wait
            self._writing = not empty
            if self._writing:
                self._loop.add_writer(self._descriptor, self._on_writable)
            else:
                self._loop.remove_writer(self._descriptor)

    def _fail(self, error: OSError | WireError) -> None:
        self.error = error
        self.close(str(getattr(error, "strerror", None) or error))

    def _read_tls_alert(self) -> ssl.SSLError | None:
        """Return the alert with which the broker refused our certificate, if it sent one before it closed.

        Under TLS 1.3 our side of the handshake is complete before the broker has verified our certificate.
        """
        if self._reader.received_bytes == 0:
            try:
                self._reader.read(READ_BUDGET_BYTES)
            except ssl.SSLError as error:
                return error
            except (OSError, WireError):
                pass
        return None

    def _tick(self) -> None:
        """Ping a quiet broker; close the connection when it stays quiet.

        Activity is bytes that arrive, and bytes that the peer's kernel acknowledges while more of them wait: on a slow
        uplink a ping is queued behind megabytes. The very last bytes prove nothing, since a kernel acknowledges them
        for a program that hangs. While reading is paused the broker is pinged, but silence does not count.
        """
        self.start_keepalive()
        waiting = self._writer.accepted_bytes - self._writer.sent_bytes + _unacknowledged_bytes(self._socket)
        acknowledged = self._writer.accepted_bytes - waiting
        received = self._reader.received_bytes
        active = received > self._received_bytes or (waiting and acknowledged > self._acknowledged_bytes)
        self._received_bytes = received
        self._acknowledged_bytes = acknowledged
        if active or (self._paused and self._quiet_ticks >= PING_AFTER_TICKS):
            self._quiet_ticks = 0
        else:
            self._quiet_ticks += 1
        if self._quiet_ticks >= DEAD_AFTER_TICKS:
            self.close(f"the broker has been silent for {self._quiet_ticks * TICK_S:g} s")
        elif self._quiet_ticks == PING_AFTER_TICKS:
            self.push((_PINGREQ,))


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """Return how many sent bytes the peer has not acknowledged by TCP; 0 where the kernel cannot tell."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
