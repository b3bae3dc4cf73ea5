"""Messages over every transport: whole or in chunks, up to 64 MiB, and never more than a receiver takes."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from brokers.dispatch.channel import HEAD_ROOM_BYTES, Line
from brokers.errors import TooLarge
from brokers.mqtt.in_memory import MemoryHub
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES, Chunk
from brokers.protocol.codec import Packet
from brokers.protocol.messages import (
    Activation,
    Blob,
    Body,
    Control,
    Failure,
    Message,
    ReplyTo,
    Result,
    Task,
    new_request_id,
)
from brokers.protocol.safetensors_codec import Tensor, from_numpy, to_numpy
from brokers.protocol.transport import Properties
from tests.support.brokers.broker_kinds import Place, run
from tests.support.brokers.channel_ends import INBOX, RecordingTransport, listening, task

MIB = 1 << 20


# On every broker ------------------------------------------------------------------------------------------------------


def test_every_kind_of_message_arrives_as_it_was_sent(place: Place) -> None:
    request, reply = new_request_id(), ReplyTo("größe/☃", "json", b"\x00\xff")
    body = Body({"ünï": from_numpy(np.ones((1, 2), np.float32))}, {"schlüssel": "wert"})
    sent: list[Message] = [
        Task(
            request=request, content=Blob("image/jpeg", b"\xff\xd8"), reply=reply, sender="s", source="cam", attempt=2
        ),
        Activation(request=request, content=body, reply=reply, sender="s", deadline_ms=99.5),
        Result(request=request, content=body),
        Failure(request=request, stage="a", worker="b", error="c", reason="d\ne", retry=True),
        Control(request=request, worker="w"),
    ]

    async def test() -> None:
        line, ear = await listening(place.transport())
        for message in sent:
            await line.send(INBOX, message)
            assert await ear.message() == message
        assert line.counters == {"messages_out": 5, "messages_in": 5}
        await line.close()

    run(test())


@pytest.mark.parametrize("payload_bytes", [0, 1, CHUNK_BYTES - 200, CHUNK_BYTES, 3 * CHUNK_BYTES + 1, 64 * MIB])
def test_a_tensor_of_any_size_arrives_whole(place: Place, payload_bytes: int) -> None:
    async def test() -> None:
        receiver, ear = await listening(place.transport())
        sender = Line(place.transport())
        await sender.open()
        values = np.random.default_rng(1).integers(0, 255, payload_bytes, np.uint8)
        message = replace(task(), content=Body({"x": Tensor("U8", (payload_bytes,), values.data)}))
        await sender.send(INBOX, message)
        found = await ear.message()
        assert isinstance(found, Task)
        assert isinstance(found.content, Body)
        assert (to_numpy(found.content.tensors["x"]) == values).all()
        assert found.request == message.request
        assert ear.refused.empty()
        await sender.close()
        await receiver.close()

    run(test())


def test_large_messages_of_several_senders_do_not_mix(place: Place) -> None:
    async def test() -> None:
        receiver, ear = await listening(place.transport())
        senders = [Line(place.transport()) for _ in range(3)]
        for sender in senders:
            await sender.open()
        values = [np.full(300_000 + 100_000 * number, number, np.float32) for number in range(3)]
        messages = [task(value) for value in values]
        await asyncio.gather(*(each.send(INBOX, message) for each, message in zip(senders, messages, strict=True)))
        found = [await ear.message() for _ in messages]
        assert sorted(found, key=lambda each: each.request) == sorted(messages, key=lambda each: each.request)
        for line in (*senders, receiver):
            await line.close()

    run(test())


# Before a byte is sent ------------------------------------------------------------------------------------------------


def test_a_message_that_no_receiver_takes_is_refused_before_a_byte_is_sent_with_both_numbers() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryHub())
        line = Line(transport)
        await line.open()
        with pytest.raises(TooLarge) as caught:
            await line.send_packet(INBOX, _Vast(Properties(), (b".",)))
        assert caught.value.limit_bytes == MESSAGE_LIMIT_BYTES
        assert caught.value.actual_bytes == MESSAGE_LIMIT_BYTES + 1
        assert str(MESSAGE_LIMIT_BYTES) in str(caught.value)
        assert str(MESSAGE_LIMIT_BYTES + 1) in str(caught.value)
        assert transport.sent == []
        await line.close()

    run(test())


class _Vast(Packet):
    """A packet that says it has more bytes than a message may have; a gigabyte to prove it would cost memory."""

    __slots__ = ()

    @property
    def nbytes(self) -> int:
        return MESSAGE_LIMIT_BYTES + 1


def test_a_broker_whose_packets_hold_no_chunk_is_refused_with_both_numbers() -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryHub(max_packet_bytes=HEAD_ROOM_BYTES))
        line = Line(transport)
        await line.open()
        with pytest.raises(TooLarge, match=f"smallest packet has {HEAD_ROOM_BYTES} bytes, at most {HEAD_ROOM_BYTES}"):
            await line.send(INBOX, task())
        assert transport.sent == []
        await line.close()

    run(test())


@pytest.mark.parametrize("max_packet_bytes", [5000, 128 * 1024, 2_000_000])
def test_chunks_fit_what_the_broker_announced(max_packet_bytes: int) -> None:
    async def test() -> None:
        transport = RecordingTransport(MemoryHub(max_packet_bytes=max_packet_bytes))
        line, ear = await listening(transport)
        sent = task(np.ones(200_000, np.float32))
        await line.send(INBOX, sent)
        assert await ear.message() == sent
        sizes = [size for _, _, size in transport.sent]
        assert max(sizes) == min(CHUNK_BYTES, max_packet_bytes - HEAD_ROOM_BYTES)
        chunks = [Chunk.parse(dict(properties.user)["chunk"]) for _, properties, _ in transport.sent]
        assert [chunk.offset for chunk in chunks] == [max(sizes) * index for index in range(len(sizes))]
        assert {chunk.total_bytes for chunk in chunks} == {sum(sizes)}
        await line.close()

    run(test())
