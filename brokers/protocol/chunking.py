"""Large messages in pieces: cut for the broker's limits, put together again within ours. Pure: the time is an argument.

A chunk says which message it belongs to, at which byte it begins, and how many bytes the whole message has. MQTT keeps
the order of what one client publishes to one topic at one quality of service (MQTT 5.0 section 4.6), so chunks are
taken in order only: a chunk that is ahead proves that one before it was lost, and a chunk that is behind is a twin.

The rules:

1. Memory is set aside for a message only within `message_limit_bytes`, `total_limit_bytes` and `count_limit`.
2. Each chunk is written at its own place at once; a whole message is never copied.
3. A message that got no chunk for `patience_s` is given up, and so is one that lost a chunk or has one that does not
   fit; this is said once.
4. What still comes of a message that was given up, or is whole already, is ignored.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brokers.errors import BadChunk, Incomplete, TooLarge

# Measured best on loopback (tests/bench/roundtrip.py --chunks): smaller costs calls, larger leaves the pipe empty.
CHUNK_BYTES = 512 * 1024
# What one message may have: a thousand 640x480 float frames; a claim above it is a mistake or an attack.
MESSAGE_LIMIT_BYTES = 1 << 30
# Pages are touched only as bytes arrive, so a false claim costs address space and no memory.
TOTAL_LIMIT_BYTES = 2 << 30
MESSAGE_COUNT_LIMIT = 1024
CHUNK_TIMEOUT_S = 30.0
# How many messages that are whole or were given up are remembered, to ignore what still comes of them.
_REMEMBERED = 1024
# An offset, a slash and a total, each of at most 19 digits.
_TEXT = re.compile(r"[0-9]{1,19}/[0-9]{1,19}")

MessageKey = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ChunkHeader:
    """Where a chunk belongs: its first byte in the message, and the bytes of the whole message."""

    offset: int
    total_bytes: int

    @classmethod
    def parse(cls, text: str) -> ChunkHeader:
        """Read `offset/total`, the form in which it travels."""
        if not _TEXT.fullmatch(text):
            raise BadChunk(f"expected offset/total in bytes, got {text!r}")
        offset, _, total = text.partition("/")
        return cls(int(offset), int(total))

    def __str__(self) -> str:
        return f"{self.offset}/{self.total_bytes}"


def split_into_chunks(
    pieces: tuple[memoryview, ...], chunk_bytes: int
) -> Iterator[tuple[ChunkHeader, list[memoryview]]]:
    """The pieces of a message, dealt into chunks of `chunk_bytes` (the last may be shorter), without copying."""
    total = sum(piece.nbytes for piece in pieces)
    offset, room, batch = 0, chunk_bytes, []
    for piece in pieces:
        while piece.nbytes:
            part, piece = piece[:room], piece[room:]
            batch.append(part)
            room -= part.nbytes
            if not room:
                yield ChunkHeader(offset, total), batch
                offset, room, batch = offset + chunk_bytes, chunk_bytes, []
    if batch:
        yield ChunkHeader(offset, total), batch


@dataclass(slots=True)
class _Assembly:
    buffer: memoryview
    context: Any
    filled_bytes: int = 0
    touched_s: float = 0.0


@dataclass(slots=True)
class Assembler:
    """The messages that are not whole yet."""

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
        """Where the bytes of this chunk shall be written; None when it is to be thrown away (a twin, a lost cause).

        `context` of a message's first chunk comes back with `expire`. Raises `TooLarge` or `BadChunk`.
        """
        if key in self._ended:
            return None
        end = chunk.offset + length
        if not length or end > chunk.total_bytes:
            raise self._drop(key, f"{length} bytes at {chunk.offset} do not fit a message of {chunk.total_bytes}")
        assembly = self._assemblies.get(key) or self._begin(key, chunk, now_s, context)
        if chunk.total_bytes != assembly.buffer.nbytes:
            raise self._drop(key, f"its message has {assembly.buffer.nbytes} bytes, it says {chunk.total_bytes}")
        if end <= assembly.filled_bytes:
            return None
        if chunk.offset != assembly.filled_bytes:
            raise self._drop(key, f"expected the chunk at byte {assembly.filled_bytes}, got the one at {chunk.offset}")
        return assembly.buffer[chunk.offset : end]

    def add_chunk(
        self, key: MessageKey, chunk: ChunkHeader, payload: memoryview, now_s: float, context: Any = None
    ) -> memoryview | None:
        """Take a chunk whose bytes have come, and return the whole message if it was the last one.

        `payload` may lie at its place already (a transport that asked `place`), or anywhere.
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

    def expire(self, now_s: float) -> list[tuple[Any, Incomplete]]:
        """Give up the messages that wait too long: the context of each, and what came of it."""
        late = {key: item for key, item in self._assemblies.items() if now_s - item.touched_s > self.chunk_timeout_s}
        for key in late:
            self._end(key)
        return [
            (item.context, Incomplete(item.buffer.nbytes, item.filled_bytes, self.chunk_timeout_s))
            for item in late.values()
        ]

    def _begin(self, key: MessageKey, chunk: ChunkHeader, now_s: float, context: Any) -> _Assembly:
        if chunk.offset:
            raise self._drop(key, f"the first to come of its message is at byte {chunk.offset}: those before were lost")
        free_bytes = self.total_limit_bytes - self._claimed_bytes if len(self) < self.message_count_limit else 0
        try:
            if chunk.total_bytes > self.message_limit_bytes:
                raise TooLarge("a chunked message", self.message_limit_bytes, chunk.total_bytes)
            if chunk.total_bytes > free_bytes:
                raise TooLarge(f"a chunked message beside {len(self)} unfinished ones", free_bytes, chunk.total_bytes)
            # Uninitialised: zero-filling 64 MiB costs more than receiving it.
            buffer = np.empty(chunk.total_bytes, np.uint8).data
        except (TooLarge, MemoryError) as error:
            self._end(key)
            if isinstance(error, TooLarge):
                raise
            raise TooLarge("a chunked message, with the memory that is left,", 0, chunk.total_bytes) from None
        self._assemblies[key] = _Assembly(buffer, context, touched_s=now_s)
        self._claimed_bytes += chunk.total_bytes
        return self._assemblies[key]

    def _drop(self, key: MessageKey, problem: str) -> BadChunk:
        self._end(key)
        return BadChunk(problem)

    def _end(self, key: MessageKey) -> None:
        """Forget what came of a message, and remember that no more of it is wanted."""
        assembly = self._assemblies.pop(key, None)
        if assembly is not None:
            self._claimed_bytes -= assembly.buffer.nbytes
        self._ended[key] = None
        while len(self._ended) > _REMEMBERED:
            self._ended.popitem(last=False)
