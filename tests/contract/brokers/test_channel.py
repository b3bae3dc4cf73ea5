"""Messages over every transport: whole or in chunks, up to 64 MiB, and never more than a receiver takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from brokers.dispatch.channel import HEADER_RESERVE_BYTES, MessageChannel
from brokers.errors import TooLarge
from brokers.mqtt.in_memory import MemoryBroker
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES, ChunkHeader
from brokers.protocol.codec import EncodedMessage
from brokers.protocol.messages import (
    Activation,
    BinaryContent,
    Failure,
    Message,
    ReplyTo,
    Result,
    Task,
    TaskDone,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import TensorView, from_numpy, to_numpy
from brokers.protocol.transport import Properties
from tests.support.brokers.broker_kinds import BrokerUnderTest, run_async
from tests.support.brokers.channel_ends import INBOX_TOPIC, RecordingTransport, make_task, open_listening_channel

MIB = 1 << 20


# On every broker ------------------------------------------------------------------------------------------------------


def test_every_kind_of_message_arrives_as_it_was_sent(place: BrokerUnderTest) -> None:
    request, reply = new_request_id(), ReplyTo("größe/☃", "json", b"\x00\xff")
    body = TensorContent({"ünï": from_numpy(np.ones((1, 2), np.float32))}, {"schlüssel": "wert"})
    sent: list[Message] = [
        Task(
            request_id=request,
            content=BinaryContent("image/jpeg", b"\xff\xd8"),
            reply_to=reply,
            sender_inbox="s",
            source="cam",
            attempt=2,
        ),
        Activation(request_id=request, content=body, reply_to=reply, sender_inbox="s", deadline_ms=99.5),
        Result(request_id=request, content=body),
        Failure(request_id=request, stage="a", worker="b", error="c", reason="d\ne", retry=True),
        TaskDone(request_id=request, worker="w"),
    ]

    async def test() -> None:
        line, ear = await open_listening_channel(place.transport())
        for message in sent:
            await line.send(INBOX_TOPIC, message)
            assert await ear.next_message() == message
        assert line.counters == {"messages_out": 5, "messages_in": 5}
        await line.close()

    run_async(test())


@pytest.mark.parametrize("payload_bytes", [0, 1, CHUNK_BYTES - 200, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 64 * MIB])
def test_a_tensor_of_any_size_arrives_whole(place: BrokerUnderTest, payload_bytes: int) -> None:
    async def test() -> None:
        receiver, ear = await open_listening_channel(place.transport())
        sender = MessageChannel(place.transport())
        await sender.open()
        values = np.random.default_rng(1).integers(0, 255, payload_bytes, np.uint8)
        message = replace(make_task(), content=TensorContent({"x": TensorView("U8", (payload_bytes,), values.data)}))
        await sender.send(INBOX_TOPIC, message)
        found = await ear.next_message()
        assert isinstance(found, Task)
        assert isinstance(found.content, TensorContent)
        assert (to_numpy(found.content.tensors["x"]) == values).all()
        assert found.request_id == message.request_id
        assert ear.rejected.empty()
        await sender.close()
        await receiver.close()

    run_async(test())


def test_large_messages_of_several_senders_do_not_mix(place: BrokerUnderTest) -> None:
    async def test() -> None:
        receiver, ear = await open_listening_channel(place.transport())
        senders = [MessageChannel(place.transport()) for _ in range(3)]
        for sender in senders:
            await sender.open()
        values = [np.full(300_000 + 100_000 * number, number, np.float32) for number in range(3)]
        messages = [make_task(value) for value in values]
        await asyncio.gather(
            *(each.send(INBOX_TOPIC, message) for each, message in zip(senders, messages, strict=True))
        )
        found = [await ear.next_message() for _ in messages]
        assert sorted(found, key=lambda each: each.request_id) == sorted(messages, key=lambda each: each.request_id)
        for line in (*senders, receiver):
            await line.close()

    run_async(test())


# Before a byte is sent ------------------------------------------------------------------------------------------------


def test_a_message_that_no_receiver_takes_is_refused_before_a_byte_is_sent_with_both_numbers() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker())
        line = MessageChannel(transport)
        await line.open()
        with pytest.raises(TooLarge) as caught:
            await line.send_packet(INBOX_TOPIC, _Vast(Properties(), (b".",)))
        assert caught.value.fields["limit_bytes"] == MESSAGE_LIMIT_BYTES
        assert caught.value.fields["actual_bytes"] == MESSAGE_LIMIT_BYTES + 1
        assert str(MESSAGE_LIMIT_BYTES) in str(caught.value)
        assert str(MESSAGE_LIMIT_BYTES + 1) in str(caught.value)
        assert transport.sent == []
        await line.close()

    run_async(test())


class _Vast(EncodedMessage):
    """A packet that says it has more bytes than a message may have; a gigabyte to prove it would cost memory."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return MESSAGE_LIMIT_BYTES + 1


def test_a_broker_whose_packets_hold_no_chunk_is_refused_with_both_numbers() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=HEADER_RESERVE_BYTES))
        line = MessageChannel(transport)
        await line.open()
        with pytest.raises(
            TooLarge, match=f"smallest packet has {HEADER_RESERVE_BYTES} bytes, the limit is {HEADER_RESERVE_BYTES}"
        ):
            await line.send(INBOX_TOPIC, make_task())
        assert transport.sent == []
        await line.close()

    run_async(test())


@pytest.mark.parametrize("max_packet_bytes", [5000, 128 * 1024, 2_000_000])
def test_chunks_fit_what_the_broker_announced(max_packet_bytes: int) -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=max_packet_bytes))
        line, ear = await open_listening_channel(transport)
        sent = make_task(np.ones(200_000, np.float32))
        await line.send(INBOX_TOPIC, sent)
        assert await ear.next_message() == sent
        sizes = [size for _, _, size in transport.sent]
        assert max(sizes) == min(CHUNK_BYTES, max_packet_bytes - HEADER_RESERVE_BYTES)
        chunks = [ChunkHeader.parse(dict(properties.user_properties)["chunk"]) for _, properties, _ in transport.sent]
        assert [chunk.offset for chunk in chunks] == [max(sizes) * index for index in range(len(sizes))]
        assert {chunk.total_bytes for chunk in chunks} == {sum(sizes)}
        await line.close()

    run_async(test())
