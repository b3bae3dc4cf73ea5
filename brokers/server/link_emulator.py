"""A TCP relay that stands for a link: what goes through it comes out later, and no faster than its rate.

For several sites on one machine: a bridge that should cross a wide-area link dials the relay, which dials the other
broker. Each direction has the whole delay, which is one way, and the whole rate. Bytes are never lost or reordered:
like TCP over a real link, it holds back who sends too much.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

# What one read takes: small pieces leave evenly at a low rate, large ones cost less at a high one.
_PIECE_BYTES = 64 << 10
# In flight on the link, beyond the product of delay and rate: what a router would queue.
_QUEUE_BYTES = 1 << 20
# Without a rate, so much is in flight at most.
_LONG_BYTES = 64 << 20
_START_S = 10.0

Tap = Callable[[str, bytes], None]


@dataclass(slots=True)
class LinkByteCounts:
    """Bytes that have come out of the link, by direction: `there` is from who dialled the relay."""

    outbound: int = 0
    inbound: int = 0


class LinkEmulator:
    """A link to the broker at `port` of this machine; it listens at a free port, `self.port`, once started.

    It has a thread with a loop of its own. `cut` breaks the connections and lets none come until `mend`. `tap`, where
    there is one, is called in that thread with a direction, "there" or "back", and the bytes that come out.
    """

    def __init__(self, port: int, *, delay_ms: float = 0.0, rate_mbit: float | None = None) -> None:
        self.port = 0
        self.tap: Tap | None = None
        self.byte_counts = LinkByteCounts()
        self._target = port
        self._delay_s = delay_ms / 1000
        self._bytes_per_s = rate_mbit * 125_000 if rate_mbit else None
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"link to port {port}", daemon=True)
        self._ends: set[asyncio.Task[None]] = set()
        self._whole = True
        self._leaving: asyncio.Event | None = None

    def start(self) -> None:
        """Listen; return when connections are taken."""
        self._thread.start()
        if not self._ready.wait(_START_S):
            raise RuntimeError(f"{self._thread.name} did not start")

    def stop(self) -> None:
        """Break what goes through it, and listen no more. May be called twice."""
        leaving = self._leaving
        if leaving is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(leaving.set)
            self._thread.join(_START_S)

    def disable(self) -> None:
        """Break the link, and what is in flight on it; connections are ended at once from now on."""
        self._whole = False
        with contextlib.suppress(RuntimeError):  # it has been stopped: there is nothing to break
            self._loop.call_soon_threadsafe(self._break)

    def enable(self) -> None:
        """Let connections through again."""
        self._whole = True

    def _break(self) -> None:
        for end in self._ends:
            end.cancel()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._listen())
        finally:
            self._loop.close()

    async def _listen(self) -> None:
        self._leaving = asyncio.Event()
        server = await asyncio.start_server(self._greet, "127.0.0.1", 0, limit=_PIECE_BYTES)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._leaving.wait()
        server.close()
        self._break()
        await asyncio.gather(*self._ends, return_exceptions=True)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection through the link, until either side ends it or the link is cut."""
        task = asyncio.current_task()
        assert task is not None
        self._ends.add(task)
        others: asyncio.StreamWriter | None = None
        try:
            if self._whole:
                far, others = await asyncio.open_connection("127.0.0.1", self._target, limit=_PIECE_BYTES)
                ways = (self._carry("there", reader, others), self._carry("back", far, writer))
                ends = [asyncio.ensure_future(way) for way in ways]
                try:
                    # Who ends one direction may still read the other; what fails ends both.
                    await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
                finally:
                    for end in ends:
                        end.cancel()
                    await asyncio.gather(*ends, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # nobody is at the other end, or the link was cut: the bridge tries again
        finally:
            self._ends.discard(task)
            for end_writer in (writer, others):
                if end_writer is not None:
                    end_writer.transport.abort()

    async def _carry(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Bring what is read to the other side, when its time has come."""
        link = _DelayQueue(self._delay_s, self._bytes_per_s)
        filling = asyncio.create_task(self._fill(link, reader))
        writer.transport.set_write_buffer_limits(0)  # `drain` waits for all of it: what has come out is not lost
        try:
            while (piece := await link.take()) is not None:
                writer.write(piece)
                await writer.drain()
                setattr(self.byte_counts, way, getattr(self.byte_counts, way) + len(piece))
                if self.tap:
                    self.tap(way, piece)
            if writer.can_write_eof():
                writer.write_eof()
        finally:
            filling.cancel()
            await asyncio.gather(filling, return_exceptions=True)

    async def _fill(self, link: _DelayQueue, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                await link.put(piece)
        link.end()


class _DelayQueue:
    """One direction of one connection: pieces, and when each comes out."""

    def __init__(self, delay_s: float, bytes_per_s: float | None) -> None:
        self._delay_s, self._bytes_per_s = delay_s, bytes_per_s
        self._pieces: deque[tuple[float, bytes]] = deque()
        self._room = _LONG_BYTES if bytes_per_s is None else int(bytes_per_s * delay_s) + _QUEUE_BYTES
        self._sent_s = 0.0  # when the last piece has left its sender
        self._changed = asyncio.Event()
        self._ended = False

    async def put(self, piece: bytes) -> None:
        while self._room < len(piece):
            await self._wait()
        now_s = asyncio.get_running_loop().time()
        sending_s = len(piece) / self._bytes_per_s if self._bytes_per_s else 0.0
        self._sent_s = max(now_s, self._sent_s) + sending_s
        self._room -= len(piece)
        self._pieces.append((self._sent_s + self._delay_s, piece))
        self._tell()

    def end(self) -> None:
        self._ended = True
        self._tell()

    async def take(self) -> bytes | None:
        """The next piece, when it comes out; None after the last."""
        while not self._pieces:
            if self._ended:
                return None
            await self._wait()
        due_s, piece = self._pieces[0]
        await asyncio.sleep(due_s - asyncio.get_running_loop().time())
        self._pieces.popleft()
        self._room += len(piece)
        self._tell()
        return piece

    async def _wait(self) -> None:
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
