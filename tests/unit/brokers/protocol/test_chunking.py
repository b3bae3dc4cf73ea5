"""Chunks are reassembled into messages in bounded memory; chunks that do not fit raise one error a message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.errors import TooLarge, WireError
from brokers.protocol.chunking import Assembler, ChunkHeader, split_into_chunks
from tests.support.errors import raises_error

KEY = ("inbox", b"request")
OTHER = ("inbox", b"other")
MESSAGE = bytes(range(10))


def feed(assembler: Assembler, key: tuple[object, ...], offset: int, payload: bytes, total: int = 10) -> bytes | None:
    """Add a chunk that the transport received into a new buffer."""
    whole = assembler.add_chunk(key, ChunkHeader(offset, total), memoryview(payload), now_s=0.0)
    return None if whole is None else bytes(whole)


def feed_in_place(
    assembler: Assembler, key: tuple[object, ...], chunk: ChunkHeader, payload: memoryview, now_s: float = 0.0
) -> memoryview | None:
    """Add a chunk that the transport received into the place that `get_buffer` returned."""
    place = assembler.get_buffer(key, chunk, payload.nbytes, now_s)
    if place is None:
        return assembler.add_chunk(key, chunk, payload, now_s)
    place[:] = payload
    return assembler.add_chunk(key, chunk, place, now_s)


# Split and reassemble -------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=30), max_size=6), st.integers(1, 40))
def test_buffers_are_split_into_equal_chunks_without_copies(pieces: list[bytes], chunk_bytes: int) -> None:
    chunks = list(split_into_chunks(tuple(map(memoryview, pieces)), chunk_bytes))
    whole = b"".join(pieces)
    assert b"".join(part for _, parts in chunks for part in parts) == whole
    assert [chunk for chunk, _ in chunks] == [ChunkHeader(at, len(whole)) for at in range(0, len(whole), chunk_bytes)]
    assert all(sum(part.nbytes for part in parts) == chunk_bytes for _, parts in chunks[:-1])
    assert all(any(part.obj is piece for piece in pieces) for _, parts in chunks for part in parts)


@given(st.binary(min_size=1, max_size=200), st.integers(1, 50), st.booleans())
def test_any_split_is_reassembled(message: bytes, chunk_bytes: int, in_place: bool) -> None:
    assembler = Assembler()
    for chunk, parts in split_into_chunks((memoryview(message),), chunk_bytes):
        payload = memoryview(b"".join(parts))
        if in_place:
            whole = feed_in_place(assembler, KEY, chunk, payload)
        else:
            whole = assembler.add_chunk(KEY, chunk, payload, now_s=0.0)
        assert (whole is not None) == (chunk.offset + payload.nbytes == len(message))
    assert bytes(whole or b"") == message
    assert len(assembler) == 0


@given(st.data())
def test_interleaved_messages_are_reassembled(data: st.DataObject) -> None:
    assembler = Assembler()
    messages = {(number,): bytes([number]) * data.draw(st.integers(1, 60)) for number in range(4)}
    left = {key: list(split_into_chunks((memoryview(message),), 7)) for key, message in messages.items()}
    while left:
        key = data.draw(st.sampled_from(sorted(left)))
        chunk, parts = left[key].pop(0)
        whole = feed_in_place(assembler, key, chunk, memoryview(b"".join(parts)))
        if not left[key]:
            assert bytes(whole or b"") == messages[key]
            del left[key]
    assert len(assembler) == 0


def test_chunk_received_in_place_is_not_copied() -> None:
    assembler = Assembler()
    place = assembler.get_buffer(KEY, ChunkHeader(0, 10), 10, now_s=0.0)
    assert place is not None
    place[:] = MESSAGE
    whole = assembler.add_chunk(KEY, ChunkHeader(0, 10), place, now_s=0.0)
    assert whole is not None
    assert whole.obj is place.obj


@given(st.integers(0, 10**19 - 1), st.integers(0, 10**19 - 1))
def test_header_is_the_inverse_of_its_text(offset: int, total: int) -> None:
    assert ChunkHeader.parse(str(ChunkHeader(offset, total))) == ChunkHeader(offset, total)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "1",
        "1/",
        "/1",
        "-1/5",
        "1/-5",
        "+1/5",
        "1/5/9",
        "1 /5",
        "a/b",
        "\N{ARABIC-INDIC DIGIT TWO}/5",
        "1/5\n",
        "9" * 20 + "/1",
    ],
)
def test_malformed_header_raises_bad_chunk(text: str) -> None:
    with raises_error(WireError, "BadChunk", match="expected offset/total"):
        ChunkHeader.parse(text)


# Chunks that do not fit -----------------------------------------------------------------------------------------------


def test_duplicate_chunk_is_dropped_and_counted() -> None:
    assembler = Assembler()
    assert feed(assembler, KEY, 0, MESSAGE[:4]) is None
    assert feed(assembler, KEY, 0, b"evil") is None
    assert feed_in_place(assembler, KEY, ChunkHeader(2, 10), memoryview(b"..")) is None
    assert assembler.duplicates == 2
    assert feed(assembler, KEY, 4, MESSAGE[4:]) == MESSAGE


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (4, 6), (0, 10)])
def test_chunks_of_a_completed_message_are_ignored(offset: int, length: int) -> None:
    assembler = Assembler()
    feed(assembler, KEY, 0, MESSAGE[:4])
    assert feed(assembler, KEY, 4, MESSAGE[4:]) == MESSAGE
    assert feed(assembler, KEY, offset, MESSAGE[offset : offset + length]) is None
    assert len(assembler) == 0
    assert assembler.expire(1e9) == []
    assert assembler.duplicates == 0  # they may also be late chunks of a dropped message


# After a first chunk of bytes 0 to 4 of a message of 10.
MISFITS: dict[str, tuple[int, bytes, int, str]] = {
    "a gap": (5, b"56789", 10, "expected the chunk at byte 4, got the one at 5"),
    "an overlap": (3, b"3456789", 10, "expected the chunk at byte 4, got the one at 3"),
    "another total": (4, b"456789", 11, "its message has 10 bytes, it claims 11"),
    "another total on a duplicate": (0, b"0123", 9, "its message has 10 bytes, it claims 9"),
    "no bytes": (4, b"", 10, "0 bytes at 4 do not fit"),
    "too many bytes": (4, b"4567890", 10, "7 bytes at 4 do not fit a message of 10"),
    "an offset past the end": (2**62, b".", 10, "do not fit a message of 10"),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", MISFITS)
def test_misfit_drops_its_message_with_one_error(case: str, in_place: bool) -> None:
    offset, payload, total, text = MISFITS[case]
    assembler = Assembler()
    feed(assembler, KEY, 0, MESSAGE[:4])
    feed(assembler, OTHER, 0, MESSAGE[:4])
    ask = feed_in_place if in_place else Assembler.add_chunk
    with raises_error(WireError, "BadChunk", match=re.escape(text)):
        ask(assembler, KEY, ChunkHeader(offset, total), memoryview(payload), 0.0)
    assert feed(assembler, KEY, offset, payload or b".", total) is None  # received into a new buffer
    assert feed(assembler, KEY, 4, MESSAGE[4:]) is None
    assert feed(assembler, KEY, 0, MESSAGE) is None
    assert len(assembler) == 1
    assert feed(assembler, OTHER, 4, MESSAGE[4:]) == MESSAGE  # other messages are unaffected
    assert assembler.expire(1e9) == []


@pytest.mark.parametrize(
    ("offset", "payload", "total", "text"),
    [
        (4, b"456789", 10, "the ones before it were lost"),
        (0, b"", 0, "0 bytes at 0 do not fit"),
        (0, b"", 10, "0 bytes at 0 do not fit"),
        (0, b".", 0, "1 bytes at 0 do not fit a message of 0"),
        (0, b"0123456789!", 10, "11 bytes at 0 do not fit a message of 10"),
    ],
)
def test_invalid_first_chunk_begins_no_message(offset: int, payload: bytes, total: int, text: str) -> None:
    assembler = Assembler()
    with raises_error(WireError, "BadChunk", match=text):
        feed(assembler, KEY, offset, payload, total)
    assert len(assembler) == 0
    assert feed(assembler, KEY, 0, MESSAGE) is None


# Bounds ---------------------------------------------------------------------------------------------------------------


def test_message_over_the_limit_is_refused_once() -> None:
    assembler = Assembler()
    with pytest.raises(TooLarge) as caught:
        feed(assembler, KEY, 0, b".", 100_000_000_000)
    assert (caught.value.fields["limit_bytes"], caught.value.fields["actual_bytes"]) == (
        assembler.message_limit_bytes,
        100_000_000_000,
    )
    assert feed(assembler, KEY, 1, b".", 100_000_000_000) is None
    assert len(assembler) == 0


def test_false_claim_within_the_limit_uses_no_memory() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to read the resident set from")
    assembler = Assembler()
    before = resident_bytes()
    for number in range(2):
        feed(assembler, (number,), 0, b"." * 1000, 1 << 30)
    assert resident_bytes() - before < 16 << 20


def test_unfinished_messages_are_bounded_in_bytes() -> None:
    assembler = Assembler(total_limit_bytes=25)
    feed(assembler, ("a",), 0, MESSAGE[:4])
    feed(assembler, ("b",), 0, MESSAGE[:4])
    with pytest.raises(TooLarge, match="beside 2 unfinished ones has 10 bytes, the limit is 5"):
        feed(assembler, ("c",), 0, MESSAGE[:4])
    assert feed(assembler, ("a",), 4, MESSAGE[4:]) == MESSAGE
    feed(assembler, ("d",), 0, MESSAGE[:4])
    with raises_error(WireError, "BadChunk"):
        feed(assembler, ("b",), 9, b".")
    assert len(assembler.expire(1e9)) == 1
    assert feed(assembler, ("e",), 0, b"." * 25, 25) == b"." * 25


def test_unfinished_messages_are_bounded_in_number() -> None:
    assembler = Assembler(message_count_limit=2)
    feed(assembler, ("a",), 0, b".")
    feed(assembler, ("b",), 0, b".")
    with pytest.raises(TooLarge, match="beside 2 unfinished ones has 10 bytes, the limit is 0"):
        feed(assembler, ("c",), 0, b".")


def test_memory_error_becomes_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("brokers.process.aligned_memory.np.empty", full)
    with pytest.raises(TooLarge, match="no memory left"):
        feed(Assembler(), KEY, 0, MESSAGE[:4])


def test_dropped_messages_are_remembered_in_bounded_number() -> None:
    assembler = Assembler()
    for number in range(3000):
        with raises_error(WireError, "BadChunk"):
            feed(assembler, (number,), 5, b".")
    assert len(assembler._ended) <= 1024
    assert feed(assembler, (2999,), 0, MESSAGE) is None


# Timeout --------------------------------------------------------------------------------------------------------------


def test_message_without_chunks_expires_with_its_context() -> None:
    assembler = Assembler(chunk_timeout_s=30.0)
    assembler.add_chunk(KEY, ChunkHeader(0, 10), memoryview(MESSAGE[:4]), 100.0, "first context")
    assembler.add_chunk(KEY, ChunkHeader(4, 10), memoryview(MESSAGE[4:6]), 120.0, "second context")
    assert assembler.expire(150.0) == []
    [(context, error)] = assembler.expire(150.1)
    assert context == "first context"
    assert error.code == "Incomplete"
    assert str(error) == "got 6 of 10 bytes, then no chunk for 30 s"
    assert error.retry
    assert assembler.expire(1e9) == []
    assert assembler.add_chunk(KEY, ChunkHeader(6, 10), memoryview(MESSAGE[6:]), 151.0) is None
    assert len(assembler) == 0


def test_chunk_in_transit_when_its_message_expires_is_ignored() -> None:
    assembler = Assembler()
    place = assembler.get_buffer(KEY, ChunkHeader(0, 10), 10, now_s=0.0)
    assert place is not None
    assert len(assembler.expire(1e9)) == 1
    place[:] = MESSAGE
    assert assembler.add_chunk(KEY, ChunkHeader(0, 10), place, now_s=1e9) is None
    assert len(assembler) == 0
