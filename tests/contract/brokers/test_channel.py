"""The message channel on every transport: whole and chunked messages up to 64 MiB, and its limits when it sends."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from brokers.dispatch.channel import HEADER_RESERVE_BYTES, MessageChannel
from brokers.errors import TooLarge
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
from tests.support.brokers.in_memory import MemoryBroker

MIB = 1 << 20


# On every broker ------------------------------------------------------------------------------------------------------


def test_every_kind_of_message_arrives_unchanged(broker: BrokerUnderTest) -> None:
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
        channel, recorder = await open_listening_channel(broker.transport())
        for message in sent:
            await channel.send(INBOX_TOPIC, message)
            assert await recorder.next_message() == message
        assert channel.counters == {"messages_out": 5, "messages_in": 5}
        await channel.close()

    run_async(test())


def test_tensor_of_any_size_arrives_whole(broker: BrokerUnderTest) -> None:
    async def test() -> None:
        receiver, recorder = await open_listening_channel(broker.transport())
        sender = MessageChannel(broker.transport())
        await sender.open()
        for payload_bytes in (0, 1, CHUNK_BYTES - 200, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 64 * MIB):
            values = np.random.default_rng(1).integers(0, 255, payload_bytes, np.uint8)
            tensor = TensorView("U8", (payload_bytes,), values.data)
            message = replace(make_task(), content=TensorContent({"x": tensor}))
            await sender.send(INBOX_TOPIC, message)
            received = await recorder.next_message()
            assert isinstance(received, Task)
            assert isinstance(received.content, TensorContent)
            assert (to_numpy(received.content.tensors["x"]) == values).all()
            assert received.request_id == message.request_id
        assert recorder.rejected.empty()
        await sender.close()
        await receiver.close()

    run_async(test())


def test_large_messages_of_several_senders_do_not_mix(broker: BrokerUnderTest) -> None:
    async def test() -> None:
        receiver, recorder = await open_listening_channel(broker.transport())
        senders = [MessageChannel(broker.transport()) for _ in range(3)]
        for sender in senders:
            await sender.open()
        sent = [make_task(np.full(300_000 + 100_000 * number, number, np.float32)) for number in range(3)]
        await asyncio.gather(
            *(sender.send(INBOX_TOPIC, message) for sender, message in zip(senders, sent, strict=True))
        )
        received = [await recorder.next_message() for _ in sent]
        assert sorted(received, key=lambda each: each.request_id) == sorted(sent, key=lambda each: each.request_id)
        for channel in (*senders, receiver):
            await channel.close()

    run_async(test())


# Limits of the sender -------------------------------------------------------------------------------------------------


class OversizedPacket(EncodedMessage):
    """A packet that claims more bytes than a message may have, without the memory for them."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return MESSAGE_LIMIT_BYTES + 1


def test_oversized_message_raises_too_large_before_a_byte_is_sent() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker())
        channel = MessageChannel(transport)
        await channel.open()
        with pytest.raises(TooLarge) as caught:
            await channel.send_packet(INBOX_TOPIC, OversizedPacket(Properties(), (b".",)))
        assert caught.value.fields == {"limit_bytes": MESSAGE_LIMIT_BYTES, "actual_bytes": MESSAGE_LIMIT_BYTES + 1}
        assert transport.sent == []
        await channel.close()

    run_async(test())


def test_broker_limit_below_one_chunk_raises_too_large() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=HEADER_RESERVE_BYTES))
        channel = MessageChannel(transport)
        await channel.open()
        with pytest.raises(TooLarge) as caught:
            await channel.send(INBOX_TOPIC, make_task())
        assert caught.value.fields == {"limit_bytes": HEADER_RESERVE_BYTES, "actual_bytes": HEADER_RESERVE_BYTES}
        assert transport.sent == []
        await channel.close()

    run_async(test())


@pytest.mark.parametrize("max_packet_bytes", [5000, 128 * 1024, 2_000_000])
def test_chunks_fit_the_packet_limit_of_the_broker(max_packet_bytes: int) -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryBroker(max_packet_bytes=max_packet_bytes))
        channel, recorder = await open_listening_channel(transport)
        message = make_task(np.ones(200_000, np.float32))
        await channel.send(INBOX_TOPIC, message)
        assert await recorder.next_message() == message
        sizes = [size for _, _, size in transport.sent]
        assert max(sizes) == min(CHUNK_BYTES, max_packet_bytes - HEADER_RESERVE_BYTES)
        chunks = [ChunkHeader.parse(dict(properties.user_properties)["chunk"]) for _, properties, _ in transport.sent]
        assert [chunk.offset for chunk in chunks] == [max(sizes) * index for index in range(len(sizes))]
        assert {chunk.total_bytes for chunk in chunks} == {sum(sizes)}
        await channel.close()

    run_async(test())
