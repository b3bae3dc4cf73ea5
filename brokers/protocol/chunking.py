"""Split large messages into chunks for the broker's packet limit, and reassemble them within our memory limits.

A chunk carries the id of its message, its offset and the size of the whole message. MQTT keeps the order of what one
client publishes to one topic at one quality of service (MQTT 5.0 section 4.6), so chunks are accepted in order only: a
chunk ahead of its turn proves that one before it was lost, a chunk behind it is a duplicate.

The rules of `Assembler`:

1. Memory is allocated for a message only within `message_limit_bytes`, `total_limit_bytes` and `message_count_limit`.
2. Each chunk is written at its offset at once; a whole message is never copied.
3. A message is dropped, with one error, when it got no chunk for `chunk_timeout_s`, lost a chunk, or got one that does
   not fit.
4. Further chunks of a dropped or completed message are ignored.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from brokers.errors import TooLarge, WireError
from brokers.process.aligned_memory import allocate_aligned

# Fastest on loopback (tests/bench/roundtrip.py --chunks): smaller ones cost calls, larger ones leave the pipe empty.
CHUNK_BYTES = 512 * 1024
MESSAGE_LIMIT_BYTES = 1 << 30  # a thousand 640x480 float32 frames; a larger claim is a mistake or an attack
# Pages are touched only as bytes arrive, so a false claim costs address space but no memory.
TOTAL_LIMIT_BYTES = 2 << 30
MESSAGE_COUNT_LIMIT = 1024
CHUNK_TIMEOUT_S = 30.0
_ENDED_LIMIT = 1024  # so many completed and dropped messages are remembered, to ignore their late chunks
_HEADER = re.compile(r"[0-9]{1,19}/[0-9]{1,19}")

MessageKey = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """The place of a chunk: its first byte in the message, and the size of the whole message."""

    offset: int
    total_bytes: int

    @classmethod
    def parse(cls, text: str) -> ChunkHeader:
        """Read `offset/total`, the value of the user property. Raises `WireError` ("BadChunk")."""
        if not _HEADER.fullmatch(text):
            raise chunk_error(f"expected offset/total in bytes, got {text!r}")
        offset, _, total = text.partition("/")
        return cls(int(offset), int(total))

    def __str__(self) -> str:
        return f"{self.offset}/{self.total_bytes}"


def split_into_chunks(
    buffers: tuple[memoryview, ...], chunk_bytes: int
) -> Iterator[tuple[ChunkHeader, list[memoryview]]]:
    """Yield the message in chunks of `chunk_bytes` (the last may be shorter), as slices of `buffers`."""
    total_bytes = sum(buffer.nbytes for buffer in buffers)
    offset = 0
    free_bytes = chunk_bytes
    slices: list[memoryview] = []
    for buffer in buffers:
        position = 0
        while position < buffer.nbytes:
            part = buffer[position : position + free_bytes]
            position += part.nbytes
            free_bytes -= part.nbytes
            slices.append(part)
            if not free_bytes:
                yield ChunkHeader(offset, total_bytes), slices
                offset += chunk_bytes
                free_bytes = chunk_bytes
                slices = []
    if slices:
        yield ChunkHeader(offset, total_bytes), slices


def chunk_error(problem: str) -> WireError:
    """Return the error for a chunk that does not fit its message: most often, one before it was lost."""
    return WireError("BadChunk", f"bad chunk: {problem}", retry=True)


@dataclass(slots=True)
class _Assembly:
    buffer: memoryview
    context: Any
    filled_bytes: int = 0
    touched_s: float = 0.0


@dataclass(slots=True)
class Assembler:
    """Reassembles chunked messages; `len()` is the number of unfinished ones, `duplicates` counts repeated chunks."""

    message_limit_bytes: int = MESSAGE_LIMIT_BYTES
    total_limit_bytes: int = TOTAL_LIMIT_BYTES
    message_count_limit: int = MESSAGE_COUNT_LIMIT
    chunk_timeout_s: float = CHUNK_TIMEOUT_S
    duplicates: int = 0
    _assemblies: dict[MessageKey, _Assembly] = field(default_factory=dict)
    _ended: OrderedDict[MessageKey, None] = field(default_factory=OrderedDict)
    _claimed_bytes: int = 0

    def __len__(self) -> int:
        return len(self._assemblies)

    def get_buffer(
        self, key: MessageKey, chunk: ChunkHeader, length: int, now_s: float, context: Any = None
    ) -> memoryview | None:
        """Return the place for the bytes of this chunk, None if it is to be ignored (a duplicate, a dropped message).

        `expire` returns the `context` given with the first chunk. Raises `TooLarge` or `WireError` ("BadChunk").
        """
        if key in self._ended:
            return None
        end = chunk.offset + length
        if not length or end > chunk.total_bytes:
            raise self._drop(key, f"{length} bytes at {chunk.offset} do not fit a message of {chunk.total_bytes}")
        assembly = self._assemblies.get(key) or self._begin(key, chunk, now_s, context)
        if chunk.total_bytes != assembly.buffer.nbytes:
            raise self._drop(key, f"its message has {assembly.buffer.nbytes} bytes, it claims {chunk.total_bytes}")
        if end <= assembly.filled_bytes:
            return None
        if chunk.offset != assembly.filled_bytes:
            raise self._drop(key, f"expected the chunk at byte {assembly.filled_bytes}, got the one at {chunk.offset}")
        return assembly.buffer[chunk.offset : end]

    def add_chunk(
        self, key: MessageKey, chunk: ChunkHeader, payload: memoryview, now_s: float, context: Any = None
    ) -> memoryview | None:
        """Add a received chunk; return the whole message if it was the last one.

        `payload` is copied unless it was received into the buffer that `get_buffer` returned.
        """
        place = self.get_buffer(key, chunk, payload.nbytes, now_s, context)
        if place is None:
            self.duplicates += key in self._assemblies
            return None
        assembly = self._assemblies[key]
        if payload.obj is not assembly.buffer.obj:
            place[:] = payload
        assembly.filled_bytes += payload.nbytes
        assembly.touched_s = now_s
        if assembly.filled_bytes < chunk.total_bytes:
            return None
        self._end(key)
        return assembly.buffer

    def expire(self, now_s: float) -> list[tuple[Any, WireError]]:
        """Drop the messages that got no chunk for `chunk_timeout_s`; return the context and the error of each."""
        expired = {key: item for key, item in self._assemblies.items() if now_s - item.touched_s > self.chunk_timeout_s}
        for key in expired:
            self._end(key)
        return [(item.context, self._incomplete(item)) for item in expired.values()]

    def _incomplete(self, assembly: _Assembly) -> WireError:
        expected_bytes = assembly.buffer.nbytes
        actual_bytes = assembly.filled_bytes
        message = f"got {actual_bytes} of {expected_bytes} bytes, then no chunk for {self.chunk_timeout_s:g} s"
        fields = {"expected_bytes": expected_bytes, "actual_bytes": actual_bytes, "waited_s": self.chunk_timeout_s}
        return WireError("Incomplete", message, retry=True, **fields)

    def _begin(self, key: MessageKey, chunk: ChunkHeader, now_s: float, context: Any) -> _Assembly:
        if chunk.offset:
            raise self._drop(key, f"the first chunk received is at byte {chunk.offset}: the ones before it were lost")
        free_bytes = self.total_limit_bytes - self._claimed_bytes if len(self) < self.message_count_limit else 0
        try:
            if chunk.total_bytes > self.message_limit_bytes:
                raise TooLarge("a chunked message", self.message_limit_bytes, chunk.total_bytes)
            if chunk.total_bytes > free_bytes:
                raise TooLarge(f"a chunked message beside {len(self)} unfinished ones", free_bytes, chunk.total_bytes)
            buffer = allocate_aligned(chunk.total_bytes)
        except TooLarge:
            self._end(key)
            raise
        except MemoryError:
            self._end(key)
            raise TooLarge("a chunked message, with no memory left,", 0, chunk.total_bytes) from None
        self._assemblies[key] = _Assembly(buffer, context, touched_s=now_s)
        self._claimed_bytes += chunk.total_bytes
        return self._assemblies[key]

    def _drop(self, key: MessageKey, problem: str) -> WireError:
        self._end(key)
        return chunk_error(problem)

    def _end(self, key: MessageKey) -> None:
        """Free a message, and remember its key so that further chunks of it are ignored."""
        assembly = self._assemblies.pop(key, None)
        if assembly is not None:
            self._claimed_bytes -= assembly.buffer.nbytes
        self._ended[key] = None
        while len(self._ended) > _ENDED_LIMIT:
            self._ended.popitem(last=False)
