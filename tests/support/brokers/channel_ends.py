"""Both ends of a message channel for tests, and a transport that records publications."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brokers.dispatch.channel import MessageChannel
from brokers.errors import WireError
from brokers.protocol.chunking import Assembler
from brokers.protocol.messages import Message, ReplyTo, Task, TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Buffer, BufferProvider, Handler, Properties, Transport
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport

INBOX_TOPIC = "sparse/local/street/head/in/head-1"


class MessageRecorder:
    """The messages that a channel has received and rejected."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.rejected: asyncio.Queue[tuple[WireError, Properties]] = asyncio.Queue()

    def on_message(self, topic: str, message: Message) -> None:
        self.messages.put_nowait(message)

    def on_malformed(self, error: WireError, properties: Properties) -> None:
        self.rejected.put_nowait((error, properties))

    async def next_message(self) -> Message:
        return await asyncio.wait_for(self.messages.get(), WAIT_S)

    async def next_rejection(self) -> tuple[WireError, Properties]:
        return await asyncio.wait_for(self.rejected.get(), WAIT_S)


async def open_listening_channel(
    transport: Transport, assembler: Assembler | None = None
) -> tuple[MessageChannel, MessageRecorder]:
    channel = MessageChannel(transport, assembler=assembler)
    recorder = MessageRecorder()
    await channel.open()
    await channel.subscribe(INBOX_TOPIC, recorder.on_message, recorder.on_malformed)
    return channel, recorder


def make_task(values: NDArray[np.float32] | None = None) -> Task:
    body = TensorContent({"x": from_numpy(np.ones(3, np.float32) if values is None else values)}, {"k": "v"})
    return Task(request_id=new_request_id(), content=body, reply_to=ReplyTo("back"), sender_inbox="back")


class RecordingTransport(MemoryTransport):
    """Records publications; `with_buffer_provider=False` hides buffer providers, which a transport need not use."""

    def __init__(self, hub: MemoryBroker, *, with_buffer_provider: bool = True) -> None:
        super().__init__(hub)
        self.sent: list[tuple[str, Properties, int]] = []
        self._with_buffer_provider = with_buffer_provider

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        provider = buffer_provider if self._with_buffer_provider else None
        await super().subscribe(topic_filter, handler, qos=qos, buffer_provider=provider, manual_ack=manual_ack)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        pieces = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        self.sent.append((topic, properties, sum(memoryview(piece).nbytes for piece in pieces)))
        await super().publish(topic, payload, properties, qos=qos, retain=retain)
