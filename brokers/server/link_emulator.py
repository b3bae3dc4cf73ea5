"""TCP proxy that emulates a wide-area link: bytes come out after a delay, and no faster than a rate.

For several sites on one machine: a bridge that would cross a wide-area link connects to the emulator, which connects to
the other broker. Delay (one way) and rate apply to each direction. Bytes are never lost or reordered; like TCP over a
real link, the emulator slows down a sender that is too fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

_READ_BYTES = 64 << 10  # per read: small pieces leave evenly at a low rate, large ones cost less at a high rate
_ROUTER_QUEUE_BYTES = 1 << 20  # in transit beyond the product of delay and rate, as in a router's queue
_UNLIMITED_RATE_BYTES = 64 << 20  # in transit at most, without a rate
_START_TIMEOUT_S = 10.0

Direction = Literal["outbound", "inbound"]


class LinkEmulator:
    """A link to the broker at `port` of this machine. Once started it listens on a free port, `self.port`.

    It runs a loop in its own thread. `byte_counts` are of bytes that came out; "outbound" is away from the side that
    connects to the emulator. `tap`, if set, is called in that thread with each piece of bytes that comes out.
    """

    def __init__(self, port: int, *, delay_ms: float = 0.0, rate_mbit: float | None = None) -> None:
        self.port = 0
        self.tap: Callable[[Direction, bytes], None] | None = None
        self.byte_counts: dict[Direction, int] = {"outbound": 0, "inbound": 0}
        self._target = port
        self._delay_s = delay_ms / 1000
        self._bytes_per_s = rate_mbit * 125_000 if rate_mbit else None
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link to port {port}", daemon=True)
        self._connections: set[asyncio.Task[None]] = set()
        self._enabled = True
        self._stop: asyncio.Event | None = None

    def start(self) -> None:
        """Start the thread and wait until it listens."""
        self._thread.start()
        if not self._started.wait(_START_TIMEOUT_S):
            raise RuntimeError(f"{self._thread.name} did not start")

    def stop(self) -> None:
        """Close all connections and the listener. May be called twice."""
        if self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(_START_TIMEOUT_S)

    def disable(self) -> None:
        """Break the link: close all connections, with the bytes in transit, and new ones at once, until `enable`."""
        self._enabled = False
        with contextlib.suppress(RuntimeError):  # stopped before
            self._loop.call_soon_threadsafe(self._close_connections)

    def enable(self) -> None:
        self._enabled = True

    def _close_connections(self) -> None:
        for task in self._connections:
            task.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0, limit=_READ_BYTES)
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stop.wait()
        server.close()
        self._close_connections()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until both directions have ended, one has failed, or the link is disabled."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        writers = [writer]
        try:
            if self._enabled:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=_READ_BYTES)
                writers.append(far_writer)
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._forward("outbound", reader, far_writer))
                    group.create_task(self._forward("inbound", far_reader, writer))
        except* (OSError, asyncio.CancelledError):
            pass  # the target does not answer, a side closed, or the link was disabled: the bridge reconnects
        finally:
            self._connections.discard(task)
            for each in writers:
                each.transport.abort()

    async def _forward(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Write each piece when it is due; end with the reader, whose other direction may go on."""
        queue = _DelayQueue(self._delay_s, self._bytes_per_s)
        writer.transport.set_write_buffer_limits(0)  # `drain` waits for every byte: none is lost
        async with asyncio.TaskGroup() as group:
            group.create_task(_fill(queue, reader))
            while piece := await queue.get():
                writer.write(piece)
                await writer.drain()
                self.byte_counts[direction] += len(piece)
                if self.tap:
                    self.tap(direction, piece)
        if writer.can_write_eof():
            writer.write_eof()


async def _fill(queue: _DelayQueue, reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(_READ_BYTES):
            await queue.put(piece)
    await queue.put(b"")


class _DelayQueue:
    """The bytes in transit in one direction of one connection, each with the time when it comes out."""

    def __init__(self, delay_s: float, bytes_per_s: float | None) -> None:
        self._delay_s = delay_s
        self._bytes_per_s = bytes_per_s
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._free_bytes = (
            _UNLIMITED_RATE_BYTES if bytes_per_s is None else int(bytes_per_s * delay_s) + _ROUTER_QUEUE_BYTES
        )
        self._sent_s = 0.0  # when the sender has sent the last piece at the rate of the link
        self._changed = asyncio.Condition()

    async def put(self, piece: bytes) -> None:
        """Add a piece when there is space; b"" is the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._free_bytes >= len(piece))
            sending_s = len(piece) / self._bytes_per_s if self._bytes_per_s else 0.0
            self._sent_s = max(asyncio.get_running_loop().time(), self._sent_s) + sending_s
            self._free_bytes -= len(piece)
            self._pieces.append((self._sent_s + self._delay_s, piece))
            self._changed.notify_all()

    async def get(self) -> bytes:
        async with self._changed:
            await self._changed.wait_for(lambda: self._pieces)
        due_s, piece = self._pieces[0]
        await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        async with self._changed:
            self._pieces.popleft()
            self._free_bytes += len(piece)
            self._changed.notify_all()
        return piece
