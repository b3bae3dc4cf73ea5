"""What a line does not take is told to its sender once, with what it said about itself, and harms nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brokers.dispatch.channel import CHUNK_HEAD_LIMIT_BYTES, Line
from brokers.errors import BadChunk, BadProperty, Incomplete, TooLarge, TrailingBytes, WireError
from brokers.mqtt.in_memory import MemoryHub, MemoryTransport
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES, Assembler
from brokers.protocol.codec import encode
from brokers.protocol.messages import Body, Message, Task
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Transport
from tests.support.brokers.broker_kinds import Place, run
from tests.support.brokers.channel_ends import INBOX, RecordingTransport, listening, task


async def send_chunks(
    transport: Transport, message: Task, *offsets: int, total: int | None = None, name: str = ""
) -> None:
    """Send 100-byte chunks of a message, those at the offsets and no others."""
    packet = encode(message)
    whole = b"".join(packet.pieces)
    for offset in offsets:
        chunk = ("chunk", f"{offset}/{len(whole) if total is None else total}")
        properties = replace(packet.properties, user=(*packet.properties.user, ("message", name), chunk))
        await transport.publish(INBOX, whole[offset : offset + 100], properties)


@pytest.fixture(params=[True, False], ids=["with placer", "without placer"])
def transport(request: pytest.FixtureRequest) -> RecordingTransport:
    return RecordingTransport(MemoryHub(), with_placer=request.param)


VALUES = np.arange(100, dtype=np.float32)  # with its header, between 400 and 600 bytes
ALL = (0, 100, 200, 300, 400, 500)


def test_a_lost_chunk_is_told_once_and_the_rest_of_its_message_ignored(transport: RecordingTransport) -> None:
    async def test() -> None:
        line, ear = await listening(transport)
        message, after = task(VALUES), task(VALUES)
        await send_chunks(transport, message, 0, 200, 300, 400, 500)
        await send_chunks(transport, after, *ALL)
        assert await ear.message() == after
        error, properties = await ear.refusal()
        assert isinstance(error, BadChunk)
        assert (properties.correlation, properties.response_topic) == (message.request, "back")
        assert (ear.refused.empty(), ear.messages.empty()) == (True, True)
        assert line.counters["BadChunk"] == 1
        await line.close()

    run(test())


def test_chunks_that_come_twice_change_nothing(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await listening(transport, assembler)
        message, after = task(VALUES), task()
        await send_chunks(transport, message, 0, 0, 100, 0, 100, 200, 300, 400, 500, 500, 0, 100)
        await line.send(INBOX, after)
        assert [await ear.message(), await ear.message()] == [message, after]
        assert ear.refused.empty()
        assert (assembler.twins, len(assembler)) == (3, 0)
        await line.close()

    run(test())


def test_an_overlong_claim_is_told_once_and_takes_no_memory(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await listening(transport, assembler)
        await send_chunks(transport, task(VALUES), *ALL, total=100_000_000_000)
        await line.send(INBOX, task())
        await ear.message()
        error, _ = await ear.refusal()
        assert isinstance(error, TooLarge)
        assert (error.limit_bytes, error.actual_bytes) == (MESSAGE_LIMIT_BYTES, 100_000_000_000)
        assert (ear.refused.empty(), len(assembler)) == (True, 0)
        await line.close()

    run(test())


def test_a_message_whose_rest_never_comes_is_given_up_and_its_sender_told_once(
    transport: RecordingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokers.dispatch.channel._EXPIRY_CHECK_S", 0.01)

    async def test() -> None:
        line, ear = await listening(transport, Assembler(patience_s=0.05))
        message = task(VALUES)
        await send_chunks(transport, message, 0, 100)
        error, properties = await ear.refusal()
        assert isinstance(error, Incomplete)
        assert (error.actual_bytes, error.waited_s) == (200, 0.05)
        assert properties.correlation == message.request
        await send_chunks(transport, message, 200, 300, 400, 500)
        await line.send(INBOX, task())
        await ear.message()
        assert (ear.refused.empty(), ear.messages.empty()) == (True, True)
        await line.close()

    run(test())


def test_a_chunk_of_a_gigantic_head_is_refused_since_heads_are_kept_until_their_message_is_whole(
    transport: RecordingTransport,
) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await listening(transport, assembler)
        packet = encode(task())
        user = (*packet.properties.user, ("padding", "p" * CHUNK_HEAD_LIMIT_BYTES), ("chunk", "0/1000"))
        await transport.publish(INBOX, b"x" * 100, replace(packet.properties, user=user))
        error, _ = await ear.refusal()
        assert isinstance(error, BadChunk)
        assert len(assembler) == 0
        await line.close()

    run(test())


@pytest.mark.parametrize("text", ["", "5", "0/", "-1/100", "0/0"])
def test_a_chunk_that_says_no_place_is_told_once(transport: RecordingTransport, text: str) -> None:
    async def test() -> None:
        line, ear = await listening(transport)
        packet = encode(task())
        user = (*packet.properties.user, ("chunk", text))
        await transport.publish(INBOX, b"".join(packet.pieces), replace(packet.properties, user=user))
        error, _ = await ear.refusal()
        assert isinstance(error, BadChunk)
        await line.send(INBOX, task())
        await ear.message()
        assert ear.refused.empty()
        await line.close()

    run(test())


def test_what_breaks_the_protocol_is_counted_told_and_survived(place: Place) -> None:
    async def test() -> None:
        line, ear = await listening(place.transport())
        packet = encode(task())
        whole = b"".join(packet.pieces)
        await line.transport.publish(INBOX, whole + b".", packet.properties)
        await line.transport.publish(INBOX, whole, replace(packet.properties, user=(("sparse", "1"), ("kind", "?"))))
        assert isinstance((await ear.refusal())[0], TrailingBytes)
        assert isinstance((await ear.refusal())[0], BadProperty)
        assert (line.counters["TrailingBytes"], line.counters["BadProperty"]) == (1, 1)
        sent = task()
        await line.send(INBOX, sent)
        assert await ear.message() == sent
        await line.close()

    run(test())


def test_what_is_refused_is_logged_with_sizes_and_without_its_payload(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        line, ear = await listening(MemoryTransport(MemoryHub()))
        packet = encode(task())
        await line.transport.publish(INBOX, b"".join(packet.pieces) + b"secret", packet.properties)
        await ear.refusal()
        await line.close()

    run(test())
    assert "TrailingBytes" in caplog.text
    assert "12 bytes" in caplog.text
    assert "secret" not in caplog.text


def test_a_mistake_of_the_handler_is_not_taken_for_one_of_the_sender() -> None:
    async def test() -> None:
        refused: list[WireError] = []

        def broken(topic: str, message: Message) -> None:
            raise BadProperty("ours", "and not the sender's")

        line = Line(MemoryTransport(MemoryHub()))
        await line.open()
        await line.listen(INBOX, broken, lambda error, _: refused.append(error))
        await line.send(INBOX, task())
        await asyncio.sleep(0.01)
        assert refused == []
        assert line.counters["messages_in"] == 1
        await line.close()

    run(test())


def test_a_request_that_passes_one_worker_twice_comes_in_two_messages(transport: RecordingTransport) -> None:
    async def test() -> None:
        line, ear = await listening(transport)
        message = task(VALUES)
        await send_chunks(transport, message, *ALL, name="first")
        await send_chunks(transport, message, *ALL, name="second")
        assert [await ear.message(), await ear.message()] == [message, message]
        long = replace(message, content=Body({"x": from_numpy(np.zeros(300_000, np.float32))}))
        for _ in range(2):
            await line.send(INBOX, long)
        assert [await ear.message(), await ear.message()] == [long, long]
        assert ear.refused.empty()
        await line.close()

    run(test())


@pytest.mark.parametrize("change", [{"attempt": 2}, {"sender": "another"}, {"request": bytes(16)}], ids=str)
def test_chunks_of_attempts_and_senders_are_not_taken_for_one_another(
    transport: RecordingTransport, change: dict[str, Any]
) -> None:
    async def test() -> None:
        line, ear = await listening(transport)
        one = task(VALUES)
        other = replace(one, **change)
        await send_chunks(transport, one, 0, 100)
        await send_chunks(transport, other, 0)
        await send_chunks(transport, one, 200, 300, 400, 500)
        await send_chunks(transport, other, 100, 200, 300, 400, 500)
        assert [await ear.message(), await ear.message()] == [one, other]
        assert ear.refused.empty()
        await line.close()

    run(test())
