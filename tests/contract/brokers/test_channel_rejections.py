"""Malformed and incomplete messages are reported once each, with their properties, and harm no other message."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from brokers.dispatch.channel import CHUNK_HEADER_LIMIT_BYTES, MessageChannel
from brokers.errors import TooLarge, WireError, property_error
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES, Assembler
from brokers.protocol.codec import encode
from brokers.protocol.messages import Message, Task, TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Transport
from tests.support.brokers.broker_kinds import BrokerUnderTest, run_async
from tests.support.brokers.channel_ends import (
    INBOX_TOPIC,
    MessageRecorder,
    RecordingTransport,
    make_task,
    open_listening_channel,
)
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport


async def send_chunks(
    transport: Transport, message: Task, *offsets: int, total: int | None = None, name: str = ""
) -> None:
    """Send the 100-byte chunks of a message that begin at `offsets`."""
    packet = encode(message)
    whole = b"".join(packet.buffers)
    for offset in offsets:
        chunk = ("chunk", f"{offset}/{len(whole) if total is None else total}")
        properties = replace(
            packet.properties, user_properties=(*packet.properties.user_properties, ("message", name), chunk)
        )
        await transport.publish(INBOX_TOPIC, whole[offset : offset + 100], properties)


@pytest.fixture(params=[True, False], ids=["with buffer provider", "without buffer provider"])
def transport(request: pytest.FixtureRequest) -> RecordingTransport:
    return RecordingTransport(MemoryBroker(), with_buffer_provider=request.param)


VALUES = np.arange(100, dtype=np.float32)  # with its header, between 400 and 600 bytes
ALL = (0, 100, 200, 300, 400, 500)


def test_lost_chunk_is_reported_once_and_its_message_dropped(transport: RecordingTransport) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(transport)
        message, after = make_task(VALUES), make_task(VALUES)
        await send_chunks(transport, message, 0, 200, 300, 400, 500)
        await send_chunks(transport, after, *ALL)
        assert await recorder.next_message() == after
        error, properties = await recorder.next_rejection()
        assert error.code == "BadChunk"
        assert (properties.correlation_data, properties.response_topic) == (message.request_id, "back")
        assert (recorder.rejected.empty(), recorder.messages.empty()) == (True, True)
        assert channel.counters["BadChunk"] == 1
        await channel.close()

    run_async(test())


def test_duplicate_chunks_are_ignored(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        channel, recorder = await open_listening_channel(transport, assembler)
        message, after = make_task(VALUES), make_task()
        await send_chunks(transport, message, 0, 0, 100, 0, 100, 200, 300, 400, 500, 500, 0, 100)
        await channel.send(INBOX_TOPIC, after)
        assert [await recorder.next_message(), await recorder.next_message()] == [message, after]
        assert recorder.rejected.empty()
        assert (assembler.duplicates, len(assembler)) == (3, 0)
        await channel.close()

    run_async(test())


def test_claimed_size_over_the_limit_allocates_no_memory(transport: RecordingTransport) -> None:
    async def test() -> None:
        assembler = Assembler()
        channel, recorder = await open_listening_channel(transport, assembler)
        await send_chunks(transport, make_task(VALUES), *ALL, total=100_000_000_000)
        await channel.send(INBOX_TOPIC, make_task())
        await recorder.next_message()
        error, _ = await recorder.next_rejection()
        assert isinstance(error, TooLarge)
        assert (error.fields["limit_bytes"], error.fields["actual_bytes"]) == (MESSAGE_LIMIT_BYTES, 100_000_000_000)
        assert (recorder.rejected.empty(), len(assembler)) == (True, 0)
        await channel.close()

    run_async(test())


def test_incomplete_message_is_reported_once_after_a_timeout(
    transport: RecordingTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brokers.dispatch.channel._EXPIRY_CHECK_S", 0.01)

    async def test() -> None:
        channel, recorder = await open_listening_channel(transport, Assembler(chunk_timeout_s=0.05))
        message = make_task(VALUES)
        await send_chunks(transport, message, 0, 100)
        error, properties = await recorder.next_rejection()
        assert error.code == "Incomplete"
        assert (error.fields["actual_bytes"], error.fields["waited_s"]) == (200, 0.05)
        assert properties.correlation_data == message.request_id
        await send_chunks(transport, message, 200, 300, 400, 500)
        await channel.send(INBOX_TOPIC, make_task())
        await recorder.next_message()
        assert (recorder.rejected.empty(), recorder.messages.empty()) == (True, True)
        await channel.close()

    run_async(test())


def test_chunk_with_oversized_properties_is_rejected(
    transport: RecordingTransport,
) -> None:
    async def test() -> None:
        assembler = Assembler()
        channel, recorder = await open_listening_channel(transport, assembler)
        packet = encode(make_task())
        user = (*packet.properties.user_properties, ("padding", "p" * CHUNK_HEADER_LIMIT_BYTES), ("chunk", "0/1000"))
        await transport.publish(INBOX_TOPIC, b"x" * 100, replace(packet.properties, user_properties=user))
        error, _ = await recorder.next_rejection()
        assert error.code == "BadChunk"
        assert len(assembler) == 0
        await channel.close()

    run_async(test())


@pytest.mark.parametrize("text", ["", "5", "0/", "-1/100", "0/0"])
def test_malformed_chunk_property_is_reported_once(transport: RecordingTransport, text: str) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(transport)
        packet = encode(make_task())
        user = (*packet.properties.user_properties, ("chunk", text))
        await transport.publish(INBOX_TOPIC, b"".join(packet.buffers), replace(packet.properties, user_properties=user))
        error, _ = await recorder.next_rejection()
        assert error.code == "BadChunk"
        await channel.send(INBOX_TOPIC, make_task())
        await recorder.next_message()
        assert recorder.rejected.empty()
        await channel.close()

    run_async(test())


def test_malformed_messages_are_counted_and_reported_and_later_ones_arrive(broker: BrokerUnderTest) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(broker.transport())
        packet = encode(make_task())
        whole = b"".join(packet.buffers)
        await channel.transport.publish(INBOX_TOPIC, whole + b".", packet.properties)
        await channel.transport.publish(
            INBOX_TOPIC, whole, replace(packet.properties, user_properties=(("sparse", "1"), ("kind", "?")))
        )
        assert (await recorder.next_rejection())[0].code == "TrailingBytes"
        assert (await recorder.next_rejection())[0].code == "BadProperty"
        assert (channel.counters["TrailingBytes"], channel.counters["BadProperty"]) == (1, 1)
        sent = make_task()
        await channel.send(INBOX_TOPIC, sent)
        assert await recorder.next_message() == sent
        await channel.close()

    run_async(test())


def test_rejection_is_logged_without_the_payload(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(MemoryTransport(MemoryBroker()))
        packet = encode(make_task())
        await channel.transport.publish(INBOX_TOPIC, b"".join(packet.buffers) + b"secret", packet.properties)
        await recorder.next_rejection()
        await channel.close()

    run_async(test())
    assert "TrailingBytes" in caplog.text
    assert "12 bytes" in caplog.text
    assert "secret" not in caplog.text


def test_error_in_the_handler_is_not_reported_as_malformed() -> None:
    async def test() -> None:
        rejected: list[WireError] = []

        def raise_error(topic: str, message: Message) -> None:
            raise property_error("name", "is wrong, though the message is not")

        channel = MessageChannel(MemoryTransport(MemoryBroker()))
        await channel.open()
        await channel.subscribe(INBOX_TOPIC, raise_error, lambda error, _: rejected.append(error))
        second = MessageRecorder()
        await channel.subscribe("other", second.on_message)
        await channel.send(INBOX_TOPIC, make_task())
        await channel.send("other", make_task())
        await second.next_message()
        assert rejected == []
        assert channel.counters["messages_in"] == 2
        await channel.close()

    run_async(test())


def test_two_messages_of_one_request_arrive_separately(transport: RecordingTransport) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(transport)
        message = make_task(VALUES)
        await send_chunks(transport, message, *ALL, name="first")
        await send_chunks(transport, message, *ALL, name="second")
        assert [await recorder.next_message(), await recorder.next_message()] == [message, message]
        long = replace(message, content=TensorContent({"x": from_numpy(np.zeros(300_000, np.float32))}))
        for _ in range(2):
            await channel.send(INBOX_TOPIC, long)
        assert [await recorder.next_message(), await recorder.next_message()] == [long, long]
        assert recorder.rejected.empty()
        await channel.close()

    run_async(test())


@pytest.mark.parametrize("change", [{"attempt": 2}, {"sender_inbox": "another"}, {"request_id": bytes(16)}], ids=str)
def test_chunks_of_different_attempts_and_senders_do_not_mix(
    transport: RecordingTransport, change: dict[str, Any]
) -> None:
    async def test() -> None:
        channel, recorder = await open_listening_channel(transport)
        one = make_task(VALUES)
        other = replace(one, **change)
        await send_chunks(transport, one, 0, 100)
        await send_chunks(transport, other, 0)
        await send_chunks(transport, one, 200, 300, 400, 500)
        await send_chunks(transport, other, 100, 200, 300, 400, 500)
        assert [await recorder.next_message(), await recorder.next_message()] == [one, other]
        assert recorder.rejected.empty()
        await channel.close()

    run_async(test())
