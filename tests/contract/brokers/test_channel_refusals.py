"""What a line does not take is told to its sender once, with what it said about itself, and harms nothing else."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brokers.dispatch.channel import CHUNK_HEADER_LIMIT_BYTES, MessageChannel
from brokers.errors import TooLarge, WireError, property_error
from brokers.mqtt.in_memory import MemoryBroker, MemoryTransport
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES, Assembler
from brokers.protocol.codec import encode
from brokers.protocol.messages import Message, Task, TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Transport
from tests.support.brokers.broker_kinds import BrokerUnderTest, run_async
from tests.support.brokers.channel_ends import INBOX_TOPIC, RecordingTransport, make_task, open_listening_channel


async def send_chunks(
    transport: Transport, message: Task, *offsets: int, total: int | None = None, name: str = ""
) -> None:
    """Send 100-byte chunks of a message, those at the offsets and no others."""
    packet = encode(message)
    whole = b"".join(packet.buffers)
    for offset in offsets:
        chunk = ("chunk", f"{offset}/{len(whole) if total is None else total}")
        properties = replace(
            packet.properties, user_properties=(*packet.properties.user_properties, ("message", name), chunk)
        )
        await transport.publish(INBOX_TOPIC, whole[offset : offset + 100], properties)


@pytest.fixture(params=[True, False], ids=["with placer", "without placer"])
def transport(request: pytest.FixtureRequest) -> RecordingTransport:
    return RecordingTransport(MemoryBroker(), with_buffer_provider=request.param)


VALUES = np.arange(100, dtype=np.float32)  # with its header, between 400 and 600 bytes
ALL = (0, 100, 200, 300, 400, 500)


def test_a_lost_chunk_is_told_once_and_the_rest_of_its_message_ignored(transport: RecordingTransport) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(transport)
        message, after = make_task(VALUES), make_task(VALUES)
        await send_chunks(transport, message, 0, 200, 300, 400, 500)
        await send_chunks(transport, after, *ALL)
        assert await ear.next_message() == after
        error, properties = await ear.next_rejection()
        assert error.code == "BadChunk"
        assert (properties.correlation_data, properties.response_topic) == (message.request_id, "back")
        assert (ear.rejected.empty(), ear.messages.empty()) == (True, True)
        assert line.counters["BadChunk"] == 1
        await line.close()

    run_async(test())


def test_chunks_that_come_twice_change_nothing(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await open_listening_channel(transport, assembler)
        message, after = make_task(VALUES), make_task()
        await send_chunks(transport, message, 0, 0, 100, 0, 100, 200, 300, 400, 500, 500, 0, 100)
        await line.send(INBOX_TOPIC, after)
        assert [await ear.next_message(), await ear.next_message()] == [message, after]
        assert ear.rejected.empty()
        assert (assembler.duplicates, len(assembler)) == (3, 0)
        await line.close()

    run_async(test())


def test_an_overlong_claim_is_told_once_and_takes_no_memory(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await open_listening_channel(transport, assembler)
        await send_chunks(transport, make_task(VALUES), *ALL, total=100_000_000_000)
        await line.send(INBOX_TOPIC, make_task())
        await ear.next_message()
        error, _ = await ear.next_rejection()
        assert isinstance(error, TooLarge)
        assert (error.fields["limit_bytes"], error.fields["actual_bytes"]) == (MESSAGE_LIMIT_BYTES, 100_000_000_000)
        assert (ear.rejected.empty(), len(assembler)) == (True, 0)
        await line.close()

    run_async(test())


def test_a_message_whose_rest_never_comes_is_given_up_and_its_sender_told_once(
    transport: RecordingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokers.dispatch.channel._EXPIRY_CHECK_S", 0.01)

    async def test() -> None:
        line, ear = await open_listening_channel(transport, Assembler(chunk_timeout_s=0.05))
        message = make_task(VALUES)
        await send_chunks(transport, message, 0, 100)
        error, properties = await ear.next_rejection()
        assert error.code == "Incomplete"
        assert (error.fields["actual_bytes"], error.fields["waited_s"]) == (200, 0.05)
        assert properties.correlation_data == message.request_id
        await send_chunks(transport, message, 200, 300, 400, 500)
        await line.send(INBOX_TOPIC, make_task())
        await ear.next_message()
        assert (ear.rejected.empty(), ear.messages.empty()) == (True, True)
        await line.close()

    run_async(test())


def test_a_chunk_of_a_gigantic_head_is_refused_since_heads_are_kept_until_their_message_is_whole(
    transport: RecordingTransport,
) -> None:
    async def test() -> None:
        assembler = Assembler()
        line, ear = await open_listening_channel(transport, assembler)
        packet = encode(make_task())
        user = (*packet.properties.user_properties, ("padding", "p" * CHUNK_HEADER_LIMIT_BYTES), ("chunk", "0/1000"))
        await transport.publish(INBOX_TOPIC, b"x" * 100, replace(packet.properties, user_properties=user))
        error, _ = await ear.next_rejection()
        assert error.code == "BadChunk"
        assert len(assembler) == 0
        await line.close()

    run_async(test())


@pytest.mark.parametrize("text", ["", "5", "0/", "-1/100", "0/0"])
def test_a_chunk_that_says_no_place_is_told_once(transport: RecordingTransport, text: str) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(transport)
        packet = encode(make_task())
        user = (*packet.properties.user_properties, ("chunk", text))
        await transport.publish(INBOX_TOPIC, b"".join(packet.buffers), replace(packet.properties, user_properties=user))
        error, _ = await ear.next_rejection()
        assert error.code == "BadChunk"
        await line.send(INBOX_TOPIC, make_task())
        await ear.next_message()
        assert ear.rejected.empty()
        await line.close()

    run_async(test())


def test_what_breaks_the_protocol_is_counted_told_and_survived(place: BrokerUnderTest) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(place.transport())
        packet = encode(make_task())
        whole = b"".join(packet.buffers)
        await line.transport.publish(INBOX_TOPIC, whole + b".", packet.properties)
        await line.transport.publish(
            INBOX_TOPIC, whole, replace(packet.properties, user_properties=(("sparse", "1"), ("kind", "?")))
        )
        assert (await ear.next_rejection())[0].code == "TrailingBytes"
        assert (await ear.next_rejection())[0].code == "BadProperty"
        assert (line.counters["TrailingBytes"], line.counters["BadProperty"]) == (1, 1)
        sent = make_task()
        await line.send(INBOX_TOPIC, sent)
        assert await ear.next_message() == sent
        await line.close()

    run_async(test())


def test_what_is_refused_is_logged_with_sizes_and_without_its_payload(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(MemoryTransport(MemoryBroker()))
        packet = encode(make_task())
        await line.transport.publish(INBOX_TOPIC, b"".join(packet.buffers) + b"secret", packet.properties)
        await ear.next_rejection()
        await line.close()

    run_async(test())
    assert "TrailingBytes" in caplog.text
    assert "12 bytes" in caplog.text
    assert "secret" not in caplog.text


def test_a_mistake_of_the_handler_is_not_taken_for_one_of_the_sender() -> None:
    async def test() -> None:
        refused: list[WireError] = []

        def broken(topic: str, message: Message) -> None:
            raise property_error("ours", "and not the sender's")

        line = MessageChannel(MemoryTransport(MemoryBroker()))
        await line.open()
        await line.subscribe(INBOX_TOPIC, broken, lambda error, _: refused.append(error))
        await line.send(INBOX_TOPIC, make_task())
        await asyncio.sleep(0.01)
        assert refused == []
        assert line.counters["messages_in"] == 1
        await line.close()

    run_async(test())


def test_a_request_that_passes_one_worker_twice_comes_in_two_messages(transport: RecordingTransport) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(transport)
        message = make_task(VALUES)
        await send_chunks(transport, message, *ALL, name="first")
        await send_chunks(transport, message, *ALL, name="second")
        assert [await ear.next_message(), await ear.next_message()] == [message, message]
        long = replace(message, content=TensorContent({"x": from_numpy(np.zeros(300_000, np.float32))}))
        for _ in range(2):
            await line.send(INBOX_TOPIC, long)
        assert [await ear.next_message(), await ear.next_message()] == [long, long]
        assert ear.rejected.empty()
        await line.close()

    run_async(test())


@pytest.mark.parametrize("change", [{"attempt": 2}, {"sender_inbox": "another"}, {"request_id": bytes(16)}], ids=str)
def test_chunks_of_attempts_and_senders_are_not_taken_for_one_another(
    transport: RecordingTransport, change: dict[str, Any]
) -> None:
    async def test() -> None:
        line, ear = await open_listening_channel(transport)
        one = make_task(VALUES)
        other = replace(one, **change)
        await send_chunks(transport, one, 0, 100)
        await send_chunks(transport, other, 0)
        await send_chunks(transport, one, 200, 300, 400, 500)
        await send_chunks(transport, other, 100, 200, 300, 400, 500)
        assert [await ear.next_message(), await ear.next_message()] == [one, other]
        assert ear.rejected.empty()
        await line.close()

    run_async(test())
