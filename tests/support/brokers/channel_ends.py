"""Both ends of a line for tests: who listens, what is sent, and a transport that shows what went through it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from brokers.dispatch.channel import Line
from brokers.errors import WireError
from brokers.mqtt.in_memory import MemoryHub, MemoryTransport
from brokers.protocol.chunking import Assembler
from brokers.protocol.messages import Body, Message, ReplyTo, Task, new_request_id
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Buffer, Handler, Placer, Properties, Transport
from tests.support.brokers.broker_kinds import WAIT_S

INBOX = "sparse/local/street/head/in/head-1"


class Ear:
    """What a line hears: messages, and what was refused."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.refused: asyncio.Queue[tuple[WireError, Properties]] = asyncio.Queue()

    def heard(self, topic: str, message: Message) -> None:
        self.messages.put_nowait(message)

    def garbage(self, error: WireError, properties: Properties) -> None:
        self.refused.put_nowait((error, properties))

    async def message(self) -> Message:
        return await asyncio.wait_for(self.messages.get(), WAIT_S)

    async def refusal(self) -> tuple[WireError, Properties]:
        return await asyncio.wait_for(self.refused.get(), WAIT_S)


async def listening(transport: Transport, assembler: Assembler | None = None) -> tuple[Line, Ear]:
    line, ear = Line(transport, assembler=assembler), Ear()
    await line.open()
    await line.listen(INBOX, ear.heard, ear.garbage)
    return line, ear


def task(values: NDArray[np.float32] | None = None) -> Task:
    body = Body({"x": from_numpy(np.ones(3, np.float32) if values is None else values)}, {"k": "v"})
    return Task(request=new_request_id(), content=body, reply=ReplyTo("back"), sender="back")


class RecordingTransport(MemoryTransport):
    """Keeps what is sent through it, and may hide the placer: a transport need not ask where to write."""

    def __init__(self, hub: MemoryHub, *, with_placer: bool = True) -> None:
        super().__init__(hub)
        self.sent: list[tuple[str, Properties, int]] = []
        self._with_placer = with_placer

    async def subscribe(
        self, topic_filter: str, handler: Handler, *, qos: int = 0, placer: Placer | None = None, settle: bool = False
    ) -> None:
        kept = placer if self._with_placer else None
        await super().subscribe(topic_filter, handler, qos=qos, placer=kept, settle=settle)

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
