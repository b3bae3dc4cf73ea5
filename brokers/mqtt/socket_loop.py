"""A connected socket on the asyncio loop: packets leave it, packets arrive from it, and its end is noticed."""

from __future__ import annotations

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

READ_BUDGET_BYTES = 4 << 20  # then the loop's other tasks have their turn
# What may wait for the socket when one more packet is queued: a chunk on its way out. Whoever publishes waits for that:
# one who gives up meanwhile (a deadline passed, and the link is slow) has queued nothing that would leave all the same.
QUEUE_LIMIT_BYTES = 512 << 10
TICK_S = 1.0
PING_AFTER_TICKS = 2  # quiet ticks until we ask whether the broker is there
DEAD_AFTER_TICKS = 6  # quiet ticks until it is not; ticks, not seconds: a loop that was blocked blames nobody else

_PINGREQ = memoryview(b"\xc0\x00")


class ConnectionLost(Exception):
    """The connection ended before what was awaited on it; the text says why. `MqttTransport` reconnects."""


class PacketSocket:
    """Moves packets between one socket and one sink until the connection ends; then `lost` is done, with the reason."""

    def __init__(self, sock: socket.socket, sink: PacketHandler, max_packet_bytes: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._descriptor = sock.fileno()
        self._out = PacketWriter(sock)
        self._reader = PacketReader(sock, sink, max_packet_bytes)
        self._writing = False
        self._held = False
        self._turn = asyncio.Lock()  # who came first queues first
        self._leaving: deque[tuple[int, asyncio.Future[None]]] = deque()  # (sent bytes at which it has left, who waits)
        self._watching: asyncio.Task[None] | None = None
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self.error: OSError | WireError | None = None  # what ended it, where that was an error

    def start(self) -> None:
        self._loop.add_reader(self._descriptor, self._on_readable)

    def set_reading_paused(self, paused: bool) -> None:
        """Read nothing from now on, or read on; whoever sends then waits in its turn."""
        if self.lost.done() or paused == self._held:
            return
        self._held = paused
        if paused:
            self._loop.remove_reader(self._descriptor)
        else:
            self._loop.add_reader(self._descriptor, self._on_readable)
            self._loop.call_soon(self._on_readable)  # what TLS has decrypted already makes no socket readable

    def push(self, pieces: Sequence[memoryview]) -> int:
        """Queue one packet, send what the socket takes; return the count of sent bytes at which the packet has left."""
        self.raise_if_lost()
        end = self._out.push(pieces)
        if not self._writing:
            self._on_writable()
        return end

    async def send(self, pieces: Sequence[memoryview]) -> None:
        """Queue one packet when there is room, and return when it has left; raise `ConnectionLost`."""
        async with self._turn:
            while self._out.accepted_bytes - self._out.sent_bytes > QUEUE_LIMIT_BYTES:
                await self.wait_sent(self._out.accepted_bytes - QUEUE_LIMIT_BYTES)
            end = self.push(pieces)
        await self.wait_sent(end)

    async def wait_sent(self, end: int | None = None) -> None:
        """Return when that many bytes have left, by default all that were queued; raise `ConnectionLost`."""
        end = self._out.accepted_bytes if end is None else end
        if self._out.sent_bytes < end:
            self.raise_if_lost()
            future: asyncio.Future[None] = self._loop.create_future()
            self._leaving.append((end, future))
            await future

    def raise_if_lost(self) -> None:
        """Raise `ConnectionLost` when the connection has ended."""
        if self.lost.done():
            raise ConnectionLost(self.lost.result())

    async def half_close(self, timeout_s: float) -> None:
        """Close our side, and wait a little for the broker to close its own.

        Closing a socket with unread bytes resets the connection, and the reset may overtake our last packet.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        await asyncio.wait((self.lost,), timeout=timeout_s)

    def close(self, reason: str) -> None:
        """Close at once; whoever waits gets `ConnectionLost`."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        self._loop.remove_reader(self._descriptor)
        self._loop.remove_writer(self._descriptor)
        self._socket.close()
        for _, future in self._leaving:
            if not future.done():
                future.set_exception(ConnectionLost(reason))
        self._leaving.clear()

    async def stop_watchdog(self) -> None:
        """End the task that watches; the connection must have ended."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait((self._watching,))

    def _on_readable(self) -> None:
        if self._held or self.lost.done():
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
            empty = self._out.flush()
        except OSError as error:
            self._fail(self._last_words() or error)
            return
        while self._leaving and self._leaving[0][0] <= self._out.sent_bytes:
            future = self._leaving.popleft()[1]
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

    def _last_words(self) -> ssl.SSLError | None:
        """Why the broker would not have us, where it said so before it closed; it hears us no more, and is heard.

        Under TLS 1.3 the handshake is over for us before the broker has looked at our certificate.
        """
        if self._reader.received_bytes == 0:
            try:
                self._reader.read(READ_BUDGET_BYTES)
            except ssl.SSLError as error:
                return error
            except (OSError, WireError):
                pass
        return None

    def start_watchdog(self, ping_after_ticks: int, name: str) -> None:
        """Begin to look for signs of life."""
        self._watching = asyncio.create_task(self._watch(ping_after_ticks), name=name)

    async def _watch(self, ping_after_ticks: int) -> None:
        """Ping a quiet broker; end the connection when it stays quiet.

        Signs of life are bytes that came, and bytes that the other side's kernel took while more of them wait: on a
        slow uplink a ping stands behind megabytes. The last bytes of all prove nothing: a kernel acknowledges a ping
        for a program that hangs. One that we do not listen to is pinged, and not called silent.
        """
        quiet, received, taken = 0, 0, 0
        while not self.lost.done():
            await asyncio.sleep(TICK_S)
            waiting = self._out.accepted_bytes - self._out.sent_bytes + _unacknowledged_bytes(self._socket)
            alive = self._reader.received_bytes > received or (waiting and self._out.accepted_bytes - waiting > taken)
            received, taken = self._reader.received_bytes, self._out.accepted_bytes - waiting
            quiet = 0 if alive or (self._held and quiet >= ping_after_ticks) else quiet + 1
            if quiet >= DEAD_AFTER_TICKS:
                self.close(f"the broker has been silent for {quiet * TICK_S:g} s")
            elif quiet == ping_after_ticks:
                with contextlib.suppress(ConnectionLost):
                    self.push((_PINGREQ,))


def _unacknowledged_bytes(sock: socket.socket) -> int:
    """Return how many bytes the kernel still holds for the other side; 0 where it cannot tell."""
    try:
        return int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0
